"""What learning one answer does to the answers of other tasks, by the corpus that the answer is from.

    influence of u on v     d(v | u) = log p(v) after one step of gradient descent on -log p(u), minus before; per unit of learning rate
    to first order          d(v | u) = grad log p(v) . grad log p(u), so d(v | u) = d(u | v)

    kernel (lower bound)    sum_t d(v_t | u)^2 / (sum_t |a(v_t)|^2  sum_s |a(u_s)|^2),   a(y) = d log p(y) / d logits

"Why RFT preserves prior knowledge" explains what SFT on bare answers destroys by a large kernel (magnitude), and by data that the base
finds unlikely (direction: by the symmetry, data to which the probes give likelihood gives likelihood to them). Asymmetry is the mean of
|d(v | u) - d(u | v)| over that of |d|: near 0 while the step is small enough to be a derivative, and large enough to be no rounding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from markupsafe import Markup

from cptjax.analysis.finding import Finding, FindingChart, FindingTable
from cptjax.analysis.probe import Probe, open_probe
from cptjax.common import console, files
from cptjax.common.shuffle import permutation
from cptjax.data.collate import EncodedConversation
from cptjax.evaluation.report import svg
from cptjax.evaluation.report.svg import Point, Series
from cptjax.tasks import rewards

ASYMMETRY_PAIRS = 4  # probes of each corpus that are stepped on in their turn


@dataclasses.dataclass(frozen=True)
class ResponseInfluence:
    """One answer: how likely it was, and what a step on it did to the probes."""

    tokens: int
    nats: float  # -log p, per token
    steepness: float  # sum of |a|^2
    change: dict[
        str, float
    ]  # of log p per token and unit of learning rate, mean over a task's probes
    kernel: float  # mean over the probes

    @property
    def all(self) -> float:
        """The change over all tasks, each counted the same."""
        return float(np.mean(list(self.change.values())))


@dataclasses.dataclass(frozen=True)
class CorpusInfluence:
    name: str
    pulls: list[ResponseInfluence]
    asymmetry: float

    @property
    def perplexity(self) -> float:
        tokens = sum(p.tokens for p in self.pulls)
        return float(np.exp(sum(p.nats * p.tokens for p in self.pulls) / tokens))

    def mean(self, number: Callable[[ResponseInfluence], float]) -> float:
        return float(np.mean([number(p) for p in self.pulls]))


def analyze(
    folder: str,
    stage: int = 1,
    rows: int = 16,
    samples: int = 8,
    others: str = "",
    dtype: str = "float32",
    corpus: str = "gold,own",
    lr: float = 1e-4,
    probes: int = 16,
) -> Finding:
    if lr <= 0 or min(rows, samples, probes) < 1:
        raise ValueError(
            f"--lr={lr} --rows={rows} --samples={samples} --probes={probes}: expected numbers above 0"
        )
    with open_probe(folder, stage, others, dtype) as (probe, names):
        known = {name: probe.gold_test_responses(name, probes) for name in names}
        made = [
            (name, corpus_responses(probe, name, rows, samples))
            for name in corpus.split(",")
            if name
        ]
        with console.progress_bar(
            "one step on each answer",
            sum(len(a) + min(ASYMMETRY_PAIRS, len(sum(known.values(), []))) for _, a in made),
        ) as bar:
            found = [
                measure_influence(probe, name, answers, known, lr, bar.advance)
                for name, answers in made
            ]
    return influence_finding(probe.stage.name, names, lr, found)


def corpus_responses(probe: Probe, name: str, rows: int, samples: int) -> list[EncodedConversation]:
    """The answers of a corpus to learn from: one a prompt."""
    if name == "gold":
        return [
            probe.with_gold_response(item)
            for item in probe.encode_prompts(probe.training_rows(rows))
        ]
    if name == "own":
        return own_correct_responses(probe, rows, samples)
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"--corpus names {name!r}; expected gold, own, or the path of a rollouts/*.jsonl"
        )
    lines = [
        r
        for r in files.read_jsonl(path)
        if r.get("task") in probe.stage.tasks and rewards.is_correct(r.get("rewards") or {})
    ]
    if not lines:
        raise ValueError(
            f"{path} has no correct answer to a task of stage {probe.stage.number} ({', '.join(probe.stage.tasks)})"
        )
    if bad := next(
        (
            r
            for r in lines
            if {"id", "row", "response"} - r.keys()
            or r["row"] not in range(len(probe.train_examples(r["task"])))
        ),
        None,
    ):
        shown = {k: bad.get(k) for k in ("task", "id", "row")}
        raise ValueError(
            f"{path}: expected lines with id, response and a row of this run's data; got {shown}"
        )
    chosen = [
        lines[i] for i in permutation(len(lines), (probe.run.config.seed, 30_001))[:rows].tolist()
    ]
    items = probe.encode_prompts([(r["task"], r["row"]) for r in chosen])
    if lost := [
        r["id"] for r, item in zip(chosen, items, strict=True) if item.example.id != r["id"]
    ]:
        raise ValueError(
            f"{path}: {lost[0]!r} is another row in this run's data; expected rollouts over the same training rows"
        )
    return [probe.with_response(item, r["response"]) for item, r in zip(items, chosen, strict=True)]


def own_correct_responses(probe: Probe, rows: int, samples: int) -> list[EncodedConversation]:
    """The model's own first correct answer to each prompt that it answers at all."""
    found = []
    for graded in probe.sample_graded(probe.encode_prompts(probe.training_rows(rows)), samples):
        for q, item in enumerate(graded.items):
            right = [
                r
                for r in range(q * samples, (q + 1) * samples)
                if rewards.is_correct(graded.reward_parts[r]) and graded.samples.finished[r]
            ]
            found += [probe.with_response(item, graded.samples.texts[right[0]])] if right else []
    if not found:
        raise ValueError(
            f"none of {samples} answers to {rows} prompts is correct: raise --samples or --rows, or leave own out of --corpus"
        )
    return found


def measure_influence(
    probe: Probe,
    name: str,
    answers: Sequence[EncodedConversation],
    known: dict[str, list[EncodedConversation]],
    lr: float,
    advance: Callable,
) -> CorpusInfluence:
    """What a step on each answer of a corpus does to all probes, and the other way round for some."""
    v = sum(known.values(), [])
    was, was_u = probe.token_logprobs(v), probe.token_logprobs(answers)
    steep, steep_u = ([float(s.sum()) for s in probe.logit_gradient_norms(x)] for x in (v, answers))
    after = lambda x, old, rows: [
        (now - b) / lr
        for now, b in zip(
            probe.token_logprobs(rows, step_on_response(probe, x, lr)), old, strict=True
        )
    ]
    ends, there, pulls = np.cumsum([0, *map(len, known.values())]).tolist(), [], []
    for u, encoded in enumerate(answers):
        moved = after(encoded, was, v)  # of each probe's tokens
        there.append([float(m.sum()) for m in moved])
        change = {
            task: float(np.mean([m.mean() for m in moved[a:b]]))
            for task, a, b in zip(known, ends, ends[1:], strict=False)
        }
        kernel = np.mean(
            [
                np.square(m).sum() / max(s * steep_u[u], 1e-30)
                for m, s in zip(moved, steep, strict=True)
            ]
        )
        pulls.append(
            ResponseInfluence(
                len(was_u[u]), float(-was_u[u].mean()), steep_u[u], change, float(kernel)
            )
        )
        advance()
    places, back = np.linspace(0, len(v) - 1, min(ASYMMETRY_PAIRS, len(v))).astype(int), []
    for place in places:
        back.append([float(m.sum()) for m in after(v[place], was_u, answers)])
        advance()
    return CorpusInfluence(name, pulls, asymmetry(np.array(there)[:, places].T, np.array(back)))


def asymmetry(there: np.ndarray, back: np.ndarray) -> float:
    return float(np.abs(there - back).mean() / max(np.abs([there, back]).mean(), 1e-30))


def step_on_response(probe: Probe, encoded: EncodedConversation, lr: float) -> Any:
    """The trained weights after one step of plain gradient descent on an answer."""
    return _descend(probe.trained, probe.gradient(encoded), np.float32(lr))


@jax.jit
def _descend(trained: Any, gradient: Any, lr: jax.Array) -> Any:
    return jax.tree.map(lambda p, g: p - (lr * g).astype(p.dtype), trained, gradient)


def influence_finding(
    stage: str, names: Sequence[str], lr: float, found: Sequence[CorpusInfluence]
) -> Finding:
    header = ("answers", "n", "tokens", "perplexity", "kernel", "asymmetry", "all", *names)
    table = FindingTable(
        "Change of the log-probability of gold answers, per token and unit of learning rate",
        header,
        [influence_row(c, names) for c in found],
    )
    said = [
        f"One step on {c.name} answers of {stage} (perplexity {c.perplexity:.3g}) moves a token of the other tasks' gold answers by "
        f"{c.mean(lambda p: p.all):+.3g} nats per unit of learning rate; kernel {c.mean(lambda p: p.kernel):.3g}."
        for c in found
    ]
    direction = influence_chart(
        found, lambda p: p.all, "change of log p, per token and lr", include=(0,)
    )
    magnitude = influence_chart(
        found, lambda p: float(np.log10(max(p.kernel, 1e-30))), "log10 of the kernel's lower bound"
    )
    pictures = [
        FindingChart(
            "Direction", "Below 0, a step makes the other tasks' answers less likely.", direction
        ),
        FindingChart(
            "Magnitude",
            "Higher: the same error in the logits moves the other tasks more.",
            magnitude,
        ),
    ]
    numbers = {
        "stage": stage,
        "lr": lr,
        "corpora": [dataclasses.asdict(c) | {"perplexity": c.perplexity} for c in found],
    }
    return Finding(f"Influence of learning {stage}", said, [table], pictures, numbers)


def influence_row(c: CorpusInfluence, names: Sequence[str]) -> tuple[str, ...]:
    changes = (c.mean(lambda p: p.all), *(c.mean(lambda p, n=n: p.change[n]) for n in names))
    size = f"{c.mean(lambda p: p.tokens):.1f}"
    kernel = f"{c.mean(lambda p: p.kernel):.3g}"
    return (
        c.name,
        str(len(c.pulls)),
        size,
        f"{c.perplexity:.3g}",
        kernel,
        f"{c.asymmetry:.2f}",
        *(f"{x:+.3g}" for x in changes),
    )


def influence_chart(
    found: Sequence[CorpusInfluence],
    y: Callable[[ResponseInfluence], float],
    y_label: str,
    **more: Any,
) -> Markup | None:
    """One dot an answer, by how unlikely it was."""
    series = [
        Series(
            c.name,
            sorted((Point(p.nats, y(p)) for p in c.pulls), key=lambda p: p.x),
            k,
            line=False,
            named=True,
        )
        for k, c in enumerate(found)
    ]
    return svg.line_chart(
        series, y_label, "-log p of the learned answer, per token", y_label, **more
    )
