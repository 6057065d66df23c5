"""Finding runs and arms in folders, and reading what the pages show."""

import numpy as np
import pytest
from PIL import Image
from report_runs import STEPS, eval_row, make_run, write_page

from cptjax.analysis import drift
from cptjax.common import files, run_log
from cptjax.evaluation import report, summary
from cptjax.evaluation.report import charts, read, words


def test_an_exported_model_inside_a_run_is_not_a_run(tmp_path):
    files.write_json(
        make_run(tmp_path / "grpo") / "export/config.json", {"model_type": "qwen2_5_vl"}
    )
    make_run(tmp_path / "grpo" / "other", "sft_bare")
    assert [(a.label, len(a.runs)) for a in read.read_arms([tmp_path])] == [
        ("grpo", 1),
        ("other", 1),
    ]


def test_seeds_of_an_arm_become_mean_and_deviation(tmp_path):
    for seed in range(3):
        make_run(tmp_path / "grpo" / f"seed{seed}", "grpo", seed=seed)
    make_run(tmp_path / "sft_bare" / "seed0_order1", "sft_bare")
    arms = read.read_arms([tmp_path])
    assert [(a.label, len(a.runs)) for a in arms] == [("sft_bare", 1), ("grpo", 3)]
    values = [r.metric("avg_acc")["value"] for r in arms[1].runs]
    assert (
        words.format_spread(arms[1].spread("avg_acc"))
        == f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
    )
    assert "Seed by seed" in write_page(tmp_path) and "Seed by seed" in write_page(
        tmp_path / "grpo"
    )


@pytest.mark.parametrize(
    "folders, labels",
    [
        (["a/sft", "a/grpo"], ["sft", "grpo"]),
        (["lr1e-5/grpo", "lr1e-6/grpo", "x/sft"], ["lr1e-5/grpo", "lr1e-6/grpo", "sft"]),
        (["mon/demo/grpo", "tue/demo/grpo"], ["mon/demo/grpo", "tue/demo/grpo"]),
        (["1/x/grpo", "2/x/grpo", "1/y/grpo"], ["1/x/grpo", "2/x/grpo", "y/grpo"]),
        (["x/grpo", "x/grpo", "y/grpo"], ["x/grpo", "x/grpo (2)", "y/grpo"]),
    ],
)
def test_arms_of_equal_name_have_distinct_labels(tmp_path, folders, labels):
    assert read.distinct_labels([tmp_path / folder for folder in folders]) == labels


def test_a_run_under_several_folders_counts_once(tmp_path):
    for name in ("sft/seed0", "sft/seed1", "grpo/seed0"):
        make_run(tmp_path / name)
    for folders in (("", "sft"), ("sft/seed1", ""), ("sft", "grpo", "sft/", "grpo/seed0")):
        arms = read.read_arms([tmp_path / folder for folder in folders])
        assert {arm.label: len(arm.runs) for arm in arms} == {"sft": 2, "grpo": 1}


def test_a_damaged_config_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "versions.json").write_text("{}")
    (run / "config.json").write_text("")
    with pytest.raises(ValueError, match="run/config.json: expected JSON .*; restore the file"):
        read.read_arms([tmp_path])


def test_arms_of_equal_name_keep_their_own_numbers(tmp_path):
    for name, arm in (("lr1e-5", "sft_bare"), ("lr1e-6", "grpo")):
        for seed in range(2):
            make_run(tmp_path / name / "grpo" / f"seed{seed}", arm, seed=seed)
    write_page(tmp_path / "lr1e-5", tmp_path / "lr1e-6", out=tmp_path / "page.html")
    numbers = files.read_json(tmp_path / "page.json")
    means = {label: arm["fm_diagonal"]["mean"] for label, arm in numbers["arms"].items()}
    assert means["lr1e-5/grpo"] < means["lr1e-6/grpo"] - 0.1
    assert list(numbers["differences"]) == ["lr1e-6/grpo"]


def test_unfinished_runs_do_not_count_beside_finished_ones(tmp_path):
    """Neither in means nor in charts; their base model's accuracy is no result of an arm."""
    for seed, upto in enumerate((None, None, 0, 2)):
        make_run(tmp_path / "grpo" / f"seed{seed}", "grpo", seed=seed, upto=upto)
    for seed, upto in enumerate((1, 0)):
        make_run(tmp_path / "sft_bare" / f"seed{seed}", "sft_bare", seed=seed, upto=upto)
    page = write_page(tmp_path)
    sft, grpo = read.read_arms([tmp_path])
    values = [run.metric("avg_acc")["value"] for run in grpo.runs]
    assert values[2] is None and grpo.runs[2].summary["tasks"]["colour"]["final"] is None
    assert grpo.runs[2].summary["groups"]["text"]["final"] is None
    assert grpo.spread("avg_acc") == summary.mean_and_sd(values[:2])
    spread = files.read_json(tmp_path / "report.json")["arms"]["grpo"]["avg_acc"]
    assert spread == summary.mean_and_sd(values[:2])
    assert f">{words.format_spread(spread)}</td>" in page
    # No run of SFT is finished: all count, but one has no stage yet.
    assert sft.spread("avg_acc") == {
        "mean": sft.runs[0].metric("avg_acc")["value"],
        **{"sd": None, "n": 1},
    }
    shown = charts.arms_plasticity_chart([grpo])
    assert shown.count("<circle") == 3  # two seeds and their mean


def test_stages_beyond_the_last_complete_evaluation_are_left_out(tmp_path):
    workdir = make_run(tmp_path / "run", "sft_bare", upto=3)
    stages = lambda: [row["stage"] for row in read.read_run(workdir, "run").evaluated_stages]
    assert stages() == [1, 2, 3]
    lines = (workdir / "evals.csv").read_text().splitlines(True)
    for left_out in ("arith", "shape"):  # a general task, and a task of the sequence
        kept = [line for line in lines if not (line[0] == "3" and f",{left_out}," in line)]
        (workdir / "evals.csv").write_text("".join(kept))
        assert stages() == [1, 2]
        assert [d.stage for d in drift.drift_of_stages(read.read_run(workdir, "run"), False)] == [
            1,
            2,
        ]
        chart = charts.base_kl_chart([("run", 0, read.read_run(workdir, "run"))])
        assert "stage 2 (shape)" in chart and "stage 3" not in chart


def test_images_are_embedded_only_from_the_workdir(tmp_path):
    run = read.read_run(make_run(tmp_path / "run"), "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    assert (
        read.rollout_thumbnail(run, "../secret.png") is None
        and read.rollout_thumbnail(run, "https://x/y.png") is None
        and read.rollout_thumbnail(run, None) is None
    )
    Image.new("RGB", (2000, 1000)).save(tmp_path / "run/big.png")
    assert len(read.rollout_thumbnail(run, "big.png")) < 20_000
    (tmp_path / "run/program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    assert read.rollout_thumbnail(run, "program.png") is None, "Pillow would start Ghostscript"


def test_long_rollout_files_are_read_at_both_ends(tmp_path, monkeypatch):
    run = read.read_run(make_run(tmp_path / "run"), "run")
    monkeypatch.setattr(read, "ROLLOUT_BYTES", 600)
    rows = read.read_rollouts(run, 1)
    assert rows[0]["step"] == 1 and rows[-1]["step"] == STEPS and 0 < len(rows) < 15


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


def test_arms_are_in_the_order_of_their_config(tmp_path):
    """`runs.json` has the order, and the runs that have not started."""
    for arm in ("joint", "sft_bare", "grpo", "added"):
        make_run(tmp_path / arm / "seed0", arm if arm != "added" else "grpo")
    assert [a.label for a in read.read_arms([tmp_path])] == ["sft_bare", "added", "grpo", "joint"]
    names = [f"{arm}/seed{s}" for arm in ("joint", "grpo", "later", "sft_bare") for s in (0, 1)]
    report.write_comparison(tmp_path, names)
    assert [a.label for a in read.read_arms([tmp_path])] == ["grpo", "sft_bare", "added", "joint"]
    missing = ["joint/seed1", "grpo/seed1", "later/seed0", "later/seed1", "sft_bare/seed1"]
    assert read.missing_runs([tmp_path]) == missing
    assert (
        f'title="{", ".join(missing)}">5 runs not started' in (tmp_path / "report.html").read_text()
    )


def test_single_stages_from_the_base_model_are_the_reference_of_plasticity(tmp_path):
    """They are no arms, and an unfinished one is no reference."""
    for arm in ("grpo", "sft_bare"):
        make_run(tmp_path / arm, arm)
    fresh = {2: ("shape", 0.75), 3: ("digit", 0.8), 4: ("count", None)}
    for number, (task, value) in fresh.items():
        folder = tmp_path / "grpo/fresh" / f"stage{number}"
        files.write_json(folder / "config.json", {"stages": [{"task": task, "steps": 1}]})
        if value is not None:
            log = run_log.RunLog(folder)
            log.evals([eval_row(1, task, task, value)])
            log.close()
    report.write_comparison(tmp_path)
    table = summary.load_run_tables(tmp_path / "grpo").accuracy
    expected = np.mean([table.cells[2, "shape"].value - 0.75, table.cells[3, "digit"].value - 0.8])
    for arm, value in (("grpo", expected), ("sft_bare", None)):
        found = files.read_json(tmp_path / arm / "summary.json")["metrics"]["plasticity"]
        assert found["value"] == (value if value is None else pytest.approx(value))
        page = (tmp_path / arm / "report.html").read_text()
        assert (">Plasticity</th>" in page) == (arm == "grpo")
    assert [a.label for a in read.read_arms([tmp_path])] == ["sft_bare", "grpo"]
    assert ">Plasticity</th>" in (tmp_path / "report.html").read_text()
    size = lambda: summary.summarise_run(summary.load_run_tables(tmp_path / "grpo"))["cost"][
        "bytes"
    ]
    before = size()
    (tmp_path / "grpo/fresh/stage2/checkpoint").write_bytes(b"0" * 1000)
    assert size() == before  # what another run stores
