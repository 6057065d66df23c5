"""The model after a stage: loaded with its adapters, and exported for transformers."""

import dataclasses

import numpy as np
import pytest
import run_helpers
from device_fixtures import one_device  # noqa: F401

import cptjax
from cptjax import sharding
from cptjax.continual import driver, stage_model
from cptjax.continual.model_state import restore_stage_params
from cptjax.continual.open_run import open_run_readonly
from cptjax.models import trainable
from cptjax.models.hf_config import read_model_config

pytestmark = pytest.mark.usefixtures("one_device")

CONVERSATIONS = [
    [{"role": "user", "content": "Name a colour."}],
    [{"role": "user", "content": "Count to three, please."}],
]


@pytest.fixture(scope="module")
def config():
    return run_helpers.config(
        "sft",
        steps=2,
        model={"lora": {"rank": 2, "alpha": 8.0}},
        eval={"before": False, "limit": 2},
        train={"lr": 5e-2},
    )


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    """A run of two stages with adapters; its base weights are wide enough for visible logits."""
    folder = tmp_path_factory.mktemp("run") / "workdir"
    driver.run(config, folder)
    return folder


@pytest.fixture(scope="module")
def logits_of_stage(config, workdir):
    """Compute logits from the parameters that the run itself would continue with, not merged."""

    def compute(stage: int) -> list[np.ndarray]:
        with open_run_readonly(config, workdir) as run:
            ctx = run.model_ctx
            params = restore_stage_params(config, ctx, run.files.checkpoints, stage)
        assert any(map(trainable.is_adapter, trainable.flatten_params(params)))
        model = cptjax.Model(ctx.cfg, params, ctx.processor, ctx.mesh, "float32")
        return cptjax.logits(model, CONVERSATIONS)

    return compute


@pytest.mark.parametrize("stage, number", [(1, 1), (None, 2)])
def test_an_exported_stage_has_the_logits_of_the_run(
    workdir, logits_of_stage, tmp_path, stage, number
):
    """In cptjax and in transformers; the last finished stage is the default."""
    folder = tmp_path / "hf"
    assert stage_model.export_stage(workdir, folder, stage) == number
    exported = cptjax.load(folder, dtype="float32")
    assert not any(map(trainable.is_adapter, trainable.flatten_params(exported.params)))
    expected, others = logits_of_stage(number), logits_of_stage(3 - number)
    found = cptjax.logits(exported, CONVERSATIONS)
    for a, b, other in zip(found, expected, others, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert np.abs(b - other).max() > 1e-2, "the two stages would pass for each other"

    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    theirs, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for conversation, logits in zip(CONVERSATIONS, expected, strict=True):
        tokens = exported.processor.encode(conversation).tokens
        text = conversation[0]["content"]
        assert tokenizer(text)["input_ids"] == exported.processor.ids(text)
        with torch.no_grad():
            out = theirs(input_ids=torch.tensor(np.asarray(tokens)[None]).long()).logits[0]
        np.testing.assert_allclose(out.numpy(), logits, atol=2e-4)


def test_load_reads_the_same_stage_from_the_workdir(workdir, logits_of_stage):
    """With its adapters; stage 0 is the base model."""
    for stage in (0, 1, None):
        model = cptjax.load(workdir, dtype="float32", stage=stage)
        expected = logits_of_stage(2 if stage is None else stage)
        for a, b in zip(cptjax.logits(model, CONVERSATIONS), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_export_has_the_requested_dtype(workdir, tmp_path):
    stage_model.export_stage(workdir, tmp_path / "half", 0, "bfloat16", shard_bytes=1e5)
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    exported = cptjax.load(tmp_path / "half", dtype="float32")
    base = cptjax.load(workdir, dtype="float32", stage=0)
    a = trainable.flatten_params(exported.params)
    b = trainable.flatten_params(base.params)
    assert a.keys() == {path for path in b if not trainable.is_adapter(path)}
    assert all(np.array_equal(a[path], b[path].astype("bfloat16")) for path in a)
    assert read_model_config(tmp_path / "half").text == dataclasses.replace(base.config).text


def test_a_stage_that_is_not_finished_is_refused(workdir, tmp_path):
    with pytest.raises(ValueError, match=r"has no finished stage 3; finished stages: \[1, 2\]"):
        stage_model.export_stage(workdir, tmp_path / "hf", 3)
    assert not (tmp_path / "hf").exists()


def test_reading_a_run_writes_nothing_into_its_workdir(workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    stage_model.load_stage_model(workdir, sharding.make_mesh(), 1)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
