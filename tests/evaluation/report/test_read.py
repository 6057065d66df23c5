"""Finding runs and arms in folders, and reading what the pages show."""

import numpy as np
from PIL import Image
from report_runs import STEPS, make_run, write_page

from cptjax.common import files
from cptjax.evaluation.report import read, words


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
