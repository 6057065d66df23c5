"""Format the numbers of the report, and write the headline sentences of one run."""

import math
from typing import Any

from markupsafe import Markup

from cptjax.evaluation.report.read import ReportRun

METRIC_TITLES = {
    "avg_acc": "AvgAcc",
    "base_acc": "Base accuracy",
    "learned_acc": "Learned",
    "learned_gain": "Learned gain",
    "fm_peak": "FM peak",
    "fm_peak_all": "FM peak, over T",
    "fm_peak_own": "FM peak, own stage on",
    "fm_diagonal": "FM",
    "mft": "MFT",
    "mfn": "MFN",
    "bwt": "BWT",
    "forgetting": "Forgetting",
    "fwt": "FWT",
    "plasticity": "Plasticity",
    "maa": "MAA",
    "intransigence": "Intransigence",
    "gain": "Gain",
    "general_delta": "General Δ",
    "drop": "Drop",
    "fm_forced": "FM, forced",
    "general_delta_forced": "General Δ, forced",
    "fm_gold": "FM, gold probability",
    "general_delta_gold": "General Δ, gold probability",
    "kl_new": "KL, new tasks",
    "kl_old": "KL, old tasks",
    "kl_new_sequence": "KL per response, new tasks",
    "kl_old_sequence": "KL per response, old tasks",
    "format_share": "Format share",
}
# Metrics shown in percent; all others except KL are differences in points.
LEVEL_METRICS = ("avg_acc", "base_acc", "learned_acc", "mft", "mfn", "maa")
# Nats per token, and per response.
KL_METRICS = ("kl_new", "kl_old", "kl_new_sequence", "kl_old_sequence")
AMOUNT_SUFFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def format_percent(value: float | None) -> str:
    return f"{100 * value:.1f}" if is_known(value) else "–"


def format_points(value: float | None) -> str:
    """Format a difference in points with its sign."""
    if not is_known(value):
        return "–"
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def format_metric(name: str, value: float | None) -> str:
    if name in KL_METRICS:
        return f"{value:.3g}" if is_known(value) else "–"
    return (format_percent if name in LEVEL_METRICS else format_points)(value)


def format_score(value: float | None) -> str:
    """Format a metric of a scorer: a share with three decimals, or points such as MME's."""
    if not is_known(value):
        return "–"
    return f"{value:.1f}" if abs(value) > 2 else f"{value:.3f}"


def metric_title(name: str) -> str:
    """Return the heading of a metric; groups keep their names from the config."""
    if name in METRIC_TITLES:
        return METRIC_TITLES[name]
    for ending, words in (("_forced", ", forced"), ("_gold", ", gold probability")):
        if name.endswith(ending):
            return f"{name.removesuffix(ending)} Δ{words}"
    return f"{name} Δ"


def format_spread(spread: dict[str, Any] | None, signed: bool = False) -> str:
    """Format a mean over seeds with its standard deviation."""
    if spread is None:
        return "–"
    text = (format_points if signed else format_percent)(spread["mean"])
    return f"{text} ± {100 * spread['sd']:.1f}" if spread["sd"] is not None else text


def format_difference(name: str, mean: float, half_width: float | None = None) -> str:
    """Format a difference of two arms, and half the width of its interval if it has one."""
    if name in KL_METRICS:
        text = f"{mean:+.3g}".replace("-", "−")
        return text if half_width is None else f"{text} ± {half_width:.2g}"
    text = format_points(mean)
    return text if half_width is None else f"{text} ± {100 * half_width:.1f}"


def format_interval(metric: dict[str, Any]) -> str:
    """Format the half width of the 95 % interval."""
    return f"± {196 * metric['stderr']:.1f}" if is_known(metric.get("stderr")) else ""


def format_amount(value: float) -> str:
    """Format a large count with a suffix: 12.3 k, 4.5 M, 1.2 G."""
    for power, suffix in AMOUNT_SUFFIXES:
        if abs(value) >= power:
            return f"{value / power:.3g} {suffix}"
    return f"{value:.3g}"


def format_rate(value: float | None) -> str:
    return f"{format_percent(value)}%"


def html_sentence(text: str, **parts: Any) -> Markup:
    """Fill a sentence with parts in bold; the parts are escaped."""
    return Markup(text).format(**{k: Markup("<b>{}</b>").format(v) for k, v in parts.items()})


def run_headline(run: ReportRun) -> list[Markup]:
    """Write what a run learned and forgot."""
    metrics, final = run.summary["metrics"], run.table.final
    base, average = metrics["base_acc"], metrics["avg_acc"]
    if not final:
        sentence = Markup("No stage has been evaluated yet.")
        if is_known(base["value"]):
            rate = format_rate(base["value"])
            sentence += html_sentence(" The base model scores {base} on the tasks.", base=rate)
        return [sentence]
    stages = f"{final} of {len(run.table.stages)} stages"
    if run.table.finished:
        stages = f"{final} stage{'s' * (final > 1)}"
    text, parts = "After {stages} the model scores {now} on its tasks", {}
    if is_known(base["value"]):
        text += "; before training it scored {base}"
        parts["base"] = format_rate(base["value"])
    now = format_rate(average["value"])
    sentences = [html_sentence(text + ".", stages=stages, now=now, **parts)]
    if is_known(metrics["fm_diagonal"]["value"]):
        sentences.append(
            html_sentence(
                "It reached {l} right after learning each task, and {x} "
                "on the tasks of earlier stages.",
                l=format_rate(metrics["learned_acc"]["value"]),
                x=describe_forgetting(metrics["fm_diagonal"]),
            )
        )
    general = metrics["general_delta"]
    if is_known(general["value"]):
        sentences.append(
            html_sentence("Abilities that were never trained {x}.", x=describe_change(general))
        )
    for group in run.table.groups:
        if is_known(metrics[group]["value"]):
            change = describe_change(metrics[group])
            sentences.append(html_sentence("Of these, {g} {x}.", g=group, x=change))
    return sentences + format_share_sentence(run)


def is_within_interval(metric: dict[str, Any]) -> bool:
    """Return whether a difference cannot be distinguished from 0."""
    return abs(metric["value"]) <= max(1.96 * (metric["stderr"] or 0.0), 0.0005)


def describe_change(metric: dict[str, Any]) -> str:
    """Describe a difference, and whether it exceeds its 95 % interval."""
    if is_within_interval(metric):
        points = f"{format_points(metric['value'])} {format_interval(metric)} points"
        return f"did not measurably change ({points})"
    return f"{'rose' if metric['value'] > 0 else 'fell'} by {abs(100 * metric['value']):.1f} points"


def describe_forgetting(metric: dict[str, Any]) -> str:
    """Describe a forgetting metric, and whether it exceeds its 95 % interval."""
    if is_within_interval(metric):
        points = f"{format_points(metric['value'])} {format_interval(metric)} points"
        return f"did not measurably lose or gain ({points})"
    verb = "lost" if metric["value"] < 0 else "gained"
    return f"has {verb} {abs(100 * metric['value']):.1f} points"


def format_share_sentence(run: ReportRun) -> list[Markup]:
    share = run.summary["format_share"]
    if not is_known(share["value"]):
        return []
    return [
        html_sentence(
            "With a forced response prefix, the loss on earlier and general tasks is {forced} "
            "instead of {loss} points: {share} of the loss is format.",
            forced=format_percent(share["loss_forced"]),
            loss=format_percent(share["loss"]),
            share=f"{100 * share['value']:.0f}%",
        )
    ]
