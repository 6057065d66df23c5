"""What a gradient risks: R(g) = g' F g, F the diagonal Fisher information of other tasks under the same model.

"RFT naturally mitigates forgetting" (its second version) claims E[R(g_RFT)] = Var[r] R(g_SFT), hence at most a quarter of SFT's risk.
Measured here, on the same prompts, from the model's own answers a with rewards r(a) and g(a) the gradient of -log p(a):

    SFT            R(g(gold))
    RFT            mean over a of (r(a) - mean r)^2 R(g(a))        one answer at a time, as in the claim
    RFT, group     R(mean over a of (r(a) - mean r) g(a))          the update that is made of them

The claim is expected to fail where most answers are right, since g(gold) vanishes there, and with advantages divided by their deviation.
What holds whatever the algebra: a prompt whose answers all have the same reward moves nothing.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cptjax.analysis.finding import Finding, FindingChart, FindingTable
from cptjax.analysis.probe import Probe, open_probe
from cptjax.common import console
from cptjax.data.collate import EncodedConversation
from cptjax.evaluation.report import svg
from cptjax.evaluation.report.svg import Point, Series
from cptjax.training.algorithms import regularizers
from cptjax.types import Params


@dataclasses.dataclass(frozen=True)
class GradientRisk:
    """One prompt."""

    id: str
    mean: float  # reward of its answers
    variance: float
    sft: float
    rft: float
    group: float

    @property
    def ratio(self) -> float | None:
        """Of RFT's risk to what the claim says; None where all rewards are equal, or SFT risks nothing."""
        return self.rft / (self.variance * self.sft) if self.variance * self.sft > 0 else None


def analyze(
    folder: str,
    stage: int = 1,
    rows: int = 16,
    samples: int = 8,
    others: str = "",
    dtype: str = "float32",
    probes: int = 16,
) -> Finding:
    if samples < 2 or min(rows, probes) < 1:
        raise ValueError(
            f"--rows={rows} --samples={samples} --probes={probes}: expected at least one row and probe, and two answers"
        )
    with open_probe(folder, stage, others, dtype) as (probe, names):
        with console.progress_bar("Fisher information", probes * len(names)) as bar:
            fisher = fisher_of_answers(
                probe, [e for name in names for e in probe.gold_test_responses(name, probes)], bar
            )
        found = gradient_risks(probe, probe.training_rows(rows), samples, fisher)
    return risk_finding(probe.stage.name, names, found)


def fisher_of_answers(
    probe: Probe, known: Sequence[EncodedConversation], bar: console.ProgressBar
) -> Params:
    """The diagonal Fisher of gold answers, one at a time: the same that EWC keeps."""
    fisher = regularizers.zero_fisher(probe.trained)
    for encoded in known:
        fisher = _add(fisher, probe.gradient(encoded), len(known))
        bar.advance()
    return fisher


def gradient_risks(
    probe: Probe, rows: Sequence[tuple[str, int]], samples: int, fisher: Params
) -> list[GradientRisk]:
    drawn, out = probe.sample_graded(probe.encode_prompts(rows), samples), []
    with console.progress_bar("gradients of gold and drawn answers", len(rows)) as bar:
        for graded in drawn:
            for q, item in enumerate(graded.items):
                mine = slice(q * samples, (q + 1) * samples)
                answers = list(
                    zip(graded.samples.texts[mine], graded.accuracy[q].tolist(), strict=True)
                )
                sft = float(_quadratic(probe.gradient(probe.with_gold_response(item)), fisher))
                out.append(
                    prompt_risk(
                        item.example.id,
                        sft,
                        answers,
                        fisher,
                        lambda text, item=item: probe.gradient(probe.with_response(item, text)),
                    )
                )
                bar.advance()
    return out


def prompt_risk(
    name: str,
    sft: float,
    answers: Sequence[tuple[str, float]],
    fisher: Params,
    slope: Callable[[str], Params],
) -> GradientRisk:
    """Of one prompt, from its answers with their rewards; equal answers have one gradient."""
    rewards = np.array([r for _, r in answers])
    mean, rft, total = float(rewards.mean()), 0.0, regularizers.zero_fisher(fisher)
    for (text, reward), n in collections.Counter(answers).items():
        if advantage := reward - mean:
            gradient = slope(text)
            rft += n / len(answers) * advantage**2 * float(_quadratic(gradient, fisher))
            total = _add_weighted(total, gradient, np.float32(n / len(answers) * advantage))
    return GradientRisk(
        name, mean, float(rewards.var()), sft, rft, float(_quadratic(total, fisher))
    )


_add = jax.jit(regularizers.add_fisher, donate_argnums=0)
_add_weighted = jax.jit(
    lambda total, gradient, weight: jax.tree.map(lambda t, g: t + weight * g, total, gradient),
    donate_argnums=0,
)


@jax.jit
def _quadratic(gradient: Params, fisher: Params) -> jax.Array:
    return sum(
        jnp.sum(f * jnp.square(g))
        for f, g in zip(jax.tree.leaves(fisher), jax.tree.leaves(gradient), strict=True)
    )


REWARD_GROUPS = {  # of prompts, by the mean reward of their answers
    "none right": lambda r: r.mean == 0,
    "up to half": lambda r: 0 < r.mean <= 0.5,
    "over half": lambda r: 0.5 < r.mean < 1,
    "all right": lambda r: r.mean == 1,
}


def risk_finding(stage: str, names: Sequence[str], found: Sequence[GradientRisk]) -> Finding:
    groups = {label: [r for r in found if inside(r)] for label, inside in REWARD_GROUPS.items()} | {
        "all": found
    }
    header = (
        "answers right",
        "prompts",
        "SFT",
        "RFT",
        "RFT, group",
        "RFT / (Var SFT), median",
        "RFT <= SFT / 4",
    )
    table = FindingTable(
        "Mean risk of a prompt's gradient",
        header,
        [risk_row(label, members) for label, members in groups.items() if members],
    )
    sft, rft, group = (
        _short(np.mean([getattr(r, name) for r in found])) for name in ("sft", "rft", "group")
    )
    said = [
        f"On {len(found)} prompts of {stage}, a gold answer's gradient risks {sft} on {', '.join(names)}; a drawn answer's, times its "
        f"advantage, {rft}, and a group's update {group}.",
        f"{sum(not r.variance for r in found)} of {len(found)} prompts have answers of equal reward only: they move nothing.",
    ]
    dots = Series(
        "", [Point(r.mean, float(np.log10(r.ratio)), r.id) for r in found if r.ratio], 0, line=False
    )
    axes = ("share of right answers", "log10 of E[R(RFT)] / (Var[r] R(SFT))")
    note = "0: E[R(RFT)] = Var[r] R(SFT), as claimed; above: RFT risks more."
    picture = FindingChart(
        "The claim, prompt by prompt", note, svg.line_chart([dots], "claim", *axes, include=(0,))
    )
    numbers = {
        "stage": stage,
        "others": list(names),
        "prompts": [dataclasses.asdict(r) | {"ratio": r.ratio} for r in found],
    }
    return Finding(f"What gradients of {stage} risk", said, [table], [picture], numbers)


def risk_row(label: str, found: Sequence[GradientRisk]) -> tuple[str, ...]:
    means = [_short(np.mean([getattr(r, name) for r in found])) for name in ("sft", "rft", "group")]
    ratios = [r.ratio for r in found if r.ratio is not None]
    under = f"{sum(r.rft <= r.sft / 4 for r in found)} of {len(found)}"
    return label, str(len(found)), *means, _short(np.median(ratios)) if ratios else "–", under


def _short(value: float) -> str:
    return f"{value:.3g}"
