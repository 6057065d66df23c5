"""A user's mistake ends a command with one line and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cptjax.common import cli, files

ROOT = Path(__file__).parents[2]


def test_required_flags_that_are_missing_are_named_in_one_line():
    given = ["launch/generate.py", "--config=configs/demo.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *given], cwd=ROOT, env=env, capture_output=True, text=True
    )
    expected = "error: --task, --out: expected a value, got none; add --task=..., see --help\n"
    assert (done.returncode, done.stderr) == (2, expected)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.train.batch=None", "error: --config.train.batch: expected a value like 128"),
        ("--config.seed=3", "error: --config.seed changes nothing"),
        ("--config=configs/none.py", "No such file or directory"),
        ("DIR", "error: unexpected argument 'DIR'; flags are written --name=value"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(argument, message):
    given = ["--config=configs/demo.py", "--config.seeds=1,2", argument]
    done = subprocess.run(
        [sys.executable, "launch/check.py", *given],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_a_part_of_the_cluster_flags_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "launch/train.py", "--config=configs/demo.py", f"--workdir={tmp_path}"]
        + ["--coordinator=localhost:1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: --coordinator, --num_processes, --process_id: expected")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (files.TryAgain("the hub does not answer"), 1),
        (TimeoutError("the judge"), 1),
        (ValueError("train.lr"), 2),
        (FileNotFoundError("rows.jsonl"), 2),
    ],
    ids=repr,
)
def test_launchers_start_again_after_an_outage_and_not_after_a_mistake(error, code, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.exit_with_error(error)
    assert ended.value.code == code and capsys.readouterr().err == f"error: {error}\n"
