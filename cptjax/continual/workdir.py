"""The folder of a run: its lock, and the config, input files and software that it started with."""

import contextlib
import fcntl
import itertools
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
from ml_collections import ConfigDict

from cptjax.common import buckets, config_checks, console, distributed, files
from cptjax.common.compiler_options import compiler_options
from cptjax.config import config_differences, declare_recorded, recorded_config
from cptjax.continual import fingerprints
from cptjax.continual.checkpoint import RunRefused
from cptjax.data.model_context import ModelContext

VISIBLE_SECONDS = 15.0  # for which a network file system may hide a new file from other hosts
TRY_SECONDS = 0.5  # between two tries to take a lock that another process holds
RUN_LOCK = ".lock"


# ---- one process at a time -----------------------------------------------------------------------


@contextlib.contextmanager
def lock_workdir(workdir: Path, wait: bool = False, name: str = RUN_LOCK) -> Iterator[Path]:
    """Lock the folder, so that no other process writes to it; with `wait`, wait for the other.

    It is a lock of the operating system, which releases it however this process ends. Locks of
    other names in one folder are independent of each other. In the local copy of a bucket's folder,
    an object in the bucket excludes other hosts, and the copy follows the bucket during this block.
    The result is the folder to write in: with another name than RUN_LOCK, a separate copy.
    """
    holder, owner = "", f"process {os.getpid()} on {socket.gethostname()}, start {uuid.uuid4().hex}"
    main, bucket_lock = distributed.is_main_process(), None
    with contextlib.ExitStack() as stack:
        if main:
            workdir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((workdir / name).open("a+"))
            if buckets.address_of(workdir):
                bucket_lock = buckets.BucketLock(workdir / name, owner)

        def take() -> tuple[str, str, bool]:
            holder = _take_lock(file, workdir, owner)
            if holder or bucket_lock is None:
                return holder, owner, False
            return bucket_lock.take(), owner, bucket_lock.abandoned

        for attempt in itertools.count():
            # After a stop signal all processes leave in this exchange.
            holder, owner, abandoned = distributed.decide_on_main(take)
            if not holder:
                break
            if not (wait or abandoned):  # an abandoned lock of another host is free soon
                raise RunRefused(f"{workdir} is in use by {holder}; wait for it, or stop it")
            if not attempt and main:
                console.print_message(f"waiting for {workdir}, which is in use by {holder}")
            time.sleep(TRY_SECONDS)
        if bucket_lock:
            stack.callback(bucket_lock.release)
        _refuse_other_folder(workdir / name, owner)
        try:
            with _follow_bucket(workdir, name, bucket_lock) as folder:
                yield folder
        finally:
            if main:
                file.truncate(0)


@contextlib.contextmanager
def _follow_bucket(workdir: Path, name: str, lock: buckets.BucketLock | None) -> Iterator[Path]:
    """Copy a locked folder from its bucket, and put what changes into the bucket."""
    if not buckets.address_of(workdir):
        yield workdir
        return
    workdir.mkdir(parents=True, exist_ok=True)
    if name != RUN_LOCK:  # a folder of runs, of which only the first process writes pages
        copy = buckets.comparison_copy(workdir)
        distributed.decide_on_main(buckets.push_all)
        distributed.decide_on_main(copy.pull)
        yield copy.folder
        distributed.decide_on_main(copy.push)
    else:
        copy = buckets.FolderCopy(workdir, buckets.belongs_to_run(distributed.process_index()))
        main = distributed.is_main_process()
        distributed.run_on_all(copy.pull if main else lambda: buckets.pull_run(workdir))
        with buckets.keep_pushing(copy, lock):
            yield workdir
        # What the first process has written, such as the model of a pre-stage, reaches all hosts.
        distributed.gather_objects(True)
        distributed.run_on_all(bool if main else lambda: buckets.pull_run(workdir))


def _refuse_other_folder(lock: Path, owner: str) -> None:
    """Refuse a workdir that is not the same folder on all processes: all read the lock's text."""
    if distributed.process_count() == 1:
        return
    end = time.monotonic() + VISIBLE_SECONDS
    while not (seen := _read_owner(lock) == owner) and time.monotonic() < end:
        time.sleep(0.5)
    results = distributed.gather_objects((seen, socket.gethostname()))
    others = [f"{i} (host {host})" for i, (sees, host) in enumerate(results) if not sees]
    if others:
        raise RunRefused(
            f"{lock.parent} on process {others[0]} is another folder than on process 0 (host "
            f"{results[0][1]}); give a folder that all hosts share at the same path"
        )


def _read_owner(lock: Path) -> str:
    try:
        address = buckets.address_of(lock)
        return buckets.lock_owner(address) if address else lock.read_text()
    except OSError:
        return ""


def _take_lock(file: IO[str], workdir: Path, owner: str) -> str:
    """Take the lock and return "", or return the name of the process that holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().partition(",")[0] or "another process"
    except OSError as error:
        console.print_warning(
            f"{workdir} cannot be locked ({error.strerror}); "
            "make sure that no other process uses it"
        )
    file.truncate(0)
    file.write(owner)
    file.flush()
    os.fsync(file.fileno())
    return ""


# ---- one config ----------------------------------------------------------------------------------


def read_run_config(workdir: Path) -> ConfigDict:
    """Load the config that the run was started with.

    The path of a pre-stage's model, which is stored relative to the workdir, is resolved; a model
    in a bucket is brought here.
    """
    path = workdir / "config.json"
    config = ConfigDict(files.read_json(path, dict))
    with files.explain_errors(str(path)):
        config_checks.check_sections(config)
    config = declare_recorded(config)
    if len(config.prestage):
        config.model.path = str(workdir / config.model.path)
        buckets.fetch_model(config.model.path)
    return config


def changes_since_start(config: ConfigDict, workdir: Path) -> list[str]:
    """List the differences from the config that the run was started with, a line per setting."""
    path = workdir / "config.json"
    if not path.is_file():
        return []
    recorded = recorded_config(config, workdir)
    with files.explain_errors(str(path)):
        return config_differences(files.read_json(path, dict), recorded)


def refuse_changed_config(config: ConfigDict, workdir: Path) -> None:
    """Refuse a workdir that was started with another config, unless `allow_change` is set."""
    changed = [] if config.allow_change else changes_since_start(config, workdir)
    if changed:
        raise RunRefused(
            f"{workdir / 'config.json'}: the run was started with another config: "
            f"{format_changes(changed)}. "
            "Use another --workdir, or --config.allow_change=True to continue with the new one"
        )


def format_changes(changed: list[str]) -> str:
    return "; ".join(changed[:8]) + " ..." * (len(changed) > 8)


# ---- the same input files ------------------------------------------------------------------------


def changed_inputs(workdir: Path, now: Mapping[str, str]) -> list[str]:
    """List the files and rows that differ from those of the run's start, by fingerprints.

    What is not known now, such as a file that was removed, is not compared.
    """
    before = recorded_inputs(workdir)
    return [
        f"{name} has changed ({before[name]} -> {now[name]})"
        for name in before
        if name in now and before[name] != now[name]
    ]


def recorded_inputs(workdir: Path) -> dict[str, str]:
    """Return the fingerprints in inputs.json; {} = none."""
    path = workdir / "inputs.json"
    return files.read_checked_json(path) if path.is_file() else {}


def refuse_changed_inputs(config: ConfigDict, workdir: Path, changed: list[str]) -> None:
    """Refuse a run whose input files changed after its start, unless `allow_change` is set."""
    if changed and not config.allow_change:
        raise RunRefused(
            f"{workdir}: since the run was started, {format_changes(changed)}. Restore it, or "
            "--config.allow_change=True to continue with the new content"
        )


# ---- software ------------------------------------------------------------------------------------


def record_start(
    workdir: Path, model_ctx: ModelContext, changed: list[str], inputs: Mapping[str, str]
) -> None:
    """Add the software of this start to versions.json, and the fingerprints to inputs.json."""
    path = workdir / "versions.json"
    versions = files.read_json(path, dict) if path.is_file() else {"starts": []}
    starts = versions["starts"] if "starts" in versions else [versions]
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise ValueError(f"{path}: expected a list of starts; delete the file, or restore it")
    start = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), **software_versions(model_ctx)}
    starts.append(start | {"accepted_changes": changed})
    before, now = starts[0].get("packages", {}), start["packages"]
    updated = [f"{n} {before[n]} -> {now[n]}" for n in now if before.get(n, now[n]) != now[n]]
    if starts[0].get("code", start["code"]) != start["code"]:
        updated.append(f"source of cptjax {starts[0]['commit']} -> {start['commit']}")
    if updated:
        console.print_warning(
            f"since the run was started, packages have changed: {', '.join(updated)}; "
            "results may differ from those of an uninterrupted run"
        )
    files.write_json(path, {"starts": starts})
    files.write_checked_json(workdir / "inputs.json", {**recorded_inputs(workdir), **inputs})


def software_versions(model_ctx: ModelContext) -> dict[str, Any]:
    """Return the packages, commit and devices that are needed to reproduce a result."""
    first = model_ctx.mesh.devices.flat[0]
    devices = [d.device_kind for d in model_ctx.mesh.devices.flat]
    return {
        "python": sys.version.split()[0],
        "packages": fingerprints.package_versions(),
        "commit": git_commit(Path(__file__).parents[1]),
        "code": fingerprints.code_hash(),
        "devices": {kind: devices.count(kind) for kind in dict.fromkeys(devices)},
        "mesh": dict(model_ctx.mesh.shape),
        "processes": jax.process_count(),
        "attention": model_ctx.cfg.compute.attention,
        "compiler_options": compiler_options(first.platform, first.device_kind),
    }


def git_commit(package: Path) -> str | None:
    """Return the commit of a package, with "-dirty" if files differ from it; None = not in git.

    An installed package may lie inside a repository of something else, which does not track it.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        return git("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty") or None
    except OSError:  # git is not installed
        return None
