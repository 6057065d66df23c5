"""Run many launch commands in forks of one process that has imported everything.

Starting Python and importing jax takes longer than a command that is refused. As a program: each
line of standard input is a list of commands as JSON, its results are a line of standard output.
"""

import contextlib
import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MEMORY = 8 << 30  # bytes of address space of one command
TOGETHER = 2  # commands that run at the same time
TEMPLATE_SECONDS = 3.0  # for which a template may be rendered; in production longer


@contextlib.contextmanager
def start_launcher(
    folder: Path, limit: float = 120.0
) -> Iterator[Callable[[list[list[str]]], list[dict[str, Any]]]]:
    """Yield a function that runs commands [script, *flags].

    It returns exit code, output and seconds of processor time of each. A command that takes more
    than `limit` seconds is killed.
    """
    import run_helpers

    with subprocess.Popen(
        [sys.executable, __file__, str(limit)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=run_helpers.environment(),
    ) as process:

        def run_commands(commands: list[list[str]]) -> list[dict[str, Any]]:
            print(json.dumps(commands), file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line, "the process that forks the commands died, see its standard error"
            return json.loads(line)

        yield run_commands


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
    from cptjax.tasks import template_worker

    template_worker.TIME_LIMIT = TEMPLATE_SECONDS
    AutoTokenizer.from_pretrained  # noqa: B018, imported on first access
    gc.freeze()  # a collection in a fork would copy the pages of what is imported
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), float(sys.argv[1]))), flush=True)
