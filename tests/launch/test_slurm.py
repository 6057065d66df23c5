"""launch/slurm.sh on a real scheduler: an array over two arms, one of which is stopped and continues.

The daemons of SLURM run in a temporary folder; this machine is the only node.
"""

import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_helpers

ROOT = Path(__file__).parents[2]
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,sched_min_interval=0
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
PartitionName=main Nodes=ALL Default=YES State=UP
"""
CONFIG = """
from run_helpers import config

def get_config():
    return config(
        stages=({"task": "colour", "steps": 150},),
        arms={"a": {}, "b": {}},  # equal, so that b must end as a does
        eval={"limit": 4, "batch": 4, "before": False},
        checkpoint={"every": 1000},
    )
"""

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("sbatch", "slurmctld", "slurmd"))),
    reason="needs SLURM: apt-get install slurm-wlm",
)


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for(condition, what, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A running cluster: its folder, and the environment of jobs that need no installation."""
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=host,
            ports=free_ports(2),
            user=subprocess.check_output(["id", "-un"], text=True).strip(),
            folder=folder,
        )
    )
    checksum = "".join(
        subprocess.check_output(["cksum"], input=(ROOT / "setup.py").read_bytes()).decode().split()
    )
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / f".installed{checksum}").touch()
    (folder / "venv" / "bin" / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"')
    environment = run_helpers.environment(
        SLURM_CONF=str(folder / "slurm.conf"),
        VENV=str(folder / "venv"),
        EXTRAS="",
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}",
    )
    commands = [["slurmctld", "-D"], ["slurmd", "-D", "-N", host]]
    with (folder / "daemons.log").open("w") as log:
        daemons = [
            subprocess.Popen(c, env=environment, stdout=log, stderr=log, cwd=folder)
            for c in commands
        ]
    try:
        yield folder, environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(60)


@pytest.mark.slow
def test_a_stopped_task_of_an_array_is_queued_again_and_ends_as_an_undisturbed_one(slurm):
    folder, environment = slurm

    def call(*command):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        return done.stdout if done.returncode == 0 else ""

    def state(task):
        shown = call("scontrol", "show", "job", f"{job}_{task}")
        return dict(re.findall(r"(\w+)=(\S+)", shown))

    wait_for(lambda: call("sinfo", "-h", "-o", "%D %t").strip() == "1 idle", "an idle node", 60)
    (folder / "config.py").write_text(CONFIG)
    job = call(
        *("sbatch", "--parsable", "--array=0-1", "--gpus-per-node=0", "--cpus-per-task=1"),
        *(f"--output={folder}/%a.log", "launch/slurm.sh"),
        *(f"--config={folder}/config.py", f"--workdir={folder}/runs", "--plain"),
    ).strip()
    steps = folder / "runs" / "b" / "metrics.jsonl"
    try:
        wait_for(lambda: steps.is_file() and steps.stat().st_size, "the first step of b")
        call("scancel", "--signal=TERM", f"{job}_1")
        for task in (0, 1):
            wait_for(
                lambda t=task: state(t)["JobState"] in ("COMPLETED", "FAILED"), f"end of {task}"
            )
    finally:
        call("scancel", job)
        logs = [(folder / f"{task}.log").read_text() for task in (0, 1)]
        print(*logs, (folder / "daemons.log").read_text(), sep="\n")
    assert [state(task)["JobState"] for task in (0, 1)] == ["COMPLETED"] * 2
    assert [state(task)["Restarts"] for task in (0, 1)] == ["0", "1"]
    assert re.search(r"stopped by SIGTERM after step \d+ of stage 1, saved", logs[1])
    assert "queued again" in logs[1] and "queued again" not in logs[0]
    undisturbed, stopped = (run_helpers.run_state(folder / "runs" / arm) for arm in "ab")
    run_helpers.assert_same(undisturbed, stopped)
