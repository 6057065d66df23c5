"""The pre-flight check names every bad row with its file, counts sizes, and sets the exit code."""

import dataclasses
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import run_helpers
from PIL import Image

from configs.base import METHODS
from configs.base import get_config as base
from cptjax.common import console
from cptjax.config import resolve_stages
from cptjax.data import processor, row_checks
from cptjax.data.data_config import DataConfig
from cptjax.data.datasets import Datasets
from cptjax.data.mixture import Mixture
from cptjax.models import load
from cptjax.models.families import PRESETS
from cptjax.planning import check, memory
from cptjax.tasks import prompted_task, registry
from cptjax.tasks.scoring import sandbox
from cptjax.training.programs import abstract_stage

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _silent():
    console.set_console_mode("silent")
    yield
    console.set_console_mode("auto")


def config(**tasks):
    c = base()
    c.stages = tuple({"task": name, "steps": 2} for name in tasks) or (
        {"task": "synthetic_colour", "steps": 2},
    )
    c.model.update(min_pixels=1024, max_pixels=4096, compute_dtype="float32")
    c.data.update(template="direct", prompt_limit=128, limit=40)
    c.eval.limit = 10
    c.train.batch = 8
    with c.unlocked():
        for name, task in tasks.items():
            c.tasks[name] = task
    return c


def write(folder, rows):
    Image.new("RGB", (64, 64), "red").save(folder / "good.png")
    (folder / "cut.jpg").write_bytes(_jpeg(folder)[:3000])
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(path), "test": str(path)}


def _jpeg(folder):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    return (folder / "whole.jpg").read_bytes()


def row(prompt="<image>what colour?", images=("good.png",), answer="red"):
    return {"prompt": prompt, "images": list(images), "answer": answer}


def test_counts_tokens_and_images():
    reports = check.run_preflight(config())
    assert [f.name for f in reports] == ["synthetic_colour train", "synthetic_colour test"]
    assert [(f.read, f.total, len(f.bad)) for f in reports] == [(40, 40, 0), (10, 10, 0)]
    assert {r.image_tokens for r in reports[0].rows} == {
        4
    }  # 32 x 32 pixels of 8 x 8 patches, 4 of which make a token
    assert {r.patches for r in reports[0].rows} == {16}
    assert len(reports[0].prompts) == 3 and "what colour" in reports[0].prompts[0]


def test_the_template_that_a_task_has_of_its_own_is_reported(tmp_path):
    source = write(tmp_path, [row()])
    c = config(mine=source | {"template": "boxed", "scorer": "exact"})
    assert {report.template for report in check.run_preflight(c)} == {"boxed"}
    assert c.data.template == "direct"


def test_rows_limits_what_is_read():
    reports = check.run_preflight(config(), rows=7)
    assert [(f.read, f.total) for f in reports] == [(7, 40), (7, 10)]
    with pytest.raises(ValueError, match="--rows=0"):
        check.run_preflight(config(), rows=0)


def test_wrong_rows_are_reported_with_file_and_row(tmp_path):
    wrong = [
        row(images=["none.png"]),
        row(images=["cut.jpg"]),
        row(prompt="no placeholder"),
        row(prompt="<image>" + "red " * 150),
    ]
    rows = [row(), *wrong, row()]
    c = config(mine=write(tmp_path, rows))
    with pytest.raises(
        ValueError,
        match=r"mine train: 4 bad rows, 0 allowed by data.bad_rows; the first: .*rows.jsonl:2: .*none.png",
    ):
        check.run_preflight(c)
    c.data.bad_rows = 4
    train = check.run_preflight(c)[0]
    assert len(train.rows) == 2 and (train.read, train.total) == (6, 6)
    reasons = {bad.row: bad.reason for bad in train.bad}
    assert set(reasons) == {2, 3, 4, 5}
    assert "cut short or corrupt" in reasons[3]
    assert "over the limit of 128; raise data.prompt_limit or lower model.max_pixels" in reasons[5]


def opened(c, folder):
    """The rows of a run."""
    model_ctx = types.SimpleNamespace(
        processor=processor.load_processor(None, PRESETS["tiny"], 1024, 4096),
        buckets=DataConfig.from_config(c.data).length_buckets,
    )
    return Datasets(c, model_ctx, sandbox.SandboxPool(processes=1), folder, recording=True)


def broken_pathvqa(root):
    whole, cut = ({"bytes": data, "path": None} for data in (_jpeg(root), _jpeg(root)[:3000]))
    rows = [
        {"image": image, "question": "what is it?" + extra, "answer": "x"}
        for image, extra in ((whole, ""), (cut, ""), (whole, "?" * 200))
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    (root / "path-vqa").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(
            root / "path-vqa" / f"{split}.parquet"
        )


def test_a_run_leaves_out_the_rows_that_the_check_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    wrong = [row(images=["cut.jpg"]), row(prompt="<image>" + "red " * 150)]
    c = config(mine=write(tmp_path, [row(), *wrong, row()]))
    c.stages = ({"task": "mine", "steps": 1}, {"task": "pathvqa", "steps": 1})
    broken_pathvqa(tmp_path)
    c.data.update(root=str(tmp_path), bad_rows=2)
    reports = {f.name: f for f in check.run_preflight(c)}
    for name, left in (("mine", [1, 4]), ("pathvqa", [0])):
        for split in ("train", "test"):
            examples = opened(c, tmp_path / "run").examples(name, split, c)
            assert [examples.where(i)[1] for i in range(len(examples))] == left
            assert (
                len(reports[f"{name} {split}"].rows) == len(left)
                and len(reports[f"{name} {split}"].bad) == 2
            )
    assert (
        reports["pathvqa train"].bad[0].file == "pathvqa/train"
        and reports["pathvqa train"].bad[0].row == 1
    )
    monkeypatch.setattr(
        row_checks, "measure_row", lambda *_: pytest.fail("public rows were looked at again")
    )
    assert len(opened(c, tmp_path / "run").examples("pathvqa", "test", c)) == 1
    c.data.bad_rows = 1
    with pytest.raises(
        ValueError, match=r"2 bad row\(s\), 1 allowed by data.bad_rows; the first: pathvqa/test:1: "
    ):
        opened(c, tmp_path / "run").examples("pathvqa", "test", c)


def test_replayed_rows_are_in_the_order(monkeypatch):
    orders = []
    monkeypatch.setattr(
        check,
        "padding_by_length",
        lambda order, sources, *_: orders.append(order) or [check.Padding(16, 1, 1, 16)],
    )
    c = config()
    c.stages = (
        {"task": "synthetic_colour", "steps": 2},
        {
            "task": "synthetic_shape",
            "steps": 2,
            "method": {"replay": {"name": "prompts", "fraction": 0.25}},
        },
    )
    check.run_preflight(c)
    assert [(o.sizes, o.replay, o.own_share) for o in orders] == [
        ((40,), (), 1),
        ((40,), (40,), 0.75),
    ]


def test_gold_answers_count_where_they_are_learned(tmp_path):
    files = write(tmp_path, [row(answer="red and round")])
    without = check.run_preflight(config(mine=files))[0]
    c = config(mine=files)
    c.method.update(source="gold", objective="sft", kl_coef=0.0)
    assert check.run_preflight(c)[0].tokens[0] > without.tokens[0]


def test_prompts_are_measured_with_their_demonstration(tmp_path):
    """A teacher of SDFT reads the gold answer after the prompt: the task needs one, and the limit
    must hold it.
    """
    c = config(mine=write(tmp_path, [row(), row(answer="red " * 40)]))
    c.method.update(METHODS["sdft"])
    c.rollout.max_new_tokens = 64
    assert len(check.run_preflight(c)[0].rows) == 2
    c.data.prompt_limit, c.rollout.max_new_tokens = 76, 8
    with pytest.raises(
        ValueError,
        match=r"1 bad row.*jsonl:2: its gold answer after the prompt makes \d+ tokens, more than .*=8 hold",
    ):
        check.run_preflight(c)


def test_prompts_without_a_demonstration_are_reported():
    c = config()
    c.method.update(METHODS["sdft"])
    (spec,) = row_checks.training_splits(resolve_stages(c)[0], resolve_stages(c))
    task = registry.resolve_task("synthetic_colour", {})
    examples = task.load("train", root="", limit=1, seed=0)

    class Blank(list):
        where = examples.where

    blank = Blank([dataclasses.replace(examples[0], target="")])
    words = processor.load_processor(None, load.find_model_config(c.model), 1024, 4096)
    prompted = prompted_task.make_prompted_task(task, "direct", c.rewards, None)
    assert (
        "no gold answers to demonstrate"
        in row_checks.measure_row(blank, 0, prompted, words, spec, 128).reason
    )


def test_several_runs_read_what_they_share_once():
    c = config()
    c.seeds = (0, 1)
    with c.unlocked():
        c.arms.low = {"train": {"lr": 1e-7}}
        c.arms.cot = {"data": {"template": "cot"}}
    names = [(f.name, f.spec.template) for f in check.run_preflight(c)]
    assert sorted(names) == sorted(
        (f"synthetic_colour {split}", template)
        for template in ("direct", "cot")
        for split in ("train", "test")
    )


def test_settings_are_refused_before_any_row_is_read(monkeypatch):
    monkeypatch.setattr(row_checks, "check_split", lambda *_: pytest.fail("rows were read"))
    wrong = {
        "does not train on": ("method", dict(source="gold")),
        "config.mesh.slices: expected a whole number of at least 1, got 0": (
            "mesh",
            dict(slices=0),
        ),
        "model.remat='all'; expected one of none, dots, block, offload": (
            "model",
            dict(remat="all"),
        ),
    }
    for words, (section, values) in wrong.items():
        c = config()
        c[section].update(values)
        with pytest.raises(ValueError, match=words):
            check.run_preflight(c)


def test_padding_of_batches():
    order = Mixture((4,), 2)
    tokens = np.full(4, 10)
    assert [
        (p.length, p.batches, p.waste)
        for p in check.padding_by_length(order, [tokens], (16, 64), pack=False)
    ] == [(16, 2, 1 - 10 / 16)]
    tokens[order.rows(0)[0].index] = 40
    padding = check.padding_by_length(order, [tokens], (16, 64), pack=False)
    assert [(p.length, p.tokens, p.slots) for p in padding] == [(16, 20, 32), (64, 50, 128)]
    packed = check.padding_by_length(Mixture((6,), 6), [np.full(6, 10)], (16, 64), pack=True)
    assert [(p.length, p.tokens, p.slots) for p in packed] == [(64, 60, 64)]


def test_histogram_counts_every_row():
    values = [5, 5, 6, 30, 100]
    title, *bars = check.histogram_lines("tokens", values, 128)
    assert title == "tokens: median 6, 99 % up to 97, longest 100 of 128 (78%)"
    assert sum(int(bar.split()[-1]) for bar in bars) == len(values)
    assert bars[0].split()[0] == "5-12" and bars[0].count("#") == check.HISTOGRAM_WIDTH
    assert len(check.histogram_lines("tokens", [7, 7], 128)) == 2


def test_memory_of_the_seven_billion_model():
    c = base()
    c.train.update(batch=64, micro_batch=16)
    one, sixteen = (estimate(c, 1024, 4096, n) for n in (1, 16))
    n = 8.292166656e9  # parameters of Qwen2.5-VL-7B
    assert one["trained weights"] + one["frozen weights"] == pytest.approx(4 * n)
    assert one["optimiser"] == pytest.approx(8 * n)
    assert one["gradients"] == pytest.approx(
        (8 + 2) * n
    )  # two sums in float32, the working copy in bfloat16
    assert one["reference"] == one["rollout weights"] == pytest.approx(2 * n)
    assert one["cache"] == 64 * (1024 + 8 * 1024) * 2 * 28 * 4 * 128 * 2
    for part in ("cache", "activations"):
        assert sixteen[part] == pytest.approx(one[part] / 16)
    for part in ("trained weights", "optimiser", "gradients"):  # exact: vectors are on every device
        assert one[part] / 16 < sixteen[part] < 1.002 * one[part] / 16
    assert one["peak"] > sixteen["peak"] > one["peak"] / 16


def test_adapters_and_missing_rollouts_need_less():
    c = base()
    full = estimate(c, 512, 1024, 1)
    c.model.lora.rank = 16
    c.method.update(source="gold", objective="sft", kl_coef=0.0)
    lora = estimate(c, 512, 1024, 1)
    assert lora["optimiser"] < full["optimiser"] / 50
    assert lora["cache"] == lora["rollout weights"] == 0
    assert "reference" in full and not {"reference", "teacher"} & set(lora)


def estimate(c, prompt, patches, devices):
    mesh = memory.mesh_of_size(c.mesh, devices)
    return memory.estimate_bytes(abstract_stage(c, PRESETS["7b"], mesh), prompt, patches)


def test_devices_that_a_mesh_allows():
    c = base()
    assert memory.possible_device_counts(c.mesh, (1, 4, 8, 16), 8) == [1, 4, 8]
    c.mesh.model = 4
    assert memory.possible_device_counts(c.mesh, (1, 4, 8, 16), 8) == [4, 8, 16]
    c.mesh.fsdp = 2
    assert memory.possible_device_counts(c.mesh, (1, 4), 8) == [8]
    assert memory.mesh_of_size(c.mesh, 8).shape == {"data": 1, "fsdp": 2, "model": 4}


def test_memory_is_shown_for_devices_that_divide_a_micro_batch():
    c = base()
    c.train.update(batch=16, micro_batch=4)
    shown = check.memory_by_device_count(c, PRESETS["tiny"], 64, 96)
    assert list(shown) == [1, 4]
    assert shown[4]["activations"] == shown[1]["activations"] / 4
    c.train.micro_batch = 0  # one sum of gradients, of the whole batch
    whole = check.memory_by_device_count(c, PRESETS["tiny"], 64, 96)
    assert list(whole) == [1, 4, 8, 16] and whole[1]["gradients"] < shown[1]["gradients"]
    c.mesh.fsdp = 8
    c.train.micro_batch = 4
    with pytest.raises(ValueError, match="4 prompts.*8 shards"):
        check.memory_by_device_count(c, PRESETS["tiny"], 64, 96)


def test_a_disk_without_space_for_the_checkpoints_is_refused(tmp_path, monkeypatch, capsys):
    console.set_console_mode("plain")
    c = run_helpers.config("grpo")
    free = lambda size: monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, {tmp_path: size}[path])
    )
    workdir = str(tmp_path / "not" / "there")
    free(10**9)
    check.run_preflight(c, workdir=workdir)
    assert "warning" not in capsys.readouterr().err
    free(12_000_000)
    check.run_preflight(c, workdir=workdir)
    said = " ".join(capsys.readouterr().err.split())
    assert "12.00 MB free, the run may need up to" in said
    free(1000)
    with pytest.raises(
        ValueError, match="not/there: its disk has 0.00 MB free, the checkpoints need"
    ):
        check.run_preflight(c, workdir=workdir)


def test_launcher_prints_the_check_and_leaves_with_two_on_errors(tmp_path):
    write(tmp_path, [row(), row(images=["none.png"])])
    (tmp_path / "c.py").write_text(
        "from configs.base import get_config as base\n"
        "def get_config(arg='synthetic_colour'):\n"
        "    c = base()\n"
        f"    c.tasks.mine = dict(train={str(tmp_path / 'rows.jsonl')!r}, test={str(tmp_path / 'rows.jsonl')!r})\n"
        "    c.stages = (dict(task=arg, steps=1),)\n"
        "    c.model.update(min_pixels=1024, max_pixels=4096)\n"
        "    c.data.update(limit=5, template='direct'); c.eval.limit = 5\n"
        "    return c\n"
    )
    good = launch(f"--config={tmp_path / 'c.py'}")
    assert good.returncode == 0 and "ok: 10 rows of 2 splits" in good.stdout, good.stderr
    parts = (
        "tokens of the prompt: median",
        "prompt 1 of synthetic_colour train",
        "stage 1 synthetic_colour (grpo): 5 rows, batch 128, 1 steps",
        "batches by row length",
        "expected GB per device, by arithmetic",
        "expected disk of the workdir",
        "ends of stages",
    )
    for part in parts:
        assert part in good.stderr
    wrong = launch(f"--config={tmp_path / 'c.py'}:mine")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert "rows.jsonl:2:" in wrong.stderr.splitlines()[-1] and wrong.stderr.splitlines()[
        -1
    ].startswith("error: mine train: 1 bad row")


def launch(*args):
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "check.py", *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
