"""Scripts that start a run on several hosts: arguments keep their quotes, and a failure ends all."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
ARGUMENTS = ["--config.seeds=(0,1)", "--workdir=/shared/my runs", "--config.name=$(hostname)"]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Run a script in a repository of its own, with a command that only prints its arguments."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "env.sh").write_text("")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)

    def run(script: str, command: str, **variables: str) -> list[str]:
        program = tmp_path / command
        program.write_text('#!/bin/sh\nprintf "%s\\n" "$CPTJAX_DISTRIBUTED" "$@"\n')
        program.chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
        done = subprocess.run(
            ["bash", str(LAUNCH / script), *ARGUMENTS],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    return run


def test_slurm_starts_a_process_per_node_and_ends_all_if_one_fails(start):
    lines = start("slurm.sh", "srun", SLURM_CPUS_PER_TASK="32")
    assert lines == [
        "1",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=32",
        "python",
        "launch/train.py",
        *ARGUMENTS,
    ]
    text = (LAUNCH / "slurm.sh").read_text()
    assert "#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --signal=TERM@120\n" in text


def test_the_shell_of_a_tpu_host_gets_the_arguments_as_they_were_given(start):
    lines = start("tpu_pod.sh", "gcloud", TPU_NAME="slice", ZONE="zone")
    command = "\n".join(lines).partition("--command=")[2]
    assert "--worker=all" in lines and command.startswith("set -e; ")
    assert shlex.split(command.partition("launch/train.py ")[2]) == ARGUMENTS
