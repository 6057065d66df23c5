"""Summarise scored responses: each metric with its number of rows and its standard error."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cptjax.tasks.scoring import (
    captions,
    choice,
    instructions,
    judged,
    puzzles,
    retain_answers,
    text,
)

MME_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)


class Metric(NamedTuple):
    """The value of a metric over n rows; the standard error of a single row is unknown (NaN)."""

    value: float
    n: int
    stderr: float


Records = Sequence[Any]  # of scorers.ScoreRecord, which imports this module
Summary = Callable[[Records], dict[str, Metric]]


def ratio_metric(parts: Sequence[float], wholes: Sequence[float]) -> Metric:
    """Divide the sum of the parts by the sum of the wholes, over rows with a whole > 0.

    The standard error is computed by the delta method.
    """
    a, b = np.asarray(parts, float), np.asarray(wholes, float)
    a, b = a[b > 0], b[b > 0]
    n = len(b)
    if not n:
        return Metric(0.0, 0, math.nan)
    value = float(a.sum() / b.sum())
    error = math.sqrt(n) * np.std(a - value * b, ddof=1) / b.sum() if n > 1 else math.nan
    return Metric(value, n, float(error))


def mean_metric(values: Sequence[float]) -> Metric:
    """Compute a plain mean with its standard error."""
    return ratio_metric(values, np.ones(len(values)))


def group_scores(name: Callable[[Any], str], records: Records) -> dict[str, list[float]]:
    """Return the scores of each group of rows, groups in alphabetical order."""
    groups = defaultdict(list)
    for record in records:
        groups[name(record)].append(record.score)
    return {key: groups[key] for key in sorted(groups)}


def group_means(name: Callable[[Any], str], prefix: str, records: Records) -> dict[str, Metric]:
    """Compute the mean score of each group of rows."""
    groups = group_scores(name, records)
    return {f"{prefix}/{key}": mean_metric(scores) for key, scores in groups.items()}


def binary_metrics(predicted: Sequence[str | None], records: Records) -> dict[str, Metric]:
    """Compute precision, recall and F1 of "yes", and the share of predicted "yes"."""
    yes = np.array([p == "yes" for p in predicted], int)
    gold = np.array([text.gold_yes_no(r.answer) == "yes" for r in records], int)
    return {
        "precision": ratio_metric(yes * gold, yes),
        "recall": ratio_metric(yes * gold, gold),
        "f1": ratio_metric(2 * yes * gold, yes + gold),
        "yes_ratio": mean_metric(yes),
    }


def summarise_yes_no(records: Records) -> dict[str, Metric]:
    """Compute the metrics of yes/no rows, and the share of predictions with neither."""
    predicted = [text.parse_yes_no(r.prediction or "") for r in records]
    neither = mean_metric([p is None for p in predicted])
    return binary_metrics(predicted, records) | {"neither": neither}


def summarise_pope(records: Records) -> dict[str, Metric]:
    """Compute POPE's metrics by LLaVA's rule, and the accuracy of each kind of question."""
    predicted = [None if r.prediction is None else text.parse_pope(r.prediction) for r in records]
    return binary_metrics(predicted, records) | group_means(row_category, "category", records)


def row_category(record: Any) -> str:
    return str(record.meta.get("category", "other"))


def summarise_mme(records: Records) -> dict[str, Metric]:
    """Compute MME's scores of perception (at most 2,000 points), cognition (800) and their sum.

    A category scores 100 x (accuracy + share of images with both questions right). Images with one
    question among the records count in neither.
    """
    images = defaultdict(list)
    for record in records:
        images[row_category(record), record.meta.get("question_id", record.id)].append(record.score)
    points = defaultdict(list)
    for (category, _), scores in images.items():
        if len(scores) == 2:
            points[category].append(100 * (sum(scores) / 2 + (sum(scores) == 2)))
    cognition = [c for c in points if c in MME_COGNITION]
    perception = [c for c in points if c not in MME_COGNITION]
    sums = {"perception": perception, "cognition": cognition, "total": [*perception, *cognition]}
    metrics = {name: _sum_metric([points[c] for c in of]) for name, of in sums.items()}
    return metrics | {f"category/{c}": mean_metric(points[c]) for c in sorted(points)}


def _sum_metric(groups: Sequence[Sequence[float]]) -> Metric:
    """Return the sum of the means of groups."""
    means = [mean_metric(group) for group in groups]
    error = math.sqrt(sum(m.stderr**2 for m in means)) if means else math.nan
    return Metric(sum(m.value for m in means), sum(m.n for m in means), error)


def summarise_mmstar(records: Records) -> dict[str, Metric]:
    """Compute the accuracy of each of MMStar's categories, and their mean, its official score."""
    total = _sum_metric(list(group_scores(row_category, records).values()))
    categories = group_means(row_category, "category", records)
    count = max(1, len(categories))
    average = Metric(total.value / count, total.n, total.stderr / count)
    return {"average": average} | categories


def summarise_pathvqa(records: Records) -> dict[str, Metric]:
    """Compute the accuracy of yes/no and of open rows, and token recall and F1 of open rows."""
    closed = [r for r in records if text.normalise_text(str(r.answer)) in ("yes", "no")]
    rest = [r for r in records if text.normalise_text(str(r.answer)) not in ("yes", "no")]
    overlap = [text.token_overlap(r.prediction or "", str(r.answer)) for r in rest]
    return {
        "yes_no": mean_metric([r.score for r in closed]),
        "open": mean_metric([r.score for r in rest]),
        "open_recall": mean_metric([recall for recall, _ in overlap]),
        "open_f1": mean_metric([f1 for _, f1 in overlap]),
    }


def summarise_mmmu(records: Records) -> dict[str, Metric]:
    """Compute the accuracy by discipline, and the share of choices that could not be read."""
    closed = [r for r in records if r.meta.get("question_type", "multiple-choice") != "open"]
    unread = [
        r.prediction is None
        or choice.parse_mmmu_choice(r.prediction, choice.row_options(r.meta)) is None
        for r in closed
    ]
    return group_means(lambda r: choice.mmmu_discipline(r.meta), "discipline", records) | {
        "unread_choice": mean_metric(unread)
    }


def summarise_mmlu_pro(records: Records) -> dict[str, Metric]:
    unread = [
        r.prediction is None or choice.find_mmlu_pro_letter(r.prediction) is None for r in records
    ]
    return group_means(row_category, "category", records) | {"unread_choice": mean_metric(unread)}


def summarise_overlap(records: Records) -> dict[str, Metric]:
    values = [puzzles.score_iou(r.prediction or "", r.answer) for r in records]
    return {"mean_iou": mean_metric(values), "iou_50": mean_metric([v >= 0.5 for v in values])}


def summarise_jigsaw(records: Records) -> dict[str, Metric]:
    return {
        "hit": mean_metric([puzzles.jigsaw_hit_rate(r.prediction or "", r.answer) for r in records])
    }


def summarise_constraints(records: Records) -> dict[str, Metric]:
    """Compute the share of all constraints that are met, and the loose scores.

    The constraints of one response are correlated, so the rows are responses.
    """
    counts = [len(r.answer) for r in records]
    strict, loose = (
        [[follows(r.prediction or "", c) for c in r.answer] for r in records]
        for follows in (instructions.follows_constraint, instructions.follows_loosely)
    )
    return {
        "instruction_level": ratio_metric([sum(met) for met in strict], counts),
        "loose": mean_metric([all(met) for met in loose]),
        "loose_instruction_level": ratio_metric([sum(met) for met in loose], counts),
    }


def summarise_rlvr(records: Records) -> dict[str, Metric]:
    """Compute the accuracy of each kind of constraint."""
    return group_means(lambda r: str(r.meta.get("constraint_type", "other")), "kind", records)


def summarise_retain_mmlu(records: Records) -> dict[str, Metric]:
    unread = [retain_answers.parse_retain_mmlu(r.prediction or "") is None for r in records]
    return {"unread_choice": mean_metric(unread)}


def summarise_refusals(records: Records) -> dict[str, Metric]:
    """Compute the accuracy on harmful and on benign prompts, and the share of unread verdicts."""
    unread = [judged.read_refusal(r.prediction or "") is None for r in records]
    kinds = group_means(lambda r: "harmful" if r.answer else "benign", "prompt", records)
    return kinds | {"unread_verdict": mean_metric(unread)}


def summarise_captions(records: Records) -> dict[str, Metric]:
    """Compute BLEU-1 to BLEU-4 and CIDEr-D, and the mean of these and ROUGE-L."""
    words = [captions.split_caption(r.prediction or "") for r in records]
    golds = [[captions.split_caption(a) for a in text.gold_answers(r.answer)] for r in records]
    bleu = captions.bleu_scores(words, golds) if records else []
    cider = mean_metric(captions.cider_scores(words, golds) if records else [])
    values = [*bleu, cider.value, mean_metric([r.score for r in records]).value]
    return {
        **{f"bleu_{n}": Metric(b, len(records), math.nan) for n, b in enumerate(bleu, 1)},
        "cider": cider,
        "average": Metric(float(np.mean(values)), len(records), math.nan),
    }


def summarise_likelihood(records: Records) -> dict[str, Metric]:
    """Compute the bits per byte of all answers together."""
    bits = [-float(r.prediction) / math.log(2) for r in records]
    return {"bits_per_byte": ratio_metric(bits, [len(str(r.answer).encode()) for r in records])}


def summarise_scores(records: Records, summary: Summary | None) -> dict[str, Metric]:
    """Compute the mean score, the shares of failed extractions and errors, and more metrics.

    `summary` adds the scorer's own metrics.
    """
    metrics = {
        "accuracy": mean_metric([r.score for r in records]),
        "extraction_failure": mean_metric([r.prediction is None for r in records]),
        "error": mean_metric([bool(r.error) for r in records]),
    }
    for name, metric in (summary(records) if summary else {}).items():
        if metric.n:
            metrics[name] = metric
    return metrics
