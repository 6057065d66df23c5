"""Numbers and findings as a reader would say them; every sentence is made from the run's own numbers."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from cptjax.evaluation.report.read import Arm, ReportRun

METRIC_TITLES = {
    "avg_acc": "AvgAcc",
    "base_acc": "Base accuracy",
    "learned_acc": "Learned",
    "learned_gain": "Learned gain",
    "fm_peak": "FM peak",
    "fm_peak_all": "FM peak, over T",
    "fm_diagonal": "FM",
    "bwt": "BWT",
    "forgetting": "Forgetting",
    "fwt": "FWT",
    "maa": "MAA",
    "intransigence": "Intransigence",
    "gain": "Gain",
    "general_delta": "General Δ",
    "drop": "Drop",
    "fm_forced": "FM, forced",
    "general_delta_forced": "General Δ, forced",
    "kl_new": "KL, new tasks",
    "kl_old": "KL, old tasks",
    "format_share": "Format share",
}
LEVEL_METRICS = (
    "avg_acc",
    "base_acc",
    "learned_acc",
    "maa",
)  # shown as percent; the others are differences in points
KL_METRICS = ("kl_new", "kl_old")  # nats a token
EQUAL_LEARNING_GAP = 0.06  # learned accuracies further apart than this are not "equal learning"


def is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def format_percent(value: float | None) -> str:
    return f"{100 * value:.1f}" if is_known(value) else "–"


def format_points(value: float | None) -> str:
    """Writes a difference in points with its sign."""
    if not is_known(value):
        return "–"
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def format_metric(name: str, value: float | None) -> str:
    if name in KL_METRICS:
        return f"{value:.3g}" if is_known(value) else "–"
    return (format_percent if name in LEVEL_METRICS else format_points)(value)


def metric_title(name: str) -> str:
    """A number's heading; the config's own groups go by their names."""
    group = name.removesuffix("_forced")
    return METRIC_TITLES.get(name) or f"{group} Δ" + ", forced" * (group != name)


def format_spread(found: dict[str, Any] | None, signed: bool = False) -> str:
    """Writes a mean over seeds with its standard deviation."""
    if found is None:
        return "–"
    text = (format_points if signed else format_percent)(found["mean"])
    return f"{text} ± {100 * found['sd']:.1f}" if found["sd"] is not None else text


def format_interval(number: dict[str, Any]) -> str:
    return f"± {196 * number['stderr']:.1f}" if is_known(number.get("stderr")) else ""


def format_amount(value: float, unit: str = "") -> str:
    """Writes a large count with a suffix: 12.3 k, 4.5 M, 1.2 G."""
    for power, suffix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= power:
            return f"{value / power:.3g} {suffix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def bold_html(text: str) -> Markup:
    return Markup("<b>{}</b>").format(text)


def format_rate(value: float | None) -> str:
    return f"{format_percent(value)}%"


def html_sentence(text: str, **parts: Any) -> Markup:
    return Markup(text).format(**{k: bold_html(v) for k, v in parts.items()})


def describe_change(number: dict[str, Any]) -> str:
    """Says whether a difference is more than its own 95 % interval."""
    value, error = number["value"], number["stderr"] or 0.0
    if abs(value) <= max(1.96 * error, 0.0005):
        return (
            f"did not measurably change ({format_points(value)} {format_interval(number)} points)"
        )
    return f"{'rose' if value > 0 else 'fell'} by {abs(100 * value):.1f} points"


def run_headline(run: ReportRun) -> list[Markup]:
    m, S = run.summary["metrics"], run.table.final
    base, now, learned, fm, general = (
        m[k] for k in ("base_acc", "avg_acc", "learned_acc", "fm_diagonal", "general_delta")
    )
    if not S:
        start = (
            html_sentence(
                " The base model scores {base} on the tasks.", base=format_rate(base["value"])
            )
            if is_known(base["value"])
            else ""
        )
        return [Markup("No stage has been evaluated yet.") + start]
    where = (
        f"{S} stage{'s' * (S > 1)}"
        if run.table.finished
        else f"{S} of {len(run.table.stages)} stages"
    )
    said = [
        html_sentence(
            "After {where} the model scores {now} on its tasks.",
            where=where,
            now=format_rate(now["value"]),
        )
    ]
    if is_known(base["value"]):
        said[0] = said[0][:-1] + html_sentence(
            "; before training it scored {base}.", base=format_rate(base["value"])
        )
    if is_known(fm["value"]):
        kept = html_sentence("{x} on what earlier stages had taught it", x=_describe_forgetting(fm))
        said.append(
            html_sentence(
                "It reached {l} right after learning each task, and ",
                l=format_rate(learned["value"]),
            )
            + kept
            + "."
        )
    if is_known(general["value"]):
        said.append(
            html_sentence("Abilities it was never trained on {x}.", x=describe_change(general))
        )
    said += [
        html_sentence("Of these, {g} {x}.", g=g, x=describe_change(m[g]))
        for g in run.table.groups
        if is_known(m[g]["value"])
    ]
    return said + format_share_sentence(run)


def _describe_forgetting(fm: dict[str, Any]) -> str:
    value, error = fm["value"], fm["stderr"] or 0.0
    if abs(value) <= max(1.96 * error, 0.0005):
        return (
            f"did not measurably lose or gain ({format_points(value)} {format_interval(fm)} points)"
        )
    return f"has {'lost' if value < 0 else 'gained'} {abs(100 * value):.1f} points"


def format_share_sentence(run: ReportRun) -> list[Markup]:
    share = run.summary["format_share"]
    if not is_known(share["value"]):
        return []
    text = "With the answer's prefix forced, the loss on earlier and general tasks is {forced}, not {loss} points: {share} is format."
    return [
        html_sentence(
            text,
            forced=format_percent(share["loss_forced"]),
            loss=format_percent(share["loss"]),
            share=f"{100 * share['value']:.0f}%",
        )
    ]


def arm_mean(arm: Arm, name: str) -> float:
    found = arm.spread(name)
    return found["mean"] if found else math.nan


def arm_stderr(arm: Arm, name: str) -> float:
    """Returns the standard error of an arm's number: between its seeds, or of the one run's test sets."""
    found = arm.spread(name)
    if found and found["sd"] is not None:
        return found["sd"] / math.sqrt(found["n"])
    return next((run.number(name)["stderr"] or 0.0 for run in arm.runs), 0.0)


def comparison_headline(arms: Sequence[Arm]) -> list[Markup]:
    sequences = [a for a in arms if is_known(arm_mean(a, "fm_diagonal"))]
    tested = lambda name: [
        a for a in arms if not a.joint and is_known(arm_mean(a, name))
    ]  # joint training is no rival, and forgets these too
    groups = dict.fromkeys(name for a in arms for run in a.runs for name in run.table.groups)
    said = [
        _best_and_worst(
            sequences,
            "fm_diagonal",
            "{best} keeps most of what it learned (FM {b}); {worst} keeps least (FM {w}).",
            "All keep about equally much of what they learned (FM {w} to {b}).",
        ),
        _best_and_worst(
            tested("general_delta"),
            "general_delta",
            "On abilities never trained, {best} changed by {b} points and {worst} by {w}.",
            "On abilities never trained, all changed about equally ({w} to {b} points).",
        ),
        *(
            _best_and_worst(
                tested(g),
                g,
                "On {on}, {best} changed by {b} and {worst} by {w}.",
                "On {on}, all changed about equally ({w} to {b}).",
                on=g,
            )
            for g in groups
        ),
        *_plasticity_sentence(sequences),
        *_format_loss_sentence(arms),
        None
        if any(len(a.runs) > 1 for a in arms)
        else Markup("One seed each: differences of a few points may be chance."),
    ]
    return [s for s in said if s]


def _best_and_worst(
    arms: Sequence[Arm], name: str, apart: str, alike: str, **more: str
) -> Markup | None:
    """Names the best and the worst arm, unless their difference lies within its 95 % interval and is not of one sign in all seeds."""
    if len(arms) < 2:
        return None
    best, worst = (pick(arms, key=lambda a: arm_mean(a, name)) for pick in (max, min))
    values = {
        "b": format_points(arm_mean(best, name)),
        "w": format_points(arm_mean(worst, name)),
        **more,
    }
    metrics = html_sentence(apart, best=best.label, worst=worst.label, **values)
    if arm_mean(best, name) - arm_mean(worst, name) > 1.96 * math.hypot(
        arm_stderr(best, name), arm_stderr(worst, name)
    ):
        return metrics
    seeds = _seeds_that_agree(best, worst, name)
    return (
        metrics
        + html_sentence(" So it is in each of the {n} seeds, though these differ much.", n=seeds)
        if seeds
        else html_sentence(alike, **values)
    )


def _seeds_that_agree(best: Arm, worst: Arm, name: str) -> int:
    """Of how many seeds or orders both arms have a run, where the one is above the other in each of at least three; else 0."""
    number = lambda arm: {run.variant: run.number(name)["value"] for run in arm.runs}
    high, low = number(best), number(worst)
    both = [v for v in high.keys() & low.keys() if is_known(high[v]) and is_known(low[v])]
    return len(both) if len(both) > 2 and all(high[v] > low[v] for v in both) else 0


def _plasticity_sentence(arms: Sequence[Arm]) -> list[Markup]:
    if len(arms) < 2:
        return []
    low, high = (pick(arms, key=lambda a: arm_mean(a, "learned_acc")) for pick in (min, max))
    gap = arm_mean(high, "learned_acc") - arm_mean(low, "learned_acc")
    values = {
        "l": format_rate(arm_mean(low, "learned_acc")),
        "h": format_rate(arm_mean(high, "learned_acc")),
    }
    if gap <= EQUAL_LEARNING_GAP:
        return [
            html_sentence(
                "All learned about equally much: {l} to {h} right after each task's stage.",
                **values,
            )
        ]
    text = "They did not learn equally much ({low} {l}, {high} {h}): part of “forgets less” may be “learned less”."
    return [html_sentence(text, low=low.label, high=high.label, **values)]


def _format_loss_sentence(arms: Sequence[Arm]) -> list[Markup]:
    shares = {a.label: a.over("format_share", "value") for a in arms}
    worst = max(
        (a for a in arms if shares[a.label] and not a.joint),
        key=lambda a: a.over("format_share", "loss")["mean"],
        default=None,
    )
    if worst is None:
        return []
    text = "About {share} of {name}'s loss is only format: it is gone once the answer's prefix is forced."
    return [
        html_sentence(text, share=f"{100 * shares[worst.label]['mean']:.0f}%", name=worst.label)
    ]
