"""Whether the arms of a comparison show what `config.expect` says they must; only finished runs are judged, by their own numbers.

    dict(arm="grpo", metric="text", at_least=-0.03)                     in each seed or order; likewise at_most
    dict(arm="grpo", metric="fm_diagonal", above="sft")                 more than another arm
    dict(arm=("sft", "grpo"), metric="learned_gain", within=0.06)       no two of these arms further apart
    dict(arm="sft", metric="text", at_most=-0.25, mean=True)            the mean over seeds, not each

A metric is one of matrix.FORMULAS or a group of config.eval.groups; numbers are fractions of 1.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from ml_collections import ConfigDict

from cptjax.evaluation.matrix import FORMULAS
from cptjax.evaluation.report import words
from cptjax.evaluation.report.read import Arm, ReportRun

EXPECT_RELATIONS = ("at_least", "at_most", "above", "within")
ROUNDING_TOLERANCE = 1e-9  # a number at its bound is within it
MISSED_IN_HEADLINE = 3  # missed expectations that the headline names


def check_expectations(config: ConfigDict) -> None:
    """Refuses group names that are taken, and expectations that no report could judge."""
    groups = [name for group in config.eval.groups for name in (group, f"{group}_forced")]
    if taken := [name for name in groups if name in FORMULAS or groups.count(name) > 1]:
        raise ValueError(
            f"config.eval.groups: {taken[0]} already names a number; choose another name"
        )
    for i, entry in enumerate(config.expect):
        where = f"config.expect[{i}]"
        relations = [key for key in EXPECT_RELATIONS if key in entry]
        fits = all(
            isinstance(entry[key], str if key == "above" else int | float) for key in relations
        )
        if (
            set(entry) - {"mean"} != {"arm", "metric", *relations}
            or len(relations) != 1
            or not fits
        ):
            raise ValueError(
                f"{where} is {dict(entry)}; expected arm, metric, one of {', '.join(EXPECT_RELATIONS)}, perhaps mean=True"
            )
        if isinstance(entry["arm"], str) == ("within" in entry):
            raise ValueError(
                f"{where} has arm={entry['arm']!r}; expected a tuple of arms beside within, else one arm"
            )
        for arm in (
            expected_arms(entry) if len(config.arms) else ()
        ):  # without arms, runs beside this one are meant, named by their folders
            _refuse_unknown(arm, list(config.arms), f"{where} names the arm")
        _refuse_unknown(entry["metric"], [*FORMULAS, *groups], f"{where} names the metric")


def _refuse_unknown(name: str, names: Sequence[str], where: str) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        raise ValueError(
            f"{where} {name!r}; "
            + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}")
        )


def expected_arms(entry: Mapping[str, Any]) -> list[str]:
    """The arms that an expectation is about, those it is compared with last."""
    arms = [entry["arm"]] if isinstance(entry["arm"], str) else list(entry["arm"])
    return arms + ([entry["above"]] if "above" in entry else [])


@dataclasses.dataclass(frozen=True)
class Verdict:
    entry: Mapping[str, Any]
    found: dict[
        str, float | None
    ]  # by seed or order, or of "mean"; None = not measured, or its run is not finished

    def holds(self, value: float | None) -> bool | None:
        """Whether a number meets the expectation; None where there is no number."""
        e = self.entry
        if value is None:
            return None
        low = e.get("at_least", 2 * ROUNDING_TOLERANCE if "above" in e else -np.inf)
        return bool(
            low - ROUNDING_TOLERANCE
            <= value
            <= e.get("at_most", e.get("within", np.inf)) + ROUNDING_TOLERANCE
        )

    @property
    def met(self) -> bool | None:
        every = [self.holds(value) for value in self.found.values()]
        return False if False in every else None if None in every or not every else True

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
        e, title = self.entry, words.metric_title(self.entry["metric"])
        arms = expected_arms(e)
        if "within" in e:
            said = f"{title} of {', '.join(arms)} within {self.shown(e['within'])}"
        elif "above" in e:
            said = f"{title} of {arms[0]} above that of {arms[1]}"
        else:
            least = "at_least" in e
            said = f"{title} of {arms[0]} at {'least' if least else 'most'} {self.shown(e['at_least' if least else 'at_most'])}"
        return said + ", mean over seeds" * bool(e.get("mean"))

    def plain(self) -> dict[str, Any]:
        """As the JSON beside the report holds it."""
        found = {
            key: {"value": value, "met": self.holds(value)} for key, value in self.found.items()
        }
        return {"says": self.text, "met": self.met, "found": found, "expect": self.entry}


def judge_expectations(arms: Sequence[Arm]) -> list[Verdict]:
    """Every expectation of the runs' configs, each once: the missed ones first, then those without a number."""
    asked = {
        json.dumps(e, sort_keys=True): e
        for arm in arms
        for run in arm.runs
        for e in run.config.get("expect", ())
    }
    verdicts = [Verdict(entry, _measure_by_variant(entry, arms)) for entry in asked.values()]
    return sorted(verdicts, key=lambda v: (False, None, True).index(v.met))


def _measure_by_variant(entry: Mapping[str, Any], arms: Sequence[Arm]) -> dict[str, float | None]:
    by_arm = {
        arm.label: {run.variant: _finished_number(run, entry["metric"]) for run in arm.runs}
        for arm in arms
    }
    each = [by_arm.get(name, {}) for name in expected_arms(entry)]
    if entry.get("mean"):
        return {
            "mean": _bounded_number(
                entry, [_mean_if_complete(numbers.values()) for numbers in each]
            )
        }
    return {
        variant: _bounded_number(entry, [numbers.get(variant) for numbers in each])
        for variant in dict.fromkeys(v for n in each for v in n)
    }


def _finished_number(run: ReportRun, metric: str) -> float | None:
    return run.number(metric)["value"] if run.table.finished else None


def _mean_if_complete(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values and None not in values else None


def _bounded_number(entry: Mapping[str, Any], values: Sequence[float | None]) -> float | None:
    """The one number that an expectation bounds."""
    if None in values:
        return None
    return (
        max(values) - min(values)
        if "within" in entry
        else values[0] - values[1]
        if "above" in entry
        else values[0]
    )


def verdict_sentences(verdicts: Sequence[Verdict]) -> list[Markup]:
    """What was expected and came, and what did not."""
    if not verdicts:
        return []
    missed = [v for v in verdicts if v.met is False]
    open_ = sum(v.met is None for v in verdicts)
    metrics = {"m": f"{sum(bool(v.met) for v in verdicts)} of {len(verdicts)}"}
    said = [
        words.html_sentence(
            "{m} expectations are met"
            + f", {open_} not judged: a number is missing" * bool(open_)
            + ".",
            **metrics,
        )
    ]
    for verdict in missed[:MISSED_IN_HEADLINE]:
        found = [
            f"{verdict.shown(value)} ({where})"
            for where, value in verdict.found.items()
            if verdict.holds(value) is False
        ]
        said.append(
            words.html_sentence("Missed: {t}; found {f}.", t=verdict.text, f=", ".join(found))
        )
    return said
