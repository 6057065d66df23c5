"""The driver: for each stage train -> checkpoint -> evaluate every task -> record; every run that a config describes."""

import contextlib
import errno
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cptjax import console, exams, learning, multihost, report, settings, stage, summary
from cptjax.checkpoint import Refused
from cptjax.model import convert
from cptjax.report import expect
from cptjax.resume import resume
from cptjax.session import Run, Sigterm, open_run, sign
from cptjax.workdir import changes, listed, local, locked


def run(config: ConfigDict, workdir: str | Path) -> np.ndarray:
    """Every run that the config describes, each from where it stands; the accuracy matrix, row 0 = base model.

    Several runs (arms, seeds, orders) are stacked, [run, stage, task], padded with NaN to the largest of them.
    """
    workdir = local(workdir)
    check(config)
    sigterm, matrices = Sigterm(), []
    with listening(sigterm), full_disk_told(workdir), locked(workdir):
        for sub, base in settings.bases(config).items():
            make_base(base, workdir / sub, sigterm)
        found = settings.variants(config, workdir)
        for sub, single in found:
            matrices.append(one(single, workdir / sub, sigterm))
            if len(found) > 1 and multihost.first():
                report.write_all(workdir)
    return matrices[0] if len(found) == 1 else stacked(matrices)


def check(config: ConfigDict) -> None:
    """Everything that can be refused before anything is loaded."""
    expect.check(config)
    for _, single in settings.runs(config):
        settings.check(single)
        for each in settings.stages(single):
            stage.check(each)


def stacked(matrices: list[np.ndarray]) -> np.ndarray:
    shape = np.max([m.shape for m in matrices], axis=0)
    return np.stack([np.pad(m, [(0, n - s) for n, s in zip(shape, m.shape, strict=True)], constant_values=np.nan) for m in matrices])


def make_base(config: ConfigDict, folder: Path, sigterm: Sigterm) -> None:
    """The base model of a pre-stage, in `hf/`; made once, and never another under the runs that stand on it."""
    if not (folder / "hf" / "config.json").is_file():
        one(config, folder, sigterm, export=folder / "hf")
        return
    changed = [line for line in changes(config, folder) if not line.startswith(("eval.", "name:"))]
    if changed:
        raise Refused(f"{folder / 'hf'} was made with another config: {listed(changed)}. Runs stand on it; use another --workdir")


def one(config: ConfigDict, workdir: Path, sigterm: Sigterm, export: Path | None = None) -> np.ndarray:
    """One run to its end; `export` gets the last model as a Hugging Face folder."""
    with contextlib.closing(open_run(config, workdir, sigterm)) as current:
        place = resume(current)
        exams.open_all(current, place)
        sign(current)
        for number in range(place.stage, len(current.stages) + 1):
            if number and not place.finished(number):
                learning.learn(current, current.stages[number - 1], place if place.stage == number else None)
            if number or config.eval.before:
                exams.examine(current, number, place)
        current.checkpoints.wait()
        matrix = finish(current)
        if export is not None:
            convert.save(current.params, current.rt.cfg, export, current.rt.processor, config.model.param_dtype)
    return matrix


@contextlib.contextmanager
def listening(sigterm: Sigterm) -> Iterator[None]:
    """SIGTERM goes to `sigterm` meanwhile; only the main thread may listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def full_disk_told(workdir: Path) -> Iterator[None]:
    """The system's own words for a full disk name no place."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"{workdir}: no space left on the disk; free some and run the same command again, what is saved is whole") from error


def finish(current: Run) -> np.ndarray:
    """Summary, report and the matrix."""
    if current.log:
        summary.write(current.workdir)
        console.say(f"done: {report.write([current.workdir])}")
    multihost.gather(True)
    return summary.load(current.workdir)[1].array()
