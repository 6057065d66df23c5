"""Judge whether the arms of a comparison meet the expectations in `config.expect`.

Only finished runs are judged.

    dict(arm="grpo", metric="text", at_least=-0.03)                in each seed or order; or at_most
    dict(arm="grpo", metric="fm_diagonal", above="sft")            higher than another arm
    dict(arm=("sft", "grpo"), metric="learned_gain", within=0.06)  no two arms differ by more
    dict(arm="sft", metric="text", at_most=-0.25, mean=True)       the mean over seeds

A metric is one of matrix.FORMULAS or a group of config.eval.groups; numbers are fractions of 1.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from ml_collections import ConfigDict

from cptjax.common.runs import expand_arms
from cptjax.evaluation.matrix import FORMULAS
from cptjax.evaluation.report import words
from cptjax.evaluation.report.read import Arm

EXPECT_RELATIONS = ("at_least", "at_most", "above", "within")
ROUNDING_TOLERANCE = 1e-9  # a number that equals its bound up to rounding meets it
MISSED_IN_HEADLINE = 3  # missed expectations that the headline names


def check_expectations(config: ConfigDict) -> None:
    """Refuse groups named like a metric, and names in `expect` and `report` that do not exist."""
    arms = list(expand_arms(config))  # [""] in a config without arms
    endings = ("", "_forced", "_gold")
    groups = [f"{group}{ending}" for group in config.eval.groups for ending in endings]
    if taken := [name for name in groups if name in FORMULAS or groups.count(name) > 1]:
        raise ValueError(
            f"config.eval.groups: {taken[0]} already names a number; choose another name"
        )
    for i, entry in enumerate(config.expect):
        setting = f"config.expect[{i}]"
        relations = [key for key in EXPECT_RELATIONS if key in entry]
        types_fit = all(
            isinstance(entry[key], str if key == "above" else int | float)
            and not isinstance(entry[key], bool)
            for key in relations
        )
        types_fit = types_fit and isinstance(entry.get("mean", True), bool)
        types_fit = types_fit and isinstance(entry.get("metric"), str)
        types_fit = types_fit and all(isinstance(arm, str) for arm in _listed(entry.get("arm")))
        keys_fit = set(entry) - {"mean"} == {"arm", "metric", *relations}
        if not keys_fit or len(relations) != 1 or not types_fit:
            raise ValueError(
                f"{setting}: expected arm, metric, one of {', '.join(EXPECT_RELATIONS)}, "
                f"and optionally mean=True; got {dict(entry)}"
            )
        if isinstance(entry["arm"], str) == ("within" in entry):
            raise ValueError(
                f"{setting}: expected a tuple of arms with within and otherwise one arm; "
                f"got arm={entry['arm']!r}"
            )
        # In a config without arms, expectations name the folders of other runs.
        for arm in expected_arms(entry) if any(arms) else ():
            refuse_unknown(arm, arms, f"{setting} names the arm")
        refuse_unknown(entry["metric"], [*FORMULAS, *groups], f"{setting} names the metric")
    if config.report.baseline and any(arms):
        refuse_unknown(config.report.baseline, arms, "config.report.baseline names the arm")
    if config.report.sort:
        metrics = [*FORMULAS, *groups]
        refuse_unknown(config.report.sort, metrics, "config.report.sort names the metric")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def refuse_unknown(name: str, known: Sequence[str], subject: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
        raise ValueError(f"{subject} {name!r}; {hint}")


def expected_arms(entry: Mapping[str, Any]) -> list[str]:
    """Return the arms of an expectation, with the one to compare with last."""
    arms = [entry["arm"]] if isinstance(entry["arm"], str) else list(entry["arm"])
    return arms + ([entry["above"]] if "above" in entry else [])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """An expectation and the numbers that decide it."""

    entry: Mapping[str, Any]
    values: dict[str, float | None]  # by seed or order, or only "mean"; None = no finished run

    def holds(self, value: float | None) -> bool | None:
        """Return whether a number meets the expectation; None if there is no number."""
        if value is None:
            return None
        entry = self.entry
        low = entry.get("at_least", 2 * ROUNDING_TOLERANCE if "above" in entry else -np.inf)
        high = entry.get("at_most", entry.get("within", np.inf))
        return bool(low - ROUNDING_TOLERANCE <= value <= high + ROUNDING_TOLERANCE)

    @property
    def met(self) -> bool | None:
        """Whether all numbers meet the expectation; None if one is missing and none misses it."""
        results = [self.holds(value) for value in self.values.values()]
        if False in results:
            return False
        return None if None in results or not results else True

    @property
    def word(self) -> str:
        return {True: "met", False: "missed", None: "not judged"}[self.met]

    def shown(self, value: float | None) -> str:
        metric = self.entry["metric"]
        if metric in words.KL_METRICS or not {"above", "within"} & self.entry.keys():
            return words.format_metric(metric, value)
        return (words.format_points if "above" in self.entry else words.format_percent)(value)

    @property
    def text(self) -> str:
        entry, title = self.entry, words.metric_title(self.entry["metric"])
        arms = expected_arms(entry)
        if "within" in entry:
            text = f"{title} of {', '.join(arms)} within {self.shown(entry['within'])}"
        elif "above" in entry:
            text = f"{title} of {arms[0]} above that of {arms[1]}"
        elif "at_least" in entry:
            text = f"{title} of {arms[0]} at least {self.shown(entry['at_least'])}"
        else:
            text = f"{title} of {arms[0]} at most {self.shown(entry['at_most'])}"
        return text + ", mean over seeds" * bool(entry.get("mean"))

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as an entry of the report's JSON."""
        values = {
            variant: {"value": value, "met": self.holds(value)}
            for variant, value in self.values.items()
        }
        return {"says": self.text, "met": self.met, "found": values, "expect": self.entry}


def judge_expectations(arms: Sequence[Arm]) -> list[Verdict]:
    """Judge each distinct expectation in the configs of the runs.

    Missed expectations are first, then those that cannot be judged.
    """
    entries: dict[str, Mapping[str, Any]] = {}
    for arm in arms:
        for run in arm.runs:
            for entry in run.config.get("expect", ()):
                entries[json.dumps(entry, sort_keys=True)] = entry
    verdicts = [Verdict(entry, _measure_by_variant(entry, arms)) for entry in entries.values()]
    return sorted(verdicts, key=lambda verdict: (False, None, True).index(verdict.met))


def _measure_by_variant(entry: Mapping[str, Any], arms: Sequence[Arm]) -> dict[str, float | None]:
    """Return the number to judge by seed or order, or for the mean over seeds."""
    by_arm = {
        arm.label: {
            run.variant: run.metric(entry["metric"])["value"] if run.table.finished else None
            for run in arm.runs
        }
        for arm in arms
    }
    values = [by_arm.get(name, {}) for name in expected_arms(entry)]
    if entry.get("mean"):
        means = [
            float(np.mean(list(v.values()))) if v and None not in v.values() else None
            for v in values
        ]
        return {"mean": _bounded_number(entry, means)}
    variants = dict.fromkeys(variant for v in values for variant in v)
    return {
        variant: _bounded_number(entry, [v.get(variant) for v in values]) for variant in variants
    }


def _bounded_number(entry: Mapping[str, Any], values: Sequence[float | None]) -> float | None:
    """Compute the number that an expectation bounds from the values of its arms."""
    if None in values:
        return None
    if "within" in entry:
        return max(values) - min(values)
    return values[0] - values[1] if "above" in entry else values[0]


def verdict_sentences(verdicts: Sequence[Verdict]) -> list[Markup]:
    """Write how many expectations are met, and name some that are missed."""
    if not verdicts:
        return []
    met = sum(bool(verdict.met) for verdict in verdicts)
    not_judged = sum(verdict.met is None for verdict in verdicts)
    note = f", {not_judged} not judged: a number is missing" * bool(not_judged)
    text = "{m} expectations are met" + note + "."
    sentences = [words.html_sentence(text, m=f"{met} of {len(verdicts)}")]
    missed = [verdict for verdict in verdicts if verdict.met is False]
    for verdict in missed[:MISSED_IN_HEADLINE]:
        values = ", ".join(
            f"{verdict.shown(value)} ({variant})"
            for variant, value in verdict.values.items()
            if verdict.holds(value) is False
        )
        sentences.append(words.html_sentence("Missed: {t}; found {f}.", t=verdict.text, f=values))
    return sentences
