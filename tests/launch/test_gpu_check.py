"""launch/gpu_check.sh checks before it measures, and keeps the result of each part."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$*" in *--check*) echo '[]'; exit {code} ;; *--suite*) echo '{{}}' ;; esac
"""


@pytest.mark.parametrize("code", [0, 2])
def test_each_part_leaves_its_result(tmp_path, code):
    """A wrong path of the accelerator does not keep the suite from being measured."""
    (tmp_path / "bin").mkdir()
    python, log, out = tmp_path / "bin" / "python", tmp_path / "log", tmp_path / "results"
    python.write_text(PYTHON.format(log=log, code=code))
    python.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / "launch" / "gpu_check.sh", "cpu-s", "results"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    commands = [line for line in log.read_text().splitlines() if "launch/" in line]
    assert commands == [
        "launch/bench.py --check",
        "launch/bench.py --suite --size=cpu-s --minutes=3",
    ]
    assert (out / "checks.json").read_text() == "[]\n"
    assert (out / "suite.json").read_text() == "{}\n"
    assert {"environment.txt", "checks.log", "suite.log"} <= {p.name for p in out.iterdir()}
    if code:
        assert done.returncode == 1 and f"failed: checks; see {out}" in done.stderr
    else:
        assert done.returncode == 0 and f"The results: {out}" in done.stdout, done.stderr


def test_an_unknown_size_is_refused_before_the_checks(tmp_path):
    command = ["bash", ROOT / "launch" / "gpu_check.sh", "70b", "results"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    expected = "SIZE: expected 3b, 7b or cpu-s, got 70b\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
