"""The report on finished, running and crashed runs, and how it looks in a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import demo
from cptjax.common import files, run_log
from cptjax.evaluation import matrix, report, summary
from cptjax.evaluation.report import charts, expect, read, svg, words

TASKS = ["colour", "shape", "digit", "count"]
GENERAL = ["arith", "facts", "jigsaw"]
STEPS = 60
SCENES = {  # name -> (what an old task loses a stage, what general tasks lose a stage, stages)
    "sft_bare": (0.13, 0.22, TASKS),
    "sft_style": (0.02, 0.01, TASKS),
    "grpo": (0.01, -0.005, TASKS),
    "joint": (0.0, 0.95, [TASKS]),
}


def cell(stage, name, task, value, metric="accuracy", step=STEPS, n=192):
    p = value if metric == "kl_base" else min(max(value, 0.0), 1.0)
    values = (
        stage,
        name,
        step,
        task,
        metric,
        p,
        n,
        abs(p * (1 - p) / n) ** 0.5,
        "exact",
        "answer",
        "1024-1024",
        "T=0 max=8",
    )
    return dict(zip(run_log.EVAL_COLUMNS, values, strict=True))


def evaluate(log, stage, stages, lost, lost_general, rng, step=STEPS, metric="accuracy"):
    name = "+".join(np.atleast_1d(stages[stage - 1])) if stage else "base"
    for k, task in enumerate(TASKS):
        learned = next((i for i, s in enumerate(stages, 1) if task in np.atleast_1d(s)), 0)
        value = 0.55 + 0.04 * k if stage < learned or not stage else 0.95 - lost * (stage - learned)
        log.evals([cell(stage, name, task, value + rng.normal(0, 0.012), metric, step)])
        if metric == "accuracy":
            log.evals(
                [
                    cell(
                        stage,
                        name,
                        task,
                        value + 0.8 * lost * max(stage - learned, 0),
                        "accuracy_forced",
                    )
                ]
            )
            log.evals(
                [cell(stage, name, task, 0.02 + stage * (lost + 0.02) * (1 + 0.1 * k), "kl_base")]
            )
    for k, task in enumerate(GENERAL if metric == "accuracy" else []):
        log.evals([cell(stage, name, task, 0.97 - 0.05 * k - lost_general * stage)])
        log.evals(
            [
                cell(
                    stage,
                    name,
                    task,
                    0.97 - 0.05 * k - 0.1 * lost_general * stage,
                    "accuracy_forced",
                )
            ]
        )


def make(workdir, arm="grpo", upto=None, seed=0, crash=False, expect=()):
    """Writes a workdir as a run of `arm` would, up to a stage; a crashed one ends within a stage and within a line."""
    lost, lost_general, stages = SCENES[arm]
    rng, log = np.random.default_rng(seed), run_log.RunLog(workdir)
    method = {
        "name": arm.split("_")[0],
        "objective": "sft" if "sft" in arm else "policy",
        "kl_coef": 0.0,
    }
    config = {
        "name": arm,
        "seed": seed,
        "method": method,
        "stages": [{"task": s, "steps": STEPS} for s in stages],
        "expect": expect,
    }
    config["eval"] = {"tasks": "all", "general": GENERAL, "groups": {"text": ["arith", "facts"]}}
    files.write_json(Path(workdir) / "config.json", config)
    files.write_json(Path(workdir) / "versions.json", {"jax": "0.10.2", "devices": "cpu x 1"})
    evaluate(log, 0, stages, lost, lost_general, rng)
    upto = len(stages) if upto is None else upto
    for stage in range(1, upto + 1 + crash):
        train(log, workdir, stage, stages, arm, rng, STEPS if stage <= upto else STEPS // 3)
        if stage <= upto:
            evaluate(log, stage, stages, lost, lost_general, rng, STEPS // 2, "accuracy_mini")
            evaluate(log, stage, stages, lost, lost_general, rng)
            log.step(stage, STEPS, {"event": "evaluate", "seconds": 2.0})
    for stage in range(upto + 1):
        right = rng.random((4, 40)) < 0.9 - lost * stage
        log.predictions(
            stage,
            [
                {"task": t, "id": i, "score": float(right[k, i])}
                for k, t in enumerate(TASKS)
                for i in range(40)
            ],
        )
    log.close()
    if crash:
        with (Path(workdir) / "metrics.jsonl").open("a") as file:
            file.write('{"stage": 3, "st')
    return workdir


def train(log, workdir, stage, stages, arm, rng, steps):
    for step in range(1, steps + 1):
        reward = 0.95 - 0.4 * np.exp(-step / 15)
        values = {
            "loss": 0.4 * np.exp(-step / 20) + rng.normal(0, 0.01),
            "grad_norm": 1 + rng.normal(0, 0.1),
        }
        values |= {"seconds": 0.1, "tokens": 2000, "trained": 3000}
        if "sft" not in arm and arm != "joint":
            values |= {
                "reward": reward + rng.normal(0, 0.03),
                "response_length/mean": 4 + rng.normal(0, 0.1),
                "rollouts": 128,
                "frac_reward_zero_std": 1 - reward,
            }
        log.step(stage, step, values)
    if "sft" in arm or arm == "joint":
        return
    folder = Path(workdir) / "rollouts" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for step in (1, steps // 2, steps):
        pixels = np.full((32, 32, 3), 235, np.uint8)
        pixels[6:26, 6:26] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(folder / f"{stage}_{step}.png")
        drawn = [
            ("it is red", 1.0),
            ("answer : red", 1.0),
            ("i think blue", 0.0),
            ("it is <b>green</b>", 0.0),
            ("red", 1.0),
        ]
        shared = {
            "stage": stage,
            "step": step,
            "task": str(stages[stage - 1]),
            "id": f"{step}",
            "prompt": "What colour is the shape?",
            "answer": "red",
            "image": f"rollouts/images/{stage}_{step}.png",
        }
        rewards = [
            {"reward": r, "rewards": {"accuracy": r, "format": 1.0}, "advantage": r - 0.6}
            for _, r in drawn
        ]
        log.rollouts(
            stage,
            [
                {**shared, "response": text, **parts}
                for (text, _), parts in zip(drawn, rewards, strict=True)
            ],
        )


def written(*folders, out=None):
    return report.write_report(folders, out).read_text(encoding="utf-8")


def test_a_finished_run_reads_back_its_numbers(tmp_path):
    text = written(make(tmp_path / "grpo"))
    found = summary.summarise_run(summary.load_run_tables(tmp_path / "grpo"))
    numbers = found["metrics"]
    assert (
        words.format_percent(numbers["avg_acc"]["value"]) in text
        and words.format_points(numbers["fm_diagonal"]["value"]) in text
    )
    assert (
        'class="badge finished"' in text
        and "all 4 stages" in text
        and text.count("data:image/png;base64,") == 12
    )
    assert (
        "it is &lt;b&gt;green" in text and "<b>green" not in text
    )  # what a model says is never markup
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings[:3] == ["Accuracy after each stage", "Learning and forgetting", "Training"]
    assert headings[3:] == [
        "Sampled responses",
        "Which examples changed",
        "All numbers",
        "Cost",
        "Settings",
    ]


def test_the_page_needs_no_network(tmp_path):
    text = written(make(tmp_path / "a", "sft_bare"), make(tmp_path / "b", "grpo"))
    assert (
        not re.findall(r"(?:src|href)=[\"'](?!data:)", text)
        and "<script" not in text
        and "@import" not in text
        and "url(" not in text
    )


def test_crashed_running_and_fresh_runs(tmp_path):
    text = written(make(tmp_path / "crash", upto=2, crash=True))
    assert 'class="badge running"' in text and "2 of 4 stages so far" in text
    for path in (tmp_path / "crash").rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert 'class="badge stopped"' in written(tmp_path / "crash", out=tmp_path / "again.html")
    files.write_json(tmp_path / "fresh/config.json", {"stages": [{"task": "a"}, {"task": "b"}]})
    assert "No stage has been evaluated yet." in written(tmp_path / "fresh")
    assert "The base model scores" in written(make(tmp_path / "base_only", upto=0))


def test_arms_stand_side_by_side_in_the_papers_order(tmp_path):
    for arm in SCENES:
        make(tmp_path / arm, arm)
    make(tmp_path / "base", "joint")  # the run that made the base model is no arm
    text = written(tmp_path)
    assert [a.label for a in read.read_arms([tmp_path])] == [
        "sft_bare",
        "sft_style",
        "grpo",
        "joint",
    ]
    assert "keeps most of what it learned" in text and "sft_bare</b> keeps least" in text
    assert re.search(r"About <b>\d+%</b> of <b>sft_bare</b>'s loss is only format", text)
    assert re.search(
        r"On <b>text</b>, <b>grpo</b> changed by <b>[^<]*</b> and <b>sft_bare</b> by", text
    )  # joint lost more: no rival
    assert all(
        f">{column}</th>" in text
        for column in ("Learned gain", "text Δ", "text Δ, forced", "Intransigence")
    )
    kept = charts.arms_format_chart(read.read_arms([tmp_path]))
    assert "sft_bare, free" in kept and "joint" not in kept
    assert re.search(
        r"sft_bare</th><td>train</td><td>24s</td>\s*<td>720 k</td><td>480 k</td>", text
    )  # 4 x 60 steps


def test_runs_of_a_seed_are_compared_with_the_joint_run_of_that_seed(tmp_path):
    for seed in (1, 2):
        make(tmp_path / "grpo" / f"seed{seed}", seed=seed)
    joint = make(tmp_path / "joint" / "seed2", "joint", seed=2)
    report.write_comparison(tmp_path)
    found = [
        json.loads((tmp_path / f"grpo/seed{s}/summary.json").read_text())["metrics"][
            "intransigence"
        ]["value"]
        for s in (1, 2)
    ]
    assert (
        found
        == [
            None,
            summary.summarise_table(
                *(summary.load_run_tables(p).accuracy for p in (tmp_path / "grpo/seed2", joint))
            )["metrics"]["intransigence"]["value"],
        ]
        and found[1] is not None
    )
    spreads = json.loads((tmp_path / "report.json").read_text())["arms"]
    assert (
        spreads["grpo"]["intransigence"] == {"mean": found[1], "sd": None, "n": 1}
        and spreads["grpo"]["avg_acc"]["n"] == 2
    )
    assert "fm_peak_all" not in spreads["joint"]


def test_bases_that_differ_are_shown_as_such(tmp_path):
    for k, name in enumerate(("a", "b")):
        make(tmp_path / name, seed=k)
    assert "same base model" not in written(tmp_path)  # two seeds
    config = json.loads((tmp_path / "b/config.json").read_text())
    files.write_json(tmp_path / "b/config.json", config | {"seed": 0})
    low, high = sorted(
        r.summary["tasks"]["colour"]["base"] for a in read.read_arms([tmp_path]) for r in a.runs
    )
    text = written(tmp_path)
    assert (
        "do not start from the same base model" in text
        and f">{words.format_percent(low)} to {words.format_percent(high)}</td>" in text
    )


def test_an_exported_model_inside_a_run_is_no_run(tmp_path):
    files.write_json(make(tmp_path / "grpo") / "export/config.json", {"model_type": "qwen2_5_vl"})
    make(tmp_path / "grpo" / "other", "sft_bare")
    assert [(a.label, len(a.runs)) for a in read.read_arms([tmp_path])] == [
        ("grpo", 1),
        ("other", 1),
    ]


EXPECT = [
    {"arm": "grpo", "metric": "text", "at_least": -0.05},
    {"arm": "sft_bare", "metric": "fm_diagonal", "at_most": -0.9},
    {"arm": "grpo", "metric": "fm_diagonal", "above": "sft_bare"},
    {"arm": ["grpo", "sft_bare"], "metric": "learned_gain", "within": 0.04},
    {"arm": "sft_bare", "metric": "text", "at_most": -0.5, "mean": True},
    {"arm": "iterative", "metric": "text", "at_least": 0.0},
]


def test_expectations_are_met_missed_or_not_judged(tmp_path):
    for arm in ("grpo", "sft_bare"):
        for seed in (0, 2):
            make(tmp_path / arm / f"seed{seed}", arm, seed=seed, expect=EXPECT)
    text = written(tmp_path)
    metrics = {
        v["expect"]["metric"] + str(k): v
        for v in json.loads((tmp_path / "report.json").read_text())["expected"]
        for k, e in enumerate(EXPECT)
        if e == v["expect"]
    }
    assert {name: v["met"] for name, v in metrics.items()} == {
        "text0": True,
        "fm_diagonal1": False,
        "fm_diagonal2": True,
        "learned_gain3": True,
        "text4": True,
        "text5": None,
    }
    number = lambda arm, seed, name: summary.summarise_table(
        summary.load_run_tables(tmp_path / arm / f"seed{seed}").accuracy
    )["metrics"][name]["value"]
    for seed in (0, 2):
        fm, gain = (
            [number(arm, seed, name) for arm in ("grpo", "sft_bare")]
            for name in ("fm_diagonal", "learned_gain")
        )
        assert metrics["fm_diagonal2"]["found"][f"seed{seed}"] == {
            "value": pytest.approx(fm[0] - fm[1]),
            "met": True,
        }
        assert metrics["learned_gain3"]["found"][f"seed{seed}"]["value"] == pytest.approx(
            abs(gain[0] - gain[1])
        )
    mean = np.mean([number("sft_bare", s, "text") for s in (0, 2)])
    assert (
        metrics["text4"]["found"] == {"mean": {"value": pytest.approx(mean), "met": True}}
        and metrics["text5"]["found"] == {}
    )
    assert "<b>4 of 6</b> expectations are met, 1 not judged" in text
    worst = ", ".join(
        f"{words.format_points(number('sft_bare', s, 'fm_diagonal'))} (seed{s})" for s in (0, 2)
    )
    assert f"Missed: <b>FM of sft_bare at most −90.0</b>; found <b>{worst}</b>" in text


def test_a_run_that_is_not_finished_is_not_judged(tmp_path):
    make(tmp_path / "grpo" / "seed0", expect=EXPECT[:1])
    make(tmp_path / "grpo" / "seed1", seed=1, upto=3, expect=EXPECT[:1])
    (verdict,) = expect.judge_expectations(read.read_arms([tmp_path]))
    assert (
        verdict.met is None
        and verdict.values["seed1"] is None
        and verdict.holds(verdict.values["seed0"])
    )
    at_bound = expect.Verdict({"arm": "a", "metric": "text", "at_least": -0.03}, {})
    assert at_bound.holds(0.97 - 1.0) and not at_bound.holds(-0.031)
    assert not expect.Verdict({"arm": "a", "metric": "text", "above": "b"}, {}).holds(0.0)


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            {"arm": "grpo", "metric": "text"},
            "expected arm, metric, one of at_least, at_most, above, within",
        ),
        (
            {"arm": "grpo", "metric": "text", "at_least": 0, "at_most": 1},
            "expected arm, metric, one of",
        ),
        ({"arm": "grpo", "metric": "text", "at_least": "0"}, "expected arm, metric, one of"),
        (
            {"arm": "grpo", "metric": "text", "within": 0.1},
            "expected a tuple of arms with within",
        ),
        ({"arm": ("grpo", "sft_bare"), "metric": "text", "at_most": 0}, "otherwise one arm"),
        (
            {"arm": "gpro", "metric": "text", "at_most": 0},
            "names the arm 'gpro'; did you mean 'grpo'",
        ),
        ({"arm": "grpo", "metric": "fm_diagonal", "above": "zz"}, "names the arm 'zz'; known:"),
        (
            {"arm": "grpo", "metric": "txt", "at_most": 0},
            "names the metric 'txt'; did you mean 'text'",
        ),
    ],
)
def test_expectations_that_no_report_could_judge_are_refused(entry, message):
    config = demo.get_config()
    expect.check_expectations(config)
    config.expect = (entry,)
    with pytest.raises(ValueError, match=message):
        expect.check_expectations(config)
    if "the arm" in message:  # of a run without arms they are the folders beside it
        config.arms = ConfigDict()
        expect.check_expectations(config)
    config.expect, config.eval.groups = (), ConfigDict({"gain": ("facts",)})
    with pytest.raises(ValueError, match="gain already names a number"):
        expect.check_expectations(config)


def test_seeds_of_an_arm_become_mean_and_deviation(tmp_path):
    for seed in range(3):
        make(tmp_path / "grpo" / f"seed{seed}", "grpo", seed=seed)
    make(tmp_path / "sft_bare" / "seed0_order1", "sft_bare")
    arms = read.read_arms([tmp_path])
    assert [(a.label, len(a.runs)) for a in arms] == [("sft_bare", 1), ("grpo", 3)]
    values = [r.metric("avg_acc")["value"] for r in arms[1].runs]
    assert (
        words.format_spread(arms[1].spread("avg_acc"))
        == f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
    )
    assert "Seed by seed" in written(tmp_path) and "Seed by seed" in written(tmp_path / "grpo")


def test_a_repeated_task_and_different_task_sets_do_not_break_the_page(tmp_path):
    make(tmp_path / "a")
    config = {
        "stages": [
            {"task": "colour"},
            {"task": "shape"},
            {"task": "colour"},
            {"task": ["digit", "other"]},
        ]
    }
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    files.write_json(tmp_path / "b/config.json", config)
    assert "other" in written(tmp_path / "a", tmp_path / "b", out=tmp_path / "c.html")


def test_pictures_come_only_from_the_workdir(tmp_path):
    run = read.read_run(make(tmp_path / "run"), "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    assert (
        read.rollout_thumbnail(run, "../secret.png") is None
        and read.rollout_thumbnail(run, "https://x/y.png") is None
        and read.rollout_thumbnail(run, None) is None
    )
    Image.new("RGB", (2000, 1000)).save(tmp_path / "run/big.png")
    assert len(read.rollout_thumbnail(run, "big.png")) < 20_000


def test_long_rollout_files_are_sampled_at_both_ends(tmp_path, monkeypatch):
    run = read.read_run(make(tmp_path / "run"), "run")
    monkeypatch.setattr(read, "ROLLOUT_BYTES", 600)
    rows = read.read_rollouts(run, 1)
    assert rows[0]["step"] == 1 and rows[-1]["step"] == STEPS and 0 < len(rows) < 15


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 100, [0, 20, 40, 60, 80, 100]), (-0.3, 0.1, [-0.3, -0.2, -0.1, 0, 0.1]), (5, 5, [5, 6])],
)
def test_ticks_are_round_and_reach_both_ends(low, high, expected):
    assert svg.axis_ticks(low, high)[0] <= low and svg.axis_ticks(low, high)[-1] >= high
    assert svg.axis_ticks(low, high) == pytest.approx(expected)


def test_changes_within_their_interval_are_not_called_changes():
    assert (
        words.describe_change({"value": -0.01, "stderr": 0.01})
        == "did not measurably change (−1.0 ± 2.0 points)"
    )
    assert words.describe_change({"value": -0.1, "stderr": 0.01}) == "fell by 10.0 points"
    assert (
        words.format_points(-0.0001) == "0.0"
        and words.format_points(None) == "–"
        and words.format_amount(12_340) == "12.3 k"
    )


def test_widened_axes_keep_their_limit():
    assert (
        svg.widen_range([94, 95], 20, 100) == [80, 100]
        and svg.widen_range([10, 60], 20, 100) == [10, 60]
        and svg.widen_range([5], 4) == [3, 7]
    )


def test_arms_within_noise_are_not_ranked(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        make(tmp_path / name, "grpo", seed=seed)
    said = words.comparison_headline(read.read_arms([tmp_path]))
    assert said[0].startswith("All keep about equally much of what they learned (FM <b>−")


def test_arms_apart_in_every_seed_are_ranked_though_seeds_differ_much():
    found = lambda value: {"value": value, "stderr": 0.0}
    metrics = lambda value: {
        "metric": lambda name: found(value),
        "summary": {"metrics": {"fm_diagonal": found(value)}},
    }
    run = lambda seed, value: types.SimpleNamespace(variant=f"seed{seed}", **metrics(value))
    arm = lambda label, values: read.Arm(
        label, tuple(run(seed, v) for seed, v in enumerate(values))
    )
    said = lambda *values: words.best_and_worst_sentence(
        [arm("calm", (0.0, -0.01, 0.0)), arm("wild", values)],
        "fm_diagonal",
        "{best} {worst}",
        "alike",
    )
    assert "each of the <b>3</b> seeds" in said(-0.1, -0.7, -0.15) and said(
        -0.1, -0.7, 0.01
    ) == "alike" == said(-0.1, -0.7)


def test_a_conversation_is_shown_as_its_text():
    assert (
        read.prompt_text(
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "What?"}],
                }
            ]
        )
        == "What?"
    )
    assert read.prompt_text("plain") == "plain" and read.prompt_text(None) == ""


def launch(*args):
    command = [sys.executable, "launch/report.py", *map(str, args)]
    root = Path(__file__).parents[2]
    return subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


def test_the_launcher_answers_in_one_line(tmp_path):
    done = launch(make(tmp_path / "run"), f"--out={tmp_path / 'x.html'}")
    assert (
        done.returncode == 0
        and done.stdout.strip() == str(tmp_path / "x.html")
        and (tmp_path / "x.html").exists()
    )
    (tmp_path / "empty").mkdir()
    refused = launch(tmp_path / "empty")
    assert (
        refused.returncode == 2
        and refused.stderr.count("\n") == 1
        and "is no run" in refused.stderr
    )


BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


PHONE, DESKTOP = 390, 1280


def screenshot(html, png, width, height=2400, dark=False):
    """Shows a page in a frame of that width, since a headless window is never as narrow as a phone."""
    frame = Path(f"{png}.html")
    frame.write_text(
        f'<body style="margin:0"><iframe src="{html}" style="width:{width}px;height:{height}px;border:0;display:block">'
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={png}.profile",
        f"--screenshot={png}",
        f"--window-size={max(width, 500)},{height}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    subprocess.run(
        [BROWSER, *flags, f"file://{frame}"], capture_output=True, timeout=120, check=True
    )
    with Image.open(png) as image:
        return np.asarray(image.convert("L"), float)[:, :width]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_it_looks_like_a_page_in_a_browser(tmp_path, width):
    for arm in ("sft_bare", "grpo"):
        make(tmp_path / arm, arm)
    pages = [
        report.write_report([tmp_path / "grpo"], tmp_path / "run.html"),
        report.write_report([tmp_path], tmp_path / "compare.html"),
    ]
    for html in pages:
        light, dark = (
            screenshot(html, tmp_path / f"{html.stem}{d}.png", width, dark=d) for d in (False, True)
        )
        assert light.mean() > 195 and dark.mean() < 75  # paper and night
        for image in (light, dark):
            ink = np.abs(image - np.median(image)) > 60
            assert (
                ink.any(1).mean() > 0.3 and ink[:300].any() and ink[-300:].any()
            )  # from top to bottom
            assert not ink[:, -8:].any()  # nothing sticks out on the right


def test_every_number_has_a_title():
    assert {*matrix.FORMULAS, "format_share"} == set(words.METRIC_TITLES)
