"""Processes that carry out one run after the other, so that compiled programs stay in memory.

A run may be killed: the worker stops at a given change of the files in its workdir, the test copies
the workdir, and the stopped run ends as after SIGTERM. The copy is what a kill would have left.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEVICES = 2  # of all processes of a run, of several
LIMIT = 900.0  # seconds for one run, on a machine that is busy
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")


# ---- in a worker ---------------------------------------------------------------------------------


class FileEvents:
    """Counts the changes of the files in a folder, and acts at one of them."""

    def __init__(self) -> None:
        self.folder, self.count, self.at = "", 0, 0
        self.act: Callable[[], None] = lambda: None

    def watch(self, folder: str, at: int, act: Callable[[], None]) -> None:
        self.folder, self.count, self.at, self.act = folder, 0, at, act

    def __call__(self, event: str, arguments: tuple) -> None:
        """Called by Python before it opens, renames or removes a file, in any thread."""
        if not self.folder:
            return
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(arguments[0]).startswith(self.folder):
            self.step()

    def step(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.act()


class HalfWrites:
    """A file that is changed twice by each write, so that a kill may leave half of a line."""

    def __init__(self, file: Any, events: FileEvents) -> None:
        self._file, self._events = file, events

    def write(self, data: bytes) -> None:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._file.write(part)
            self._file.flush()
            self._events.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def split_writes(events: FileEvents) -> None:
    from cptjax.common import files

    opened = files.LineFile.__init__

    def open_file(self: files.LineFile, *args: Any) -> None:
        opened(self, *args)
        self.file = HalfWrites(self.file, events)

    files.LineFile.__init__ = open_file


def copy_inside(callbacks: Any, step: int, job: dict[str, Any]) -> None:
    """Copy the workdir after the first step of the second stage, if the job names a place."""
    from cptjax.common import distributed

    if job["copy"] and (callbacks.stage.number, step) == (2, 1):
        callbacks.run.files.checkpoints.wait()
        distributed.gather_objects(None)
        distributed.decide_on_main(lambda: str(shutil.copytree(job["workdir"], job["copy"])))


def serve(index: int, count: int, devices: int, address: str, connection: socket.socket) -> None:
    """Carry out the runs that the test asks for, one after the other."""
    import jax
    import run_helpers

    from cptjax.common import cluster, console, distributed
    from cptjax.continual import driver
    from cptjax.continual.stage_callbacks import StageCallbacks

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end of a run that is over already
    console.set_console_mode("plain")
    sys.argv[1:] = []
    events = FileEvents()
    sys.addaudithook(events)
    split_writes(events)
    jax.config.update("jax_num_cpu_devices", devices // count)
    cluster.LOST_SECONDS = LIMIT  # on a busy machine a process is slow, not lost
    if count > 1:
        cluster.connect(address, count, index)
    stream = connection.makefile("rw", encoding="utf-8")

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=stream, flush=True)

    def stop() -> None:
        reply(stopping=True)
        stream.readline()  # the test has the copy
        os.kill(os.getpid(), signal.SIGTERM)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    after_step, job = StageCallbacks.after_step, {}

    def copying(self: StageCallbacks, state: Any, progress: Any, *more: Any) -> bool:
        go_on = after_step(self, state, progress, *more)
        copy_inside(self, progress.step, job)
        return go_on

    StageCallbacks.after_step = copying
    reply(pid=os.getpid())
    for line in stream:
        job = json.loads(line)
        act = die if job["die"] else stop
        events.watch(job["workdir"], job["stop"] if index == job["process"] else 0, act)
        said, matrix = "", None
        try:
            config = run_helpers.config(job["method"], **job["sections"])
            matrix = driver.run(config, job["workdir"]).tolist()
        except SystemExit:
            pass
        except (ValueError, OSError) as error:
            said = f"refused: {error}"
        except BaseException:
            said = traceback.format_exc()
        events.folder = ""
        exchanges = distributed.exchanges_started()
        reply(said=said, matrix=matrix, events=events.count, exchanges=exchanges)


def main() -> None:
    """Fork a worker per socket: importing everything takes longer than a run."""
    import run_helpers
    from jax.experimental import multihost_utils  # noqa: F401

    from cptjax.common import cluster  # noqa: F401
    from cptjax.continual import driver  # noqa: F401

    address, folder, devices = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    sockets = list(map(int, sys.argv[4:]))
    pids = []
    run_helpers.collect_rarely()
    for index, number in enumerate(sockets):
        pids.append(os.fork())
        if not pids[-1]:
            log = os.open(folder / f"{index}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 2)
            connection = socket.socket(fileno=number)
            serve(index, len(sockets), devices, address, connection)
            os._exit(0)
    for number in sockets:
        os.close(number)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(codes), flush=True)


# ---- in a test -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: `killed`, `refused` in the line `said`, or neither."""

    killed: bool
    said: str
    events: tuple[int, ...]  # changes of files by each process
    matrices: tuple[list | None, ...]  # the accuracies that each process returned

    @property
    def refused(self) -> bool:
        return bool(self.said)


class Workers:
    """The processes of one run after the other."""

    def __init__(self, count: int, folder: Path, devices: int = 0):
        import cluster_workers
        import run_helpers

        self.count, self.folder = count, folder
        folder.mkdir(exist_ok=True)
        address = f"localhost:{cluster_workers.free_port()}"
        pairs = [socket.socketpair() for _ in range(count)]
        numbers = [theirs.fileno() for _, theirs in pairs]
        self.process = subprocess.Popen(
            [
                *(sys.executable, __file__, address, str(folder)),
                str(devices or (DEVICES if count > 1 else 1)),
                *map(str, numbers),
            ],
            env=run_helpers.environment(),
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=numbers,
        )
        self.streams = []
        for ours, theirs in pairs:
            theirs.close()
            ours.settimeout(LIMIT)
            self.streams.append(ours.makefile("rw", encoding="utf-8"))
            ours.close()
        self.pids = [self.answer(i)["pid"] for i in range(count)]

    def answer(self, index: int) -> dict[str, Any]:
        line = self.streams[index].readline()
        assert line, f"process {index} died: {self.log(index)[-3000:]}"
        return json.loads(line)

    def log(self, index: int) -> str:
        return (self.folder / f"{index}.err").read_text()

    def start(self, job: dict[str, Any]) -> None:
        """Let all processes start a run.

        stop: the change of files at which `process` stops, or dies with `die`.
        copy: where the workdir is copied to in the second stage, without a stop.
        """
        defaults = {"stop": 0, "process": 0, "die": False, "copy": ""}
        for stream in self.streams:
            print(json.dumps(defaults | job), file=stream, flush=True)

    def run(self, job: dict[str, Any], copy_to: Path | None = None) -> Outcome:
        """Carry out a run; if it comes to the change `stop`, copy its workdir as it is then."""
        self.start(job)
        answers = [self.answer(job.get("process", 0))]
        if killed := "stopping" in answers[0]:
            with self.stopped():
                shutil.copytree(job["workdir"], copy_to, symlinks=True)
            print(file=self.streams[job.get("process", 0)], flush=True)
        order = sorted(range(self.count), key=lambda i: i != job.get("process", 0))
        answers = [a for a in answers if not killed] + [
            self.answer(i) for i in order[0 if killed else 1 :]
        ]
        by_process = dict(zip(order, answers, strict=True))
        said = [by_process[i]["said"] for i in range(self.count)]
        assert not any("Traceback" in text for text in said), "".join(said)
        assert len({answer["exchanges"] for answer in answers}) == 1
        line = "" if killed else said[0].removeprefix("refused: ")
        of_all = lambda key: tuple(by_process[i][key] for i in range(self.count))
        return Outcome(killed, line, of_all("events"), of_all("matrix"))

    @contextlib.contextmanager
    def stopped(self) -> Any:
        """Hold all threads of all workers."""
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)
        while not all(map(is_stopped, self.pids)):
            time.sleep(0.001)
        try:
            yield
        finally:
            for pid in self.pids:
                os.kill(pid, signal.SIGCONT)

    def ended(self) -> list[int]:
        """Wait until all workers ended by themselves; return their exit codes."""
        out, _ = self.process.communicate(timeout=LIMIT)
        return json.loads(out.splitlines()[-1])

    def close(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=60)


def is_stopped(pid: int) -> bool:
    states = [
        (task / "stat").read_text().rsplit(")", 1)[1].split()[0]
        for task in Path(f"/proc/{pid}/task").iterdir()
    ]
    return set(states) == {"T"}


if __name__ == "__main__":
    main()
