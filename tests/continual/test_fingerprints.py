"""Fingerprints change with every input of a run, and with nothing else."""

import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import run_helpers

from cptjax.continual import fingerprints
from cptjax.data.row_checks import CheckedRows
from cptjax.tasks import hub
from cptjax.types import Example


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "model").mkdir()
    for name in ("train.jsonl", "data/test.csv", "mine.py", "style.jinja", "corpus.jsonl"):
        (tmp_path / name).write_text(f"content of {name}")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text(name)
    mine = {
        "train": "train.jsonl",
        "test": str(tmp_path / "data"),
        "prompt": "long " * 2000,
        "reward": "mine.py:reward",
        "scorer": "exact",
    }
    stages = (
        {"task": "mine", "steps": 1, "data": {"template": "style.jinja"}},
        {"task": "mine", "steps": 1, "method": {"corpus": "corpus.jsonl"}},
    )
    return run_helpers.config(
        tasks={"mine": mine}, stages=stages, model={"path": str(tmp_path / "model")}
    )


def process_fingerprints(config):
    return fingerprints.process_fingerprints(config, fingerprints.file_hashes(config))


CHANGES = {
    "train.jsonl": "tasks.mine.train: train.jsonl",
    "data/test.csv": "tasks.mine.test: ",
    "mine.py": "tasks.mine.reward: mine.py",
    "style.jinja": "stage 1: data.template: style.jinja",
    "corpus.jsonl": "stage 2: method.corpus: corpus.jsonl",
    "model/model.safetensors": "model.path: ",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_changes_its_own_fingerprint_only(config, tmp_path, name):
    before = process_fingerprints(config)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text[:-1] + "?")  # of the same length
    after = process_fingerprints(config)
    changed = [key for key in before if before[key] != after[key]]
    assert before.keys() == after.keys() and len(changed) == 1
    assert changed[0].startswith(CHANGES[name])
    (tmp_path / name).write_text(text)
    assert process_fingerprints(config) == before


def test_settings_and_packages_are_named(config, monkeypatch):
    before = process_fingerprints(config)
    config.train.lr = 0.5
    after = process_fingerprints(config)
    assert {k: (before[k], after[k]) for k in before if before[k] != after[k]} == {
        "config.train.lr": ("0.01", "0.5")
    }
    assert before["version of jax"]


def test_every_source_file_of_the_package_is_compared(config, tmp_path, monkeypatch):
    """One that is changed and not committed too."""
    names = set(process_fingerprints(config))
    package = Path(fingerprints.__file__).parents[1]
    tracked = {f"cptjax/{p.relative_to(package)}" for p in package.rglob("*.py")}
    assert tracked <= names and "cptjax/tasks/templates/boxed.jinja" in names
    copy = shutil.copytree(package / "common", tmp_path / "cptjax" / "common")
    monkeypatch.setattr(fingerprints, "__file__", str(copy / "x.py"))
    before, code = fingerprints.source_hashes.__wrapped__(), fingerprints.code_hash()
    (copy / "files.py").write_text((copy / "files.py").read_text() + "\n")
    after = fingerprints.source_hashes.__wrapped__()
    assert [name for name in after if after[name] != before[name]] == ["common/files.py"]
    monkeypatch.setattr(fingerprints, "source_hashes", lambda: after)
    assert fingerprints.code_hash() != code


def test_a_model_and_a_dataset_of_the_hub_have_their_revision(config, tmp_path, monkeypatch):
    for revision in ("abc", "def"):
        folder = tmp_path / "models--org--m" / "snapshots" / revision
        folder.mkdir(parents=True)
        monkeypatch.setattr(fingerprints, "locate_checkpoint", lambda _, f=folder: f)
        config.model.path = "org/m"
        assert fingerprints.file_hashes(config)["model.path: org/m"] == f"revision {revision}"
        monkeypatch.setattr(hub, "_sources_read", {"org/d test": f"revision {revision}"})
        assert fingerprints.row_hashes(Splits("ab"))["dataset org/d test"] == f"revision {revision}"


def test_a_large_file_is_hashed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "WHOLE_FILE_BYTES", 1000)
    path = tmp_path / "large"
    path.write_bytes(bytes(1 << 18))
    before = fingerprints.hash_path(path)
    path.write_bytes(bytes((1 << 18) - 1) + b"x")
    assert fingerprints.hash_path(path) != before


class Splits:
    """Stands in for the loaded splits of a run: one split with these rows."""

    def __init__(self, ids, answer="yes"):
        turn = {"role": "user", "content": "Is it?"}
        rows = [Example(i, [turn], answer) for i in ids]
        spec = types.SimpleNamespace(task="t", split="train")
        checked = CheckedRows(rows, range(len(rows)), np.ones(len(rows), np.int32))
        self.loaded_splits = lambda: [(spec, checked)]


def test_rows_are_compared_by_number_id_and_answer():
    hashes = [
        fingerprints.row_hashes(Splits(*given))["rows of t train"]
        for given in (("abc",), ("abc",), ("abd",), ("abcd",), ("abc", "no"))
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4 and hashes[0].startswith("3 rows, ")
