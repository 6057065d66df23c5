"""What is recorded of the software at each start of a run."""

import json
import subprocess
import types

import jax
import numpy as np
import pytest
import run_helpers
from jax.sharding import Mesh

from configs.base import METHODS
from cptjax.common import files
from cptjax.config import config_to_dict, recorded_config, resolve_stages
from cptjax.continual import fingerprints, workdir


def git(folder, *arguments):
    name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_that_of_the_package_and_says_whether_files_differ(tmp_path):
    package = tmp_path / "cptjax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert workdir.git_commit(package) is None
    git(tmp_path, "init")
    (tmp_path / "other.py").write_text("")
    git(tmp_path, "add", "other.py")
    git(tmp_path, "commit", "-m", "a repository of something else")
    assert workdir.git_commit(package) is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "the package")
    commit = workdir.git_commit(package)
    assert len(commit) == 40
    (package / "__init__.py").write_text("changed")
    assert workdir.git_commit(package) == f"{commit}-dirty"


@pytest.fixture
def model_ctx():
    mesh = Mesh(np.array(jax.devices()[:1]), "fsdp")
    compute = types.SimpleNamespace(attention="xla")
    return types.SimpleNamespace(mesh=mesh, cfg=types.SimpleNamespace(compute=compute))


def test_each_start_is_recorded_and_changed_software_is_named(
    tmp_path, model_ctx, monkeypatch, capsys
):
    for code, version in (("a", "1.0"), ("a", "1.0"), ("b", "2.0")):
        monkeypatch.setattr(fingerprints, "code_hash", lambda code=code: code)
        monkeypatch.setattr(fingerprints, "package_versions", lambda v=version: {"jax": v})
        monkeypatch.setattr(workdir, "git_commit", lambda _, code=code: f"commit {code}")
        capsys.readouterr()
        workdir.record_start(tmp_path, model_ctx, [], {})
        said = " ".join(capsys.readouterr().err.split())
        changed = "jax 1.0 -> 2.0, source of cptjax commit a -> commit b; results may differ"
        assert (changed in said) == (code == "b") and ("warning" in said) == (code == "b")
    starts = json.loads((tmp_path / "versions.json").read_text())["starts"]
    assert [start["commit"] for start in starts] == ["commit a", "commit a", "commit b"]


def test_a_recorded_config_gives_the_stages_that_the_run_had(tmp_path):
    """A preset sets optional settings to None, and replaces the dict of a whole run."""
    c = run_helpers.config("sft", steps=1)
    changes = dict(plugin="a.py:A", plugin_settings=dict(coef=0.1), filter=dict(samples=4))
    c.method.update(changes)
    c.stages = (
        dict(task="colour", steps=1),
        dict(task="digit", steps=1, method=METHODS["gspo"], train=dict(clip=None)),
        dict(task="colour", steps=1, method=dict(filter=dict(like="elsewhere"))),
    )
    files.write_json(tmp_path / "config.json", recorded_config(c, tmp_path))
    read = workdir.read_run_config(tmp_path)
    assert config_to_dict(read) == config_to_dict(c)
    for made, found in zip(resolve_stages(c), resolve_stages(read), strict=True):
        assert config_to_dict(found.config) == config_to_dict(made.config)
