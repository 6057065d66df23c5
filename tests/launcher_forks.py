"""Run many launch commands in forks of one process that has imported everything.

Starting Python and importing jax takes longer than a command that is refused. As a program: the
commands are read from standard input as JSON, the results are written to standard output.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MEMORY = 8 << 30  # bytes of address space of one command
TOGETHER = 2  # commands that run at the same time


def run_commands(
    commands: list[list[str]], folder: Path, limit: float = 120.0
) -> list[dict[str, Any]]:
    """Return exit code, output and seconds of processor time of each command [script, *flags].

    A command that takes more than `limit` seconds is killed.
    """
    import run_helpers

    done = subprocess.run(
        [sys.executable, __file__, str(limit)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=folder,
        env=run_helpers.environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def start(command: list[str], log: Path) -> int:
    """Start a command in a fork of this process; return the id of the process."""
    import resource

    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    script = ROOT / "launch" / f"{command[0]}.py"
    sys.argv[:] = [str(script), *command[1:]]
    code = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def serve(commands: list[list[str]], limit: float) -> list[dict[str, Any]]:
    """Run the commands, some at a time."""
    folder = Path(tempfile.mkdtemp())
    waiting, running, results = list(enumerate(commands)), {}, {}
    while waiting or running:
        while waiting and len(running) < TOGETHER:
            number, command = waiting.pop(0)
            running[start(command, folder / str(number))] = (number, time.monotonic())
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid in running:
            number, _ = running.pop(pid)
            text = (folder / str(number)).read_text(errors="backslashreplace")
            seconds = usage.ru_utime + usage.ru_stime
            results[number] = {
                "code": os.waitstatus_to_exitcode(status), "said": text, "seconds": seconds
            }  # fmt: skip
            kill_session(pid)  # also what the command started
        for pid, (_, began) in running.items():
            if time.monotonic() - began > limit:
                kill_session(pid)
        time.sleep(0.005)
    return [results[number] for number in sorted(results)]


def kill_session(pid: int) -> None:
    try:
        os.killpg(pid, 9)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    import datasets  # noqa: F401
    from transformers import AutoTokenizer

    import cptjax.analysis.drift
    import cptjax.analysis.influence
    import cptjax.continual.corpus_generation
    import cptjax.continual.reevaluate
    import cptjax.evaluation.report
    import cptjax.planning.check
    import cptjax.planning.plan  # noqa: F401

    AutoTokenizer.from_pretrained  # noqa: B018, imported on first access
    print(json.dumps(serve(json.load(sys.stdin), float(sys.argv[1]))))
