"""Measure the risk of gradients: R(g) = g' F g, F the diagonal Fisher information of other tasks.

"RFT naturally mitigates forgetting" (its second version) claims E[R(g_RFT)] = Var[r] R(g_SFT),
hence at most a quarter of SFT's risk. Measured on the same prompts, from sampled responses a with
rewards r(a), where g(a) is the gradient of -log p(a):

    SFT            R(g(gold))
    RFT            mean over a of (r(a) - mean r)^2 R(g(a))     each response, as in the claim
    RFT, group     R(mean over a of (r(a) - mean r) g(a))       the update of the group

The claim is expected to fail where most responses are correct, since g(gold) vanishes there, and
with advantages divided by their deviation. A prompt whose responses all have the same reward has no
gradient under any form of advantage.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cptjax.analysis.finding import Finding, FindingChart, FindingTable
from cptjax.analysis.probe import Probe, open_probe
from cptjax.common import console
from cptjax.data.prompts import EncodedExample
from cptjax.evaluation.report import svg
from cptjax.evaluation.report.svg import Point, Series
from cptjax.types import Params


@dataclasses.dataclass(frozen=True)
class GradientRisk:
    """The risks of the gradients of one prompt."""

    id: str
    mean: float  # reward of its responses
    variance: float
    sft: float
    rft: float
    group: float

    @property
    def ratio(self) -> float | None:
        """RFT's risk divided by the claimed risk, or None if the claimed risk is 0."""
        claimed = self.variance * self.sft
        return self.rft / claimed if claimed > 0 else None


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
            f"--rows={rows} --samples={samples} --probes={probes}: "
            "expected at least one row, one probe and two samples"
        )
    with open_probe(folder, stage, others, dtype) as (probe, names):
        with console.progress_bar("Fisher information", probes * len(names)) as bar:
            known = [e for name in names for e in probe.gold_test_responses(name, probes)]
            fisher = _zeros_like(probe.trained)
            for encoded in known:  # one at a time, as in EWC
                fisher = _add_square(fisher, probe.gradient(encoded), len(known))
                bar.advance()
        risks = gradient_risks(probe, probe.training_rows(rows), samples, fisher)
    return risk_finding(probe.stage.name, names, risks)


def gradient_risks(
    probe: Probe, rows: Sequence[tuple[str, int]], samples: int, fisher: Params
) -> list[GradientRisk]:
    """Measure the risk on each prompt from its gold response and `samples` sampled ones."""
    batches, risks = probe.sample_graded(probe.encode_prompts(rows), samples), []
    with console.progress_bar("gradients of gold and sampled responses", len(rows)) as bar:
        for graded in batches:
            for q, item in enumerate(graded.items):
                texts = graded.samples.texts[q * samples : (q + 1) * samples]
                responses = list(zip(texts, graded.accuracy[q].tolist(), strict=True))
                gold = probe.gradient(probe.with_gold_response(item))
                sft = float(_quadratic(gold, fisher))

                def gradient(text: str, item: EncodedExample = item) -> Params:
                    return probe.gradient(probe.with_response(item, text))

                risks.append(prompt_risk(item.example.id, sft, responses, fisher, gradient))
                bar.advance()
    return risks


def prompt_risk(
    name: str,
    sft: float,
    responses: Sequence[tuple[str, float]],
    fisher: Params,
    gradient: Callable[[str], Params],
) -> GradientRisk:
    """Measure the risk on one prompt from its responses and their rewards.

    Equal responses share one gradient.
    """
    rewards = np.array([reward for _, reward in responses])
    mean, rft, total = float(rewards.mean()), 0.0, _zeros_like(fisher)
    for (text, reward), n in collections.Counter(responses).items():
        if advantage := reward - mean:
            g = gradient(text)
            rft += n / len(responses) * advantage**2 * float(_quadratic(g, fisher))
            total = _add_weighted(total, g, np.float32(n / len(responses) * advantage))
    group = float(_quadratic(total, fisher))
    return GradientRisk(name, mean, float(rewards.var()), sft, rft, group)


def _zeros_like(params: Params) -> Params:
    """Return float32 zeros in the shapes of the parameters."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)


@functools.partial(jax.jit, donate_argnums=0)
def _add_square(fisher: Params, gradient: Params, rows: int) -> Params:
    """Add the gradient of one of `rows` rows to their mean of squares."""
    return jax.tree.map(lambda f, g: f + jnp.square(g) / rows, fisher, gradient)


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


REWARD_GROUPS = {  # of prompts, by the mean reward of their responses
    "none correct": lambda r: r.mean == 0,
    "up to half": lambda r: 0 < r.mean <= 0.5,
    "over half": lambda r: 0.5 < r.mean < 1,
    "all correct": lambda r: r.mean == 1,
}


def risk_finding(stage: str, names: Sequence[str], risks: Sequence[GradientRisk]) -> Finding:
    groups = {
        label: [risk for risk in risks if is_inside(risk)]
        for label, is_inside in REWARD_GROUPS.items()
    }
    groups["all"] = list(risks)
    header = (
        "responses correct",
        "prompts",
        "SFT",
        "RFT",
        "RFT, group",
        "RFT / (Var SFT), median",
        "RFT <= SFT / 4",
    )
    rows = [risk_row(label, members) for label, members in groups.items() if members]
    _, _, sft, rft, group, *_ = risk_row("all", risks)
    sentences = [
        f"On {len(risks)} prompts of {stage}, the gradient of a gold response has a risk of {sft} "
        f"on {', '.join(names)}; that of a sampled response times its advantage has {rft}, and "
        f"the update of a group has {group}.",
        f"{sum(not r.variance for r in risks)} of {len(risks)} prompts have only responses of "
        "equal reward, which give no gradient.",
    ]
    points = [Point(r.mean, float(np.log10(r.ratio)), r.id) for r in risks if r.ratio]
    chart = svg.line_chart(
        [Series("", points, 0, line=False)],
        "claim",
        "share of correct responses",
        "log10 of E[R(RFT)] / (Var[r] R(SFT))",
        include=(0,),
    )
    note = "0: E[R(RFT)] = Var[r] R(SFT), as claimed. Above 0: RFT has a higher risk."
    return Finding(
        f"Risk of the gradients of {stage}",
        sentences,
        [FindingTable("Mean risk of a prompt's gradient", header, rows)],
        [FindingChart("The claim, prompt by prompt", note, chart)],
        {
            "stage": stage,
            "others": list(names),
            "prompts": [dataclasses.asdict(risk) | {"ratio": risk.ratio} for risk in risks],
        },
    )


def risk_row(label: str, risks: Sequence[GradientRisk]) -> tuple[str, ...]:
    means = [_short(np.mean([getattr(r, name) for r in risks])) for name in ("sft", "rft", "group")]
    ratios = [r.ratio for r in risks if r.ratio is not None]
    median = _short(np.median(ratios)) if ratios else "–"
    under = f"{sum(r.rft <= r.sft / 4 for r in risks)} of {len(risks)}"
    return label, str(len(risks)), *means, median, under


def _short(value: float) -> str:
    return f"{value:.3g}"
