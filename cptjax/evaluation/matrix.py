"""The accuracy matrix R and the forgetting metrics computed from it.

R[i, j] is the score on task j after stage i; row 0 is the base model. With A[s] the tasks that
stage s trains:

    S         the last stage whose row is complete (so far, in a running or crashed run)
    first(j)  the first stage with j in A[s]
    last(j)   the last such stage up to S; R[last(j), j] is the "diagonal" of j
    old       tasks with last(j) < S; only these can be forgotten (T-1 tasks in a plain sequence)
    general   evaluated tasks that no stage trains; a config may name groups of them

Only evaluated tasks count: a trained task that `eval` does not name has no column. The forgetting
of a task that two stages train is measured from the second of them. A joint stage puts several
tasks on the diagonal, and a joint run (one stage) has no old tasks and no forgetting.

MCITlib (arXiv 2508.07307) and MRCL (2607.04364) report four means of a plain sequence of T tasks:

    MFT = 1/T sum_i R[i,i]                        mean finetune accuracy
    MFN = 1/T sum_j R[T,j]                        mean final accuracy
    MAA = 1/T sum_i 1/i sum_{j<=i} R[i,j]         mean average accuracy
    BWT = 1/(T-1) sum_{j<T} (R[T,j] - R[j,j])     backward transfer

Forward transfer (Lopez-Paz and Ranzato, 1706.08840) is FWT = 1/(T-1) sum_{j>1} (R[j-1,j] - R[0,j]).
Plasticity compares with a model that trains stage j from the base model and scores F[j]:
1/(T-1) sum_{j>1} (R[j,j] - F[j]); the first stage starts from the base model in any case.

Each metric is a mean of small weighted sums of cells. A sum with an unmeasured cell is left out,
and `terms` is the number of sums in the mean. The standard error is computed from those of the
cells as if they were independent (each stage is tested on the same items, so the true error of a
difference is slightly smaller). Scores and differences are fractions of 1; reports show points.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Formula(NamedTuple):
    text: str
    better: str  # higher | lower


FORMULAS = {
    "avg_acc": Formula("mean over tasks of R[S,j]", "higher"),
    "base_acc": Formula("mean over tasks of R[0,j]", "higher"),
    "learned_acc": Formula("mean over trained tasks of R[last(j),j]", "higher"),
    "learned_gain": Formula(
        "mean over trained tasks of R[last(j),j] - R[0,j]; what the stages improved, kept or not",
        "higher",
    ),
    "fm_peak": Formula(
        "mean over old tasks of R[S,j] - max(1<=i<=S) R[i,j]; never above 0, "
        "negative = forgetting (paper A)",
        "higher",
    ),
    "fm_peak_all": Formula(
        "fm_peak with all trained tasks in the mean (divisor T, not T-1); none without an old task",
        "higher",
    ),
    "fm_diagonal": Formula(
        "mean over old tasks of R[S,j] - R[last(j),j]; negative = forgetting", "higher"
    ),
    "mft": Formula(
        "mean finetune accuracy (MCITlib, MRCL), the same as learned_acc: "
        "mean over trained tasks of R[last(j),j]",
        "higher",
    ),
    "mfn": Formula(
        "mean final accuracy (MCITlib, MRCL): mean over trained tasks of R[S,j]", "higher"
    ),
    "bwt": Formula(
        "backward transfer (MCITlib, MRCL), the same as fm_diagonal: mean over old tasks of "
        "R[S,j] - R[last(j),j]",
        "higher",
    ),
    "fm_peak_own": Formula(
        "mean over old tasks of R[S,j] - max(first(j)<=i<=S) R[i,j]; fm_peak without the stages "
        "before the task's own, whose scores are zero-shot",
        "higher",
    ),
    "forgetting": Formula(
        "mean over old tasks of max(1<=i<S) R[i,j] - R[S,j]; positive = forgetting (Chaudhry)",
        "lower",
    ),
    "fwt": Formula(
        "forward transfer (Lopez-Paz and Ranzato): mean over tasks with first(j) > 1 of "
        "R[first(j)-1,j] - R[0,j]; reference = base zero-shot",
        "higher",
    ),
    "plasticity": Formula(
        "mean over tasks with last(j) > 1 of R[last(j),j] - F[j], F[j] = the score after the same "
        "stage from the base model; negative = learned less than a fresh model",
        "higher",
    ),
    "maa": Formula(
        "mean average accuracy (MCITlib, MRCL): mean over stages 1..S of the mean over tasks "
        "trained so far of R[i,j]",
        "higher",
    ),
    "intransigence": Formula(
        "mean over trained tasks of joint[j] - R[last(j),j]; "
        "positive = learned less than joint training",
        "lower",
    ),
    "gain": Formula("mean over trained tasks of R[S,j] - R[0,j] (paper C)", "higher"),
    "general_delta": Formula("mean over general tasks of R[S,j] - R[0,j]", "higher"),
    "drop": Formula(
        "mean over general tasks of R[0,j] - R[S,j]; "
        "positive = forgetting (paper C's non-target tasks)",
        "lower",
    ),
    "fm_forced": Formula(
        "fm_diagonal of responses after the forced prefix: forgetting that is not format", "higher"
    ),
    "general_delta_forced": Formula(
        "general_delta of responses after the forced prefix: change that is not format", "higher"
    ),
    "fm_gold": Formula(
        "fm_diagonal of the gold answers' probabilities after the forced prefix: forgetting that "
        "is neither format nor decoding",
        "higher",
    ),
    "general_delta_gold": Formula(
        "general_delta of the gold answers' probabilities after the forced prefix: change that is "
        "neither format nor decoding",
        "higher",
    ),
    "kl_new": Formula(
        "mean over tasks of stage S of KL(base || current) per token on their prompts", "lower"
    ),
    "kl_old": Formula(
        "mean over old and general tasks of KL(base || current) per token on their prompts", "lower"
    ),
    "kl_new_sequence": Formula("kl_new summed over each response, not per token", "lower"),
    "kl_old_sequence": Formula("kl_old summed over each response, not per token", "lower"),
}
FORMAT_SHARE = Formula(
    "1 - forced-prefix loss / loss, each the mean over old and general tasks; "
    "not computed if loss < 2 points",
    "",
)


class Cell(NamedTuple):
    value: float
    stderr: float = math.nan
    n: int = 0


# By (row, task); the row of a joint run is "joint", that of models of a single stage "fresh".
Cells = dict[tuple[int | str, str], Cell]
CellWeights = dict[tuple[int | str, str], float]
NO_CELL = Cell(math.nan)


@dataclasses.dataclass(frozen=True)
class AccuracyTable:
    """All evaluations of one run: the tasks that each stage trains, and the measured cells."""

    stages: tuple[tuple[str, ...], ...]
    cells: Cells
    forced: Cells = dataclasses.field(default_factory=dict)
    gold: Cells = dataclasses.field(default_factory=dict)  # probabilities of the gold answers
    base_kl: Cells = dataclasses.field(default_factory=dict)  # per token
    base_kl_sequence: Cells = dataclasses.field(default_factory=dict)  # per response
    # (stage, step, task, accuracy) within stages, on a fixed choice of few rows
    within_stage: tuple[tuple[int, int, str, float], ...] = ()
    evaluated: tuple[str, ...] | None = None  # tasks that the config evaluates; None = all
    # groups of general tasks, by their names in the config
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @functools.cached_property  # a report asks for it a hundred thousand times
    def tasks(self) -> tuple[str, ...]:
        trained = dict.fromkeys(task for stage in self.stages for task in stage)
        return tuple(task for task in trained if self.evaluated is None or task in self.evaluated)

    @property
    def general(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for _, task in self.cells if task not in self.tasks))

    @property
    def final(self) -> int:
        """S: the last complete row, or the last row with a cell if no row is complete."""
        rows = [
            i
            for i in range(1, len(self.stages) + 1)
            if any((i, t) in self.cells for t in self.tasks)
        ]
        whole = [i for i in rows if all((i, t) in self.cells for t in self.tasks)]
        return (whole or rows or [0])[-1]

    @property
    def finished(self) -> bool:
        return bool(self.stages) and self.final == len(self.stages) and not self.missing(base=False)

    def missing(self, base: bool = True) -> list[tuple[int, str]]:
        """List the cells of the whole schedule that have no value."""
        return [
            (i, t)
            for i in range(0 if base else 1, len(self.stages) + 1)
            for t in self.tasks
            if (i, t) not in self.cells
        ]

    def first(self, task: str) -> int:
        return next((i for i, stage in enumerate(self.stages, 1) if task in stage), 0)

    def last(self, task: str) -> int:
        return max(
            (i for i, stage in enumerate(self.stages[: self.final], 1) if task in stage), default=0
        )

    def trained(self) -> list[str]:
        return [t for t in self.tasks if self.last(t)]

    def old(self) -> list[str]:
        return [t for t in self.trained() if self.last(t) < self.final]

    def peak(self, task: str, upto: int, since: int = 1) -> int:
        """Return the earliest stage in since..upto at which the task scored best.

        It is one without a score if there is any, as that may be the peak.
        """
        best = Cell(math.inf)
        rows = range(since, upto + 1)
        return max(rows, key=lambda i: self.cells.get((i, task), best).value, default=self.final)

    def array(self) -> np.ndarray:
        """Return R, [stages + 1, tasks], NaN in unmeasured cells."""
        return np.array(
            [
                [self.cells.get((i, t), NO_CELL).value for t in self.tasks]
                for i in range(len(self.stages) + 1)
            ]
        )


def add_cell_weights(*terms: tuple[float, int | str, str]) -> CellWeights:
    """Sum terms of (weight, row, task) by cell."""
    total: CellWeights = {}
    for weight, row, task in terms:
        total[row, task] = total.get((row, task), 0.0) + weight
    return total


def mean_of_sums(sums: Sequence[CellWeights], cells: Mapping) -> dict[str, Any]:
    """Average the sums whose cells are all known.

    Return the value, its standard error, its 95 % interval, and the number of sums.
    """
    known = [s for s in sums if all(key in cells for key in s)]
    weights = add_cell_weights(*((w / len(known), *key) for s in known for key, w in s.items()))
    if not known:
        return {"value": None, "stderr": None, "ci95": None, "terms": 0}
    value = math.fsum(w * cells[key].value for key, w in weights.items())
    # A weight of 0 (if the peak is the last row) also removes its cell from the error.
    error = math.sqrt(math.fsum((w * cells[key].stderr) ** 2 for key, w in weights.items() if w))
    error = error if math.isfinite(error) else None
    interval = None if error is None else [value - 1.96 * error, value + 1.96 * error]
    return {"value": value, "stderr": error, "ci95": interval, "terms": len(known)}


def formula_sums(t: AccuracyTable) -> dict[str, list[CellWeights]]:
    """Express each metric of FORMULAS as weighted sums of cells."""
    S, old, trained = t.final, t.old(), t.trained()
    seen = {
        i: [j for j in t.tasks if 1 <= t.first(j) <= i and (i, j) in t.cells]
        for i in range(1, S + 1)
    }

    def since_base(tasks: Iterable[str]) -> list[CellWeights]:
        return [add_cell_weights((1, S, j), (-1, 0, j)) for j in tasks if S]

    def to_peak(j: str, since: int = 1) -> CellWeights:
        return add_cell_weights((1, S, j), (-1, t.peak(j, S, since), j))

    to_diagonal = [add_cell_weights((1, S, j), (-1, t.last(j), j)) for j in old]
    return {
        "avg_acc": [add_cell_weights((1, S, j)) for j in t.tasks if S],
        "base_acc": [add_cell_weights((1, 0, j)) for j in t.tasks],
        "learned_acc": [add_cell_weights((1, t.last(j), j)) for j in trained],
        "learned_gain": [add_cell_weights((1, t.last(j), j), (-1, 0, j)) for j in trained],
        "fm_peak": [to_peak(j) for j in old],
        "fm_peak_all": [to_peak(j) for j in trained if old],
        "fm_peak_own": [to_peak(j, t.first(j)) for j in old],
        "fm_diagonal": to_diagonal,
        "mft": [add_cell_weights((1, t.last(j), j)) for j in trained],
        "mfn": [add_cell_weights((1, S, j)) for j in trained],
        "bwt": to_diagonal,
        "forgetting": [add_cell_weights((1, t.peak(j, S - 1), j), (-1, S, j)) for j in old],
        "fwt": [
            add_cell_weights((1, t.first(j) - 1, j), (-1, 0, j))
            for j in t.tasks
            if 1 < t.first(j) <= S + 1
        ],
        "plasticity": [
            add_cell_weights((1, t.last(j), j), (-1, "fresh", j)) for j in trained if t.last(j) > 1
        ],
        "maa": [
            add_cell_weights(*((1 / len(js), i, j) for j in js)) for i, js in seen.items() if js
        ],
        "intransigence": [add_cell_weights((1, "joint", j), (-1, t.last(j), j)) for j in trained],
        "gain": since_base(trained),
        "general_delta": since_base(t.general),
        "drop": [{key: -w for key, w in s.items()} for s in since_base(t.general)],
        **{name: since_base(tasks) for name, tasks in t.groups.items()},
    }


def formulas_of_table(t: AccuracyTable) -> dict[str, Formula]:
    """Return FORMULAS, and three more for each group of general tasks."""
    formulas = dict(FORMULAS)
    for name, tasks in t.groups.items():
        formulas[name] = Formula(f"mean over {', '.join(tasks)} of R[S,j] - R[0,j]", "higher")
        formulas[f"{name}_forced"] = Formula(
            f"{name} of responses after the forced prefix: change that is not format", "higher"
        )
        formulas[f"{name}_gold"] = Formula(
            f"{name} of the gold answers' probabilities after the forced prefix", "higher"
        )
    return formulas


def forgetting_metrics(
    t: AccuracyTable, joint: AccuracyTable | None = None, fresh: Cells | None = None
) -> dict[str, dict[str, Any]]:
    """Compute every metric, with its formula and whether higher or lower is better.

    `joint` is the table of a joint run. `fresh` has the cells ("fresh", task) of models that
    trained only the last stage of the task, from the base model.
    """
    joint_cells: Cells = {}
    if joint and joint.final:
        joint_cells = {("joint", j): c for (i, j), c in joint.cells.items() if i == joint.final}
    sums, cells = formula_sums(t), t.cells | joint_cells | (fresh or {})
    metrics = {name: mean_of_sums(parts, cells) for name, parts in sums.items()}
    for ending, cells in (("forced", t.forced), ("gold", t.gold)):
        metrics[f"fm_{ending}"] = mean_of_sums(sums["fm_diagonal"], cells)
        for name in ("general_delta", *t.groups):
            metrics[f"{name}_{ending}"] = mean_of_sums(sums[name], cells)
    new = t.stages[t.final - 1] if t.final else ()
    old = [*t.old(), *t.general]
    for group, tasks in (("new", new), ("old", old)):
        final = [add_cell_weights((1, t.final, j)) for j in tasks]
        metrics[f"kl_{group}"] = mean_of_sums(final, t.base_kl)
        metrics[f"kl_{group}_sequence"] = mean_of_sums(final, t.base_kl_sequence)
    return {
        name: {**metrics[name], "formula": f.text, "better": f.better}
        for name, f in formulas_of_table(t).items()
    }


def measure_format_share(t: AccuracyTable) -> dict[str, Any]:
    """Measure the share of the loss on old and general tasks that a forced prefix removes."""
    formula = {"formula": FORMAT_SHARE.text, "better": FORMAT_SHARE.better}
    pairs = [(t.last(j), j) for j in t.old()] + [(0, j) for j in t.general]
    pairs = [
        (i, j)
        for i, j in pairs
        if all(key in cells for key in ((i, j), (t.final, j)) for cells in (t.cells, t.forced))
    ]
    if not pairs or not t.final:
        return {"value": None, "loss": None, "loss_forced": None, "terms": 0, **formula}
    loss, forced = (
        float(np.mean([c[i, j].value - c[t.final, j].value for i, j in pairs]))
        for c in (t.cells, t.forced)
    )
    share = float(np.clip(1 - forced / loss, 0, 1)) if loss >= 0.02 else None
    return {"value": share, "loss": loss, "loss_forced": forced, "terms": len(pairs), **formula}


def per_stage_metrics(t: AccuracyTable) -> list[dict[str, Any]]:
    """Compute the metrics of each stage.

    The gain on its tasks and the drop on all others are measured from the stage's start (paper C),
    the loss from the stage that last trained each task before.
    """

    def mean(sums: Sequence[CellWeights], cells: Cells) -> float | None:
        return mean_of_sums(sums, cells)["value"]

    rows = []
    for s, tasks in enumerate(t.stages, 1):
        others = [j for j in (*t.tasks, *t.general) if j not in tasks]
        learned = {
            j: max((i for i, trained in enumerate(t.stages[: s - 1], 1) if j in trained), default=0)
            for j in others
        }
        known = [j for j in others if learned[j] or j in t.general]
        gain = [add_cell_weights((1, s, j), (-1, s - 1, j)) for j in tasks]
        after = {"new": tasks, "old": known}
        drop = [add_cell_weights((1, s - 1, j), (-1, s, j)) for j in others]
        loss = [add_cell_weights((1, learned[j], j), (-1, s, j)) for j in known]
        rows.append(
            {
                "stage": s,
                "tasks": list(tasks),
                "gain": mean(gain, t.cells),
                "drop": mean(drop, t.cells),
                "loss": mean(loss, t.cells),
                **{
                    f"kl_{group}{unit}": mean([add_cell_weights((1, s, j)) for j in js], cells)
                    for unit, cells in (("", t.base_kl), ("_sequence", t.base_kl_sequence))
                    for group, js in after.items()
                },
            }
        )
    return rows
