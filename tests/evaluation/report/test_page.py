"""The two report pages, for finished, running and crashed runs, and in a real browser."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import ARMS, eval_row, make_run, write_page

from cptjax.common import files, run_log
from cptjax.evaluation import report, summary
from cptjax.evaluation.report import page, read, words


def test_the_page_of_a_finished_run_shows_its_numbers(tmp_path):
    text = write_page(make_run(tmp_path / "grpo"))
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


def test_the_page_names_the_scorer_of_each_number(tmp_path):
    workdir = make_run(tmp_path / "grpo")
    log = run_log.RunLog(workdir)
    row = eval_row(0, "base", "colour", 0.5, metric="mme/perception") | {
        "scorer": "mme@1=lmms-eval"
    }
    log.evals([row | {"value": 1234.5}])
    log.close()
    text = write_page(workdir)
    assert "How each task is scored" in text and "mme@1=lmms-eval" in text and "1234.5" in text
    (score,) = [s for s in summary.load_run_tables(workdir).scores if s["metric"][:3] == "mme"]
    assert (score["base"], score["final"], score["template"]) == (1234.5, None, "answer")


def test_the_page_needs_no_network(tmp_path):
    text = write_page(make_run(tmp_path / "a", "sft_bare"), make_run(tmp_path / "b", "grpo"))
    assert (
        not re.findall(r"(?:src|href)=[\"'](?!data:)", text)
        and "<script" not in text
        and "@import" not in text
        and "url(" not in text
    )


def test_crashed_running_and_fresh_runs_show_their_state(tmp_path):
    text = write_page(make_run(tmp_path / "crash", upto=2, crash=True))
    assert 'class="badge running"' in text and "2 of 4 stages so far" in text
    for path in (tmp_path / "crash").rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert 'class="badge stopped"' in write_page(tmp_path / "crash", out=tmp_path / "again.html")
    files.write_json(tmp_path / "fresh/config.json", {"stages": [{"task": "a"}, {"task": "b"}]})
    assert "No stage has been evaluated yet." in write_page(tmp_path / "fresh")
    assert "The base model scores" in write_page(make_run(tmp_path / "base_only", upto=0))


def test_arms_are_compared_in_the_papers_order(tmp_path):
    for arm in ARMS:
        make_run(tmp_path / arm, arm)
    make_run(tmp_path / "base", "joint")  # the run that made the base model is no arm
    text = write_page(tmp_path)
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
    assert re.search(
        r"sft_bare</th><td>train</td><td>24s</td>\s*<td>720 k</td><td>480 k</td>", text
    )  # 4 x 60 steps


def test_seeds_with_other_settings_are_named(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / "a" / f"seed{seed}", seed=seed)
    assert "differ in more than the seed" not in write_page(tmp_path)
    path = tmp_path / "a" / "seed1" / "config.json"
    config = json.loads(path.read_text())
    files.write_json(path, config | {"stages": config["stages"][::-1]})  # another order
    assert "differ in more than the seed" not in write_page(tmp_path)
    config["stages"][0]["steps"] = 7
    files.write_json(path, config | {"train": {"lr": 0.5}})
    assert "The runs of a differ in more than the seed: stages, train.lr." in write_page(tmp_path)


def test_different_base_models_are_shown_as_a_range(tmp_path):
    for k, name in enumerate(("a", "b")):
        make_run(tmp_path / name, seed=k)
    assert "same base model" not in write_page(tmp_path)  # two seeds
    config = json.loads((tmp_path / "b/config.json").read_text())
    files.write_json(tmp_path / "b/config.json", config | {"seed": 0})
    low, high = sorted(
        r.summary["tasks"]["colour"]["base"] for a in read.read_arms([tmp_path]) for r in a.runs
    )
    text = write_page(tmp_path)
    assert (
        "do not start from the same base model" in text
        and f">{words.format_percent(low)} to {words.format_percent(high)}</td>" in text
    )


def test_a_repeated_task_and_different_task_sets_do_not_break_the_page(tmp_path):
    make_run(tmp_path / "a")
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
    assert "other" in write_page(tmp_path / "a", tmp_path / "b", out=tmp_path / "c.html")


BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
PHONE, TABLET, DESKTOP = 390, 768, 1280


def run_browser(page, *flags):
    """Open a page in a headless browser; return what it prints."""
    quiet = ["quic", "gpu", "background-networking", "component-update", "sync"]
    command = [BROWSER, "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars"]
    command += [f"--disable-{name}" for name in quiet] + [f"--user-data-dir={page}.profile"]
    done = subprocess.run(
        [*command, *flags, f"file://{page}"], capture_output=True, timeout=120, check=True
    )
    return done.stdout.decode()


def write_frame(html, path, width, height, script=""):
    """Write a page that shows another in a narrow frame, since headless windows are wide."""
    style = f"width:{width}px;height:{height}px;border:0;display:block"
    frame = f'<iframe src="{html}" style="{style}"></iframe>'
    path.write_text(f'<body style="margin:0">{script}{frame}</body>')
    return path


def screenshot(html, png, width, height=2400, dark=False):
    frame = write_frame(html, Path(f"{png}.html"), width, height)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    run_browser(frame, f"--screenshot={png}", f"--window-size={max(width, 500)},{height}", scheme)
    with Image.open(png) as image:
        return np.asarray(image.convert("L"), float)[:, :width]


MEASURE = """<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const boxes = [...document.querySelectorAll(".scroll, pre")];
  const outside = [...document.querySelectorAll("body *")].filter(e =>
    e.getBoundingClientRect().right > innerWidth + 1 && !boxes.some(b => b !== e && b.contains(e)));
  parent.postMessage({
    outside: outside.map(e => e.outerHTML.slice(0, 80)),
    page: document.documentElement.scrollWidth - innerWidth,
    scrolling: boxes.filter(b => b.matches(".scroll")).map(b => [b.scrollWidth > b.clientWidth + 1,
      b.querySelector(".hint").getBoundingClientRect().height > 10]),
  }, "*");
});
</script>"""
RECEIVE = """<script>
addEventListener("message", e => document.body.dataset.found = JSON.stringify(e.data));
</script>"""


def measure(html, width):
    """Return the elements outside the page, and which scroll boxes scroll and show hints."""
    copy = html.with_name(f"measured{width}_{html.name}")
    copy.write_text(html.read_text().replace("</body>", MEASURE + "</body>"))
    frame = write_frame(copy, html.with_name(f"frame{width}_{html.name}"), width, 2000, RECEIVE)
    dom = run_browser(frame, "--dump-dom", "--virtual-time-budget=5000", "--window-size=1400,2000")
    return json.loads(unescape(re.search('data-found="([^"]*)"', dom)[1]))


def make_many_tasks(workdir, count=12):
    """Write a workdir with many tasks of long names."""
    names = [f"a_task_with_a_long_name_{k}" for k in range(count)]
    stages = [{"task": name, "steps": 1} for name in names]
    files.write_json(workdir / "config.json", {"name": "many", "stages": stages})
    log = run_log.RunLog(workdir)
    for stage in range(count + 1):
        log.evals([eval_row(stage, "", name, 0.5 + 0.03 * stage) for name in names])
    log.close()
    return workdir


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [PHONE, TABLET, DESKTOP])
def test_only_scroll_boxes_are_wider_than_the_page_and_they_say_so(tmp_path, width):
    make_run(tmp_path / "grpo")
    make_many_tasks(tmp_path / "many")
    pages = [
        report.write_report([tmp_path / "grpo"], tmp_path / "run.html"),
        report.write_report([tmp_path], tmp_path / "compare.html"),
    ]
    scrolling = []
    for html in pages:
        found = measure(html, width)
        assert found["outside"] == [] and found["page"] <= 0
        assert all(scrolls == hint for scrolls, hint in found["scrolling"])
        scrolling += [scrolls for scrolls, _ in found["scrolling"]]
    assert any(scrolling) and not all(scrolling)  # some fit; 12 tasks with long names do not


def test_every_table_and_gallery_is_in_a_scroll_box(tmp_path):
    make_run(tmp_path / "grpo")
    make_many_tasks(tmp_path / "many")
    for text in (write_page(tmp_path / "grpo"), write_page(tmp_path)):
        body = text.partition("</style>")[2]
        wide = len(re.findall('<table|class="strip"', body))
        in_box = re.findall(
            r'<div class="scroll"><div class="wide"><div class="hint"><span>scroll sideways →</span></div>'
            r'\s*<(?:table|div class="strip")',
            body,
        )
        assert wide == len(in_box) > 3


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_fills_the_window_in_light_and_dark(tmp_path, width):
    for arm in ("sft_bare", "grpo"):
        make_run(tmp_path / arm, arm)
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


def test_the_cost_of_a_method_is_that_of_its_training_and_its_difference(tmp_path):
    """Evaluations do not count; means are over the runs of an arm."""
    costs = {"grpo": [(10.0, 4e12), (14.0, 6e12)], "sft_bare": [(3.0, 1e12)]}
    for arm, runs in costs.items():
        for seed in range(len(runs)):
            make_run(tmp_path / arm / f"seed{seed}", arm, seed=seed)
    arms = read.read_arms([tmp_path])
    for arm in arms:
        for run, (seconds, flops) in zip(
            arm.runs, costs[arm.runs[0].path.parent.name], strict=True
        ):
            parts = [
                {"work": "train", "seconds": seconds, "flops": flops},
                {"work": "evaluate", "seconds": 1e6, "flops": 1e18},
            ]
            run.summary["cost"] = {"parts": parts, "kept_bytes": 8, "array_bytes": 1e6}
    arms.sort(key=lambda arm: arm.runs[0].path.parent.name)
    grpo, sft = page.method_cost_rows(arms, arms[1])
    assert (grpo["seconds"], grpo["flops"]) == (12.0, 5e12)
    assert (grpo["extra_seconds"], grpo["extra_flops"]) == (9.0, 4e12)
    assert (sft["extra_seconds"], sft["kept_bytes"], sft["device_bytes"]) == (0.0, 8, None)
