"""Measure what training on one response does to other tasks, by the corpus of the response.

    influence of u on v     d(v | u) = change of log p(v) in one step of gradient descent on
                            -log p(u), per unit of learning rate
    to first order          d(v | u) = grad log p(v) . grad log p(u), so d(v | u) = d(u | v)

    kernel (lower bound)    sum_t d(v_t | u)^2 / (sum_t |a(v_t)|^2  sum_s |a(u_s)|^2)
                            with a(y) = d log p(y) / d logits

"Why RFT preserves prior knowledge" explains the forgetting of SFT on bare answers by a large kernel
(magnitude), and by data that the base model finds unlikely (direction: by the symmetry, data whose
likelihood grows when the model trains on the probes also makes the probes more likely). Asymmetry
is the mean of |d(v | u) - d(u | v)| divided by the mean of |d|. It is near 0 if the step is small
enough to approximate a derivative, and large enough for rounding not to matter.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

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
from cptjax.types import Params

ASYMMETRY_PAIRS = 4  # probes that are also trained on, one at a time


@dataclasses.dataclass(frozen=True)
class ResponseInfluence:
    """One response: its likelihood, and how a training step on it changes the probes."""

    tokens: int
    nats: float  # -log p, per token
    steepness: float  # sum of |a|^2
    change: dict[str, float]  # of log p per token and learning rate, mean over a task's probes
    kernel: float  # mean over the probes

    @property
    def mean_change(self) -> float:
        """The mean change over all tasks, with equal weights."""
        return float(np.mean(list(self.change.values())))


@dataclasses.dataclass(frozen=True)
class CorpusInfluence:
    """The responses of one corpus."""

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
    steps: str = "0",
) -> Finding:
    """Compare the influence of the responses of several corpora on the probes of other tasks.

    `steps` are steps of the stage, "0" its start, "all" those whose weights are saved; the
    responses are the same at all of them.
    """
    if lr <= 0 or min(rows, samples, probes) < 1:
        raise ValueError(
            f"--lr={lr} --rows={rows} --samples={samples} --probes={probes}: "
            "expected numbers above 0"
        )
    with open_probe(folder, stage, others, dtype) as (probe, names):
        chosen = chosen_steps(probe, steps)  # before anything is sampled
        known = {name: probe.gold_test_responses(name, probes) for name in names}
        corpora = {
            name: corpus_responses(probe, name, rows, samples) for name in corpus.split(",") if name
        }
        pairs = min(ASYMMETRY_PAIRS, sum(map(len, known.values())))
        total = sum(len(responses) + pairs for responses in corpora.values()) * len(chosen)
        by_step: dict[int, list[CorpusInfluence]] = {}
        with console.progress_bar("one step on each response", total) as bar:
            for step in chosen:
                probe_then = probe.at_step(step)
                by_step[step] = [
                    measure_influence(probe_then, name, responses, known, lr, bar.advance)
                    for name, responses in corpora.items()
                ]
    finding = influence_finding(probe.stage.name, names, lr, by_step[chosen[0]])
    return add_steps(finding, by_step) if len(chosen) > 1 else finding


def chosen_steps(probe: Probe, steps: str) -> list[int]:
    """Return the steps that the flag names, in order."""
    if steps == "all":
        return probe.saved_steps()
    words = [word for word in steps.split(",") if word]
    if not words or not all(word.isdigit() for word in words):
        raise ValueError(f"--steps={steps!r}: expected all, or numbers of steps such as 0,100")
    return sorted({int(word) for word in words})


def corpus_responses(probe: Probe, name: str, rows: int, samples: int) -> list[EncodedConversation]:
    """Return the responses of a corpus to train on, one per prompt."""
    if name == "gold":
        items = probe.encode_prompts(probe.training_rows(rows))
        return [probe.with_gold_response(item) for item in items]
    if name == "own":
        return own_correct_responses(probe, rows, samples)
    return responses_of_file(probe, name, rows)


def responses_of_file(probe: Probe, name: str, rows: int) -> list[EncodedConversation]:
    """Return correct responses of a rollouts file to prompts of the stage."""
    path, stage = Path(name), probe.stage
    if not path.is_file():
        raise ValueError(
            f"--corpus names {name!r}; expected gold, own, or the path of a rollouts/*.jsonl"
        )
    lines = [
        line
        for line in files.read_jsonl(path)
        if line.get("task") in stage.tasks and rewards.is_correct(line.get("rewards") or {})
    ]
    if not lines:
        raise ValueError(
            f"{path} has no correct response to a task of stage {stage.number} "
            f"({', '.join(stage.tasks)})"
        )
    for line in lines:
        has_keys = line.keys() >= {"id", "row", "response"}
        if not has_keys or line["row"] not in range(len(probe.train_examples(line["task"]))):
            shown = {key: line.get(key) for key in ("task", "id", "row")}
            raise ValueError(
                f"{path}: expected lines with id, response and a row of this run's data; "
                f"got {shown}"
            )
    order = permutation(len(lines), (probe.run.config.seed, 30_001))[:rows].tolist()
    chosen = [lines[i] for i in order]
    items = probe.encode_prompts([(line["task"], line["row"]) for line in chosen])
    for line, item in zip(chosen, items, strict=True):
        if item.example.id != line["id"]:
            raise ValueError(
                f"{path}: {line['id']!r} is another row in this run's data; "
                "expected rollouts over the same training rows"
            )
    return [
        probe.with_response(item, line["response"])
        for item, line in zip(items, chosen, strict=True)
    ]


def own_correct_responses(probe: Probe, rows: int, samples: int) -> list[EncodedConversation]:
    """Sample responses and return the first correct one to each prompt that has one."""
    responses = []
    items = probe.encode_prompts(probe.training_rows(rows))
    for graded in probe.sample_graded(items, samples):
        for q, item in enumerate(graded.items):
            for r in range(q * samples, (q + 1) * samples):
                if rewards.is_correct(graded.reward_parts[r]) and graded.samples.finished[r]:
                    responses.append(probe.with_response(item, graded.samples.texts[r]))
                    break
    if not responses:
        raise ValueError(
            f"none of {samples} responses to {rows} prompts is correct: raise --samples or --rows, "
            "or leave own out of --corpus"
        )
    return responses


def measure_influence(
    probe: Probe,
    name: str,
    responses: Sequence[EncodedConversation],
    known: dict[str, list[EncodedConversation]],
    lr: float,
    advance: Callable[[], None],
) -> CorpusInfluence:
    """Measure how a step on each response of a corpus changes all probes.

    For some probes, also measure how a step on the probe changes the responses.
    """
    probes = [encoded for of_task in known.values() for encoded in of_task]
    probe_logps, response_logps = probe.token_logprobs(probes), probe.token_logprobs(responses)
    probe_norms, response_norms = (
        [float(norms.sum()) for norms in probe.logit_gradient_norms(x)] for x in (probes, responses)
    )

    def changes(
        trained_on: EncodedConversation,
        before: Sequence[np.ndarray],
        encoded: Sequence[EncodedConversation],
    ) -> list[np.ndarray]:
        """Compute the change of each token's log-probability per unit of learning rate."""
        stepped = _descend(probe.trained, probe.gradient(trained_on), np.float32(lr))
        after = probe.token_logprobs(encoded, stepped)
        return [(a - b) / lr for a, b in zip(after, before, strict=True)]

    ends = np.cumsum([0, *map(len, known.values())]).tolist()
    forward, pulls = [], []
    for u, encoded in enumerate(responses):
        moved = changes(encoded, probe_logps, probes)
        forward.append([float(m.sum()) for m in moved])
        change = {
            task: float(np.mean([m.mean() for m in moved[start:end]]))
            for task, start, end in zip(known, ends, ends[1:], strict=False)
        }
        kernels = [
            np.square(m).sum() / max(norm * response_norms[u], 1e-30)
            for m, norm in zip(moved, probe_norms, strict=True)
        ]
        logps = response_logps[u]
        pulls.append(
            ResponseInfluence(
                len(logps),
                float(-logps.mean()),
                response_norms[u],
                change,
                float(np.mean(kernels)),
            )
        )
        advance()
    chosen = np.linspace(0, len(probes) - 1, min(ASYMMETRY_PAIRS, len(probes))).astype(int)
    reverse = []
    for v in chosen:
        moved = changes(probes[v], response_logps, responses)
        reverse.append([float(m.sum()) for m in moved])
        advance()
    return CorpusInfluence(
        name, pulls, asymmetry(np.array(forward)[:, chosen].T, np.array(reverse))
    )


def asymmetry(forward: np.ndarray, reverse: np.ndarray) -> float:
    size = max(np.abs([forward, reverse]).mean(), 1e-30)
    return float(np.abs(forward - reverse).mean() / size)


@jax.jit
def _descend(trained: Params, gradient: Params, lr: jax.Array) -> Params:
    """Take one step of plain gradient descent."""
    return jax.tree.map(lambda p, g: p - (lr * g).astype(p.dtype), trained, gradient)


def influence_finding(
    stage: str, names: Sequence[str], lr: float, corpora: Sequence[CorpusInfluence]
) -> Finding:
    header = ("responses", "n", "tokens", "perplexity", "kernel", "asymmetry", "all", *names)
    table = FindingTable(
        "Change of the log-probability of gold responses, per token and unit of learning rate",
        header,
        [influence_row(corpus, names) for corpus in corpora],
    )
    sentences = [
        f"One step on {c.name} responses of {stage} (perplexity {c.perplexity:.3g}) changes a "
        "token of the other tasks' gold responses by "
        f"{c.mean(lambda p: p.mean_change):+.3g} nats per unit of learning rate; "
        f"kernel {c.mean(lambda p: p.kernel):.3g}."
        for c in corpora
    ]
    direction = influence_chart(
        corpora, lambda p: p.mean_change, "change of log p, per token and lr", include=(0,)
    )
    magnitude = influence_chart(
        corpora,
        lambda p: float(np.log10(max(p.kernel, 1e-30))),
        "log10 of the kernel's lower bound",
    )
    charts = [
        FindingChart(
            "Direction",
            "Below 0, a step makes the other tasks' gold responses less likely.",
            direction,
        ),
        FindingChart(
            "Magnitude",
            "Higher: the same error in the logits changes the other tasks more.",
            magnitude,
        ),
    ]
    numbers = {
        "stage": stage,
        "lr": lr,
        "corpora": [dataclasses.asdict(c) | {"perplexity": c.perplexity} for c in corpora],
    }
    return Finding(f"Influence of training on {stage}", sentences, [table], charts, numbers)


def add_steps(finding: Finding, by_step: dict[int, list[CorpusInfluence]]) -> Finding:
    """Add how perplexity, kernel and change of each corpus develop along the stage."""
    values = {
        "perplexity": lambda c: c.perplexity,
        "kernel": lambda c: c.mean(lambda p: p.kernel),
        "change": lambda c: c.mean(lambda p: p.mean_change),
    }
    rows = [
        (str(step), corpus.name, *(f"{value(corpus):.3g}" for value in values.values()))
        for step, corpora in by_step.items()
        for corpus in corpora
    ]
    table = FindingTable(
        "Along the stage, on the same responses", ("step", "responses", *values), rows
    )
    numbers = {
        str(step): {c.name: {name: value(c) for name, value in values.items()} for c in corpora}
        for step, corpora in by_step.items()
    }
    charts = [
        FindingChart(
            f"{title} along the stage",
            note,
            steps_chart(by_step, value, f"{title.lower()}, mean over the responses"),
        )
        for title, note, value in (
            ("Change", "Below 0, a step at this point harms the other tasks.", values["change"]),
            (
                "Kernel",
                "Its logarithm to base 10; the paper reports that it settles within a few dozen "
                "steps.",
                lambda c: float(np.log10(max(values["kernel"](c), 1e-30))),
            ),
        )
    ]
    return dataclasses.replace(
        finding,
        tables=[*finding.tables, table],
        charts=[*finding.charts, *charts],
        numbers=finding.numbers | {"steps": numbers},
    )


def steps_chart(
    by_step: dict[int, list[CorpusInfluence]],
    value: Callable[[CorpusInfluence], float],
    y_label: str,
) -> Markup | None:
    series = []
    for k, corpora in enumerate(zip(*by_step.values(), strict=True)):
        points = [Point(step, value(c)) for step, c in zip(by_step, corpora, strict=True)]
        series.append(Series(corpora[0].name, points, k, named=True))
    return svg.line_chart(series, y_label, "step of the stage", y_label)


def influence_row(corpus: CorpusInfluence, names: Sequence[str]) -> tuple[str, ...]:
    changes = [corpus.mean(lambda p: p.mean_change)]
    changes += [corpus.mean(lambda p, name=name: p.change[name]) for name in names]
    return (
        corpus.name,
        str(len(corpus.pulls)),
        f"{corpus.mean(lambda p: p.tokens):.1f}",
        f"{corpus.perplexity:.3g}",
        f"{corpus.mean(lambda p: p.kernel):.3g}",
        f"{corpus.asymmetry:.2f}",
        *(f"{change:+.3g}" for change in changes),
    )


def influence_chart(
    corpora: Sequence[CorpusInfluence],
    y: Callable[[ResponseInfluence], float],
    y_label: str,
    include: Sequence[float] = (),
) -> Markup | None:
    """Plot one dot per response against its negative log-likelihood."""
    series = []
    for k, corpus in enumerate(corpora):
        points = sorted((Point(p.nats, y(p)) for p in corpus.pulls), key=lambda point: point.x)
        series.append(Series(corpus.name, points, k, line=False, named=True))
    x_label = "-log p of the response trained on, per token"
    return svg.line_chart(series, y_label, x_label, y_label, include=include)
