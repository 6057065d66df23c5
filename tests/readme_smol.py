"""Write the README's section on a real model from .github/smol.json, the numbers of its runs.

python -m tests.readme_smol                  print the section
python -m tests.readme_smol --write          put it into README.md, between <!-- smol --> marks,
                                             and draw its figure, .github/smol.svg
python -m tests.readme_smol --read DIR ...   add the runs of workdirs of configs/smol.py to
                                             .github/smol.json; an arm replaces its older numbers

An arm is read when all of its runs have finished.
"""

import collections
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs import smol
from cptjax.analysis import drift, pareto
from cptjax.evaluation import summary
from cptjax.evaluation.report import read
from tests.readme_parts import markdown_table, print_or_write
from tests.readme_smol_figure import draw_figure

ROOT = Path(__file__).parents[1]
NUMBERS = ROOT / ".github" / "smol.json"
FIGURE = NUMBERS.with_suffix(".svg")
GENERAL = (*smol.FACTS, "instructions", "prose")
GENERATED = GENERAL[:-1]  # sets with responses: a score of 0 or 1 per row
TITLES = dict(
    sft_bare="SFT on bare answers",
    sft_style="SFT on answers in the model's own form",
    self_sft="SFT on own correct responses, sampled once",
    iterative="SFT on own correct responses, sampled twice",
    sdft="SDFT",
    grpo_nokl="GRPO without KL",
    grpo="GRPO with KL",
    replay="SFT on bare answers, replay",
    ewc="SFT on bare answers, EWC",
    lwf="SFT on bare answers, LwF",
    lora_sft_bare="SFT on bare answers, LoRA",
    lora_sft_style="SFT in the model's own form, LoRA",
    lora_grpo_nokl="GRPO without KL, LoRA",
)
# Responses whose influence is measured: corpus and arm.
CORPORA = {
    "gold, sft_bare": "bare answers",
    "gold, sft_style": "answers in the model's own form",
    "own, sft_bare": "own correct responses",
}
# (paper, what it finds, arm, arm that it finds to lose more of the general sets)
CLAIMS = (
    ("2507.05386", "GRPO loses less than SFT", "grpo_nokl", "sft_bare"),
    ("2507.05386", "GRPO with KL does not lose less than without", "grpo_nokl", "grpo"),
    ("2510.18874", "SFT on own responses, sampled once, loses less than SFT", "self_sft",
     "sft_bare"),
    ("2510.18874", "SFT on own responses, sampled again, loses less than SFT", "iterative",
     "sft_bare"),
    ("2607.04364", "LoRA SFT loses less than full GRPO", "lora_sft_bare", "grpo_nokl"),
)  # fmt: skip
FORMATS = [f"{name}+lr={lr:g}" for lr in smol.PAPER_LRS for name in smol.get_config("0,bf16").arms]
CHANGES = ("learned", "earlier")
DRIFT = "KL on the new task"
Scores = dict[tuple[str, str], float]  # by task and row


# ---- from runs to numbers ------------------------------------------------------------------------


def changes_of_run(run: read.ReportRun, stage: int) -> dict[str, Scores]:
    """Return the change of each row's score up to a stage: of learned, earlier and general tasks.

    A task of a later stage is in none of them.
    """
    after = [summary.read_prediction_scores(run.path, k) for k in range(stage + 1)]
    learned_at = {task: k for k, tasks in enumerate(run.table.stages, 1) for task in tasks}
    changes: dict[str, Scores] = collections.defaultdict(dict)
    for (task, row), score in after[stage].items():
        key, learned = (task, row), learned_at.get(task, 0)
        if 0 < learned <= stage:
            own = after[learned][key]
            changes["learned"][key] = own - after[0][key]
            if learned < stage:
                changes["earlier"][key] = score - own
        elif not learned:
            changes[task][key] = score - after[0][key]
            if task in GENERATED:
                changes["general"][key] = score - after[0][key]
    return changes


def mean_over_runs(runs: Iterable[Scores]) -> Scores:
    """Average each row over the seeds; the rows are the sample of the interval."""
    rows: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for scores in runs:
        for key, value in scores.items():
            rows[key].append(value)
    return {key: float(np.mean(values)) for key, values in rows.items()}


def mean_with_interval(values: Iterable[float]) -> list[float]:
    """Return the mean and half the width of its 95 % interval over rows."""
    x = np.array(list(values))
    return [round(float(v), 4) for v in (x.mean(), 1.96 * x.std(ddof=1) / len(x) ** 0.5)]


def collect_numbers(folders: list[str]) -> dict[str, Any]:
    """Return the numbers of the arms in workdirs of configs/smol.py."""
    arms = {
        arm.label: arm.runs
        for arm in read.read_arms(folders)
        if all(run.table.finished for run in arm.runs)
    }
    runs_of = {name: arms[name] for name in TITLES if name in arms}
    sweep = [name for name in arms if "+" in name and name.partition("+lr=")[0] in TITLES]
    return {
        **(numbers_of_base(next(iter(runs_of.values()))) if runs_of else {}),
        "arms": {name: numbers_of_arm(runs) for name, runs in runs_of.items()},
        "bf16": {name: numbers_of_format(arms[name]) for name in FORMATS if name in arms},
        "pareto": list(pareto.analyze(folders).sentences) if sweep else [],
        "sweep": sweep,
        **numbers_of_analyses(folders),
    }


def add_numbers(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Add new numbers to old ones, which must have the same batch and test rows."""
    if old and new.get("settings", old["settings"]) != old["settings"]:
        raise ValueError(f"the settings differ: got {new['settings']}, expected {old['settings']}")
    by_name = ("arms", "bf16", "influence", "fisher")
    parts = {part: {**old.get(part, {}), **new[part]} for part in by_name}
    sweep = new if new["pareto"] else old
    parts |= {part: sweep.get(part, []) for part in ("pareto", "sweep")}
    return {**old, **new, **parts}


def numbers_of_base(runs: Sequence[read.ReportRun]) -> dict[str, Any]:
    base = mean_over_runs(summary.read_prediction_scores(run.path, 0) for run in runs)
    config = runs[0].config
    return {
        "settings": {"batch": config["train"]["batch"], "rows": config["eval"]["limit"]},
        "base": {
            task: mean_with_interval(v for (name, _), v in base.items() if name == task)
            for task in (*smol.STAGES, *GENERAL)
        },
        "base_gold": mean_gold(runs, 0),
    }


def numbers_of_arm(runs: Sequence[read.ReportRun]) -> dict[str, Any]:
    """Return an arm's changes over its last stage, and the drift of each of its stages."""
    last = runs[0].table.final
    changes = [changes_of_run(run, last) for run in runs]
    rows = {part: mean_over_runs(change[part] for change in changes) for part in changes[0]}
    drifts = [d for run in runs for d in drift.drift_of_stages(run, weights=False)]
    return {
        "seeds": len(runs),
        "lr": runs[0].config["train"]["lr"],
        "steps": runs[0].config["stages"][0]["steps"],
        "stages": last,
        "gold": mean_gold(runs, last),
        "rows": [round(rows["general"][key], 4) for key in sorted(rows["general"])],
        "drift": [[d.far[DRIFT], d.loss] for d in drifts],
        **{part: mean_with_interval(values.values()) for part, values in rows.items()},
    }


def mean_gold(runs: Iterable[read.ReportRun], stage: int) -> dict[str, float]:
    """Return the mean probability of the gold answers of each subject of facts."""
    return {
        subject: float(np.mean([run.table.gold[stage, subject].value for run in runs]))
        for subject in smol.FACTS
    }


def numbers_of_format(runs: Iterable[read.ReportRun]) -> dict[str, Any]:
    """Return what SFT learns and loses in one number format, and how many weights it changes."""
    changes = [changes_of_run(run, run.table.final) for run in runs]
    changed = [
        line["changed_weights"]
        for run in runs
        for line in run.tables.metrics_lines
        if "changed_weights" in line
    ]
    return {
        "seeds": len(changes),
        "changed_weights": float(np.mean(changed)),
        **{
            part: mean_with_interval(mean_over_runs(c[part] for c in changes).values())
            for part in ("learned", "general")
        },
    }


def numbers_of_analyses(folders: Iterable[str]) -> dict[str, Any]:
    """Return what `launch/analyze.py` found in workdirs below folders."""
    found = lambda name: sorted(p for f in folders for p in Path(f).rglob(f"{name}.json"))
    return {
        "influence": {k: v for path in found("influence") for k, v in influence_of(path).items()},
        "fisher": {arm_of(path): risks_of(path) for path in found("fisher")},
    }


def arm_of(path: Path) -> str:
    """Return the arm of a file in its workdir, without its learning rate."""
    return path.parent.name.partition("+")[0]


def influence_of(path: Path) -> dict[str, Any]:
    """Return what `launch/analyze.py influence` found, by corpus and arm."""
    corpora = json.loads(path.read_text())["corpora"]
    return {
        f"{corpus['name']}, {arm_of(path)}": {
            "n": len(corpus["pulls"]),
            "perplexity": corpus["perplexity"],
            "kernel": float(np.mean([pull["kernel"] for pull in corpus["pulls"]])),
            "change": {
                task: float(np.mean([pull["change"][task] for pull in corpus["pulls"]]))
                for task in corpus["pulls"][0]["change"]
            },
        }
        for corpus in corpora
    }


def risks_of(path: Path) -> dict[str, Any]:
    """Return what `launch/analyze.py fisher` found."""
    prompts = json.loads(path.read_text())["prompts"]
    ratios = [p["ratio"] for p in prompts if p["ratio"]]
    return {
        "n": len(prompts),
        "mixed": len(ratios),
        "ratio": float(np.median(ratios)) if ratios else None,
        **{name: float(np.mean([p[name] for p in prompts])) for name in ("sft", "rft", "group")},
    }


# ---- from numbers to the section -----------------------------------------------------------------


def points(value: list[float]) -> str:
    """Write a change and its interval in points, as in "-12.5 ± 6.1"."""
    return f"{100 * value[0]:+.0f} ± {100 * value[1]:.0f}"


def percent(value: list[float]) -> str:
    return f"{100 * value[0]:.0f} ± {100 * value[1]:.0f}"


def general_cell(arm: Mapping[str, Any], base_gold: Mapping[str, float], task: str) -> str:
    """Write the change of a general set, with the factor of the gold answers' probability."""
    if task not in base_gold:
        return points(arm[task])
    return f"{points(arm[task])} (x {arm['gold'][task] / base_gold[task]:.2f})"


def verdict(paper: str, claim: str, better: str, worse: str, numbers: Mapping[str, Any]) -> str:
    """Say whether the difference of two arms agrees with what a paper finds."""
    arms = numbers["arms"]
    if better not in arms or worse not in arms:
        return f"- {paper}, {claim}: not run."
    pairs = zip(arms[better]["rows"], arms[worse]["rows"], strict=True)
    mean, half = mean_with_interval(a - b for a, b in pairs)
    if "does not" in claim:  # that there is no difference cannot be shown, only contradicted
        said = "disagrees" if mean + half < 0 else "not contradicted"
    else:
        said = "agrees" if mean > half else "disagrees" if mean < -half else "not resolved"
    learned = " against ".join(points(arms[arm]["learned"]) for arm in (better, worse))
    return f"- {paper}, {claim}: {said} ({points([mean, half])}; learned {learned})."


def verdict_on_grpo(numbers: Mapping[str, Any]) -> str:
    """Say whether GRPO without KL loses on earlier tasks, as MRCL finds."""
    claim = "- 2607.04364, GRPO forgets earlier tasks"
    value = numbers["arms"].get("grpo_nokl", {}).get("earlier")
    if value is None:
        return f"{claim}: not run."
    mean, half = value
    said = "agrees" if mean < -half else "disagrees" if mean > half else "not resolved"
    return f"{claim}: {said} ({points(value)})."


def introduce(numbers: Mapping[str, Any]) -> str:
    settings = numbers["settings"]
    seeds = sorted({arm["seeds"] for arm in numbers["arms"].values()})
    return (
        "SmolLM2-135M-Instruct, a model that others pretrained, learns three exercises in a row: "
        f"{', '.join(smol.STAGES)} (`configs/smol.py`). `bash launch/smol.sh` makes the model's "
        f"folder and runs everything. Seeds of each method: {', '.join(map(str, seeds))}. A step "
        f"has {settings['batch']} conversations, or under GRPO as many prompts with four "
        f"responses each; each task has {settings['rows']} test rows. The first row is the base "
        "model; the others are changes in points, with 95 % intervals over test rows that do not "
        "include the variation between seeds. Prose is measured as the probability of its bytes. "
        "In brackets: the factor by which the probability of the gold answer changed after a "
        'start such as "The capital is"; a loss of form alone would leave it near 1.'
    )


def main_table(numbers: Mapping[str, Any]) -> str:
    arms, base, base_gold = (numbers[key] for key in ("arms", "base", "base_gold"))
    learned = ", ".join(f"{task} {percent(base[task])}" for task in smol.STAGES)
    of_base = [
        percent(base[task]) + (f" (p = {base_gold[task]:.2f})" if task in base_gold else "")
        for task in GENERAL
    ]
    rows = [
        [TITLES[name], f"{arms[name]['stages']} x {arms[name]['steps']}"]
        + [points(arms[name][part]) if part in arms[name] else "" for part in CHANGES]
        + [general_cell(arms[name], base_gold, task) for task in GENERAL]
        for name in TITLES
        if name in arms
    ]
    header = ("method", "stages x steps", "learned", "earlier tasks", *GENERAL)
    return markdown_table(header, [["base model, in %", "", learned, "", *of_base], *rows])


def table_of_formats(numbers: Mapping[str, Any]) -> str:
    rows = [
        [
            name.replace("+lr=", ", "),
            f"{100 * found['changed_weights']:.1f} %",
            points(found["learned"]),
            points(found["general"]),
        ]
        for name, found in numbers["bf16"].items()
    ]
    header = ("weights and learning rate", "weights changed by an update", "learned", "general")
    return (
        "SFT on bare answers of the first exercise, with weights in float32 and in pure bfloat16, "
        f"at the two learning rates of 2510.18874:\n\n{markdown_table(header, rows)}"
    )


def describe_drift(numbers: Mapping[str, Any]) -> str:
    stages = [
        drift.StageDrift(name, "", k, loss, {DRIFT: kl})
        for name, arm in numbers["arms"].items()
        for k, (kl, loss) in enumerate(arm["drift"], 1)
    ]
    fit = drift.fit_quadratic(DRIFT, stages)
    if fit is None:
        return "There are too few stages to fit the loss to the drift from the base model."
    return (
        f"Over {fit.n} stages, a quadratic in KL(base, now) on the new task explains "
        f"{100 * fit.r2:.0f} % of the variance of the loss on the other tasks "
        f"(r = {fit.pearson:.2f}; 2509.04259 has 71 % for its language models, "
        "2510.18874 r = 0.52)."
    )


def describe_sweep(names: Iterable[str]) -> str:
    """Say which learning rates the runs of the sweep have."""
    rates: dict[str, list[float]] = collections.defaultdict(list)
    for name in names:
        arm, _, rate = name.partition("+lr=")
        rates[arm].append(float(rate))
    listed = (
        f"{TITLES[arm]} {', '.join(f'{r:g}' for r in sorted(of))}" for arm, of in rates.items()
    )
    return f"Learning rates, on the first exercise alone: {'; '.join(listed)}."


def table_of_influence(numbers: Mapping[str, Any]) -> str:
    found = numbers["influence"]
    tasks = list(dict.fromkeys(task for row in found.values() for task in row["change"]))
    rows = [
        [CORPORA[name], str(row["n"]), f"{row['perplexity']:.3g}", f"{row['kernel']:.2g}"]
        + [f"{row['change'][task]:+.3g}" for task in tasks]
        for name, row in found.items()
        if name in CORPORA
    ]
    header = ("responses", "n", "perplexity", "kernel", *tasks)
    return (
        "One step of gradient descent on one response of the first exercise, from the base model: "
        "the change of the log-probability of gold responses of the facts, per token and "
        f"unit of learning rate (`launch/analyze.py influence`):\n\n{markdown_table(header, rows)}"
    )


def describe_risk(arm: str, found: Mapping[str, Any]) -> str:
    ratio = ""
    if found["mixed"]:
        ratio = (
            f" On the {found['mixed']} prompts with responses of different rewards, E[R(RFT)] is "
            f"{found['ratio']:.2g} times Var[r] R(SFT) in the median; the second version of "
            "2507.05386 claims 1."
        )
    return (
        f"Risk of a gradient for the facts, by their Fisher information, on {found['n']} "
        f"prompts of the first exercise ({TITLES[arm]}; `launch/analyze.py fisher`): gold "
        f"response {found['sft']:.2g}, sampled response times its advantage {found['rft']:.2g}, "
        f"update of a group {found['group']:.2g}.{ratio}"
    )


def render_section(numbers: Mapping[str, Any]) -> str:
    if not numbers:
        return "Not measured yet; `bash launch/smol.sh` runs the study (`configs/smol.py`).\n"
    missing = [TITLES[name] for name in TITLES if name not in numbers["arms"]]
    text = [
        introduce(numbers),
        main_table(numbers),
        "![Change of learned, earlier and general tasks by method](.github/smol.svg)",
        "What the papers find, and the difference here on the general sets other than prose, in "
        "points. The methods differ in what they learned:",
        "\n".join([*(verdict(*claim, numbers) for claim in CLAIMS), verdict_on_grpo(numbers)]),
        *(
            f"{TITLES[name]}, run before with the same seed and other rounding: learned "
            f"{points(found['learned'])}, facts and instructions {points(found['general'])}. One "
            "seed does not settle a comparison with this method."
            for name, found in numbers.get("repeats", {}).items()
        ),
        describe_drift(numbers),
    ]
    if numbers["bf16"]:
        text.append(table_of_formats(numbers))
    else:
        missing.append("float32 and bfloat16 weights")
    if numbers["pareto"]:
        text.append(" ".join([describe_sweep(numbers["sweep"]), *numbers["pareto"]]))
    else:
        missing.append("learning rates at which the methods learn equally much (`sweep`)")
    if numbers.get("influence"):
        text.append(table_of_influence(numbers))
    else:
        missing.append("influence of one response")
    text += [describe_risk(arm, found) for arm, found in numbers.get("fisher", {}).items()]
    if not numbers.get("fisher"):
        missing.append("risk of gradients")
    if missing:
        text.append(f"Not run: {'; '.join(missing)}.")
    text.append("These are measurements of these runs, and no claim beyond them.")
    return "\n\n".join(text) + "\n"


def render_figure() -> str:
    return draw_figure(json.loads(NUMBERS.read_text())["arms"], TITLES)


def render_part() -> str:
    return render_section(json.loads(NUMBERS.read_text()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        added = add_numbers(json.loads(NUMBERS.read_text()), collect_numbers(sys.argv[2:]))
        NUMBERS.write_text(json.dumps(added) + "\n")
    print_or_write("smol", render_part)
    if "--write" in sys.argv:
        FIGURE.write_text(render_figure())
