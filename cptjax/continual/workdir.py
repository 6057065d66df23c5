"""The folder of a run: its lock, the config that it was started with, software versions."""

import contextlib
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
from ml_collections import ConfigDict

from cptjax.common import console, distributed
from cptjax.config import config_differences, recorded_config
from cptjax.continual import fingerprints
from cptjax.continual.checkpoint import RunRefused
from cptjax.data.model_context import ModelContext


def local_folder(workdir: str | Path) -> Path:
    """Return the path of a local folder; refuse the address of a bucket."""
    if re.match(r"\w{2,}:/", str(workdir)):
        raise ValueError(
            f"--workdir={workdir}: expected a folder; mount the bucket (gcsfuse) or a shared disk "
            "and give the path"
        )
    return Path(workdir)


# ---- one process at a time -----------------------------------------------------------------------


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Lock the folder, so that no other process writes to it.

    It is a lock of the operating system, which releases it however this process ends.
    """
    holder = ""
    with contextlib.ExitStack() as stack:
        if distributed.is_main_process():
            workdir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((workdir / ".lock").open("a+"))
            holder = _take_lock(file, workdir)
        holder = distributed.gather_objects(holder)[0]
        if holder:
            raise RunRefused(f"{workdir} is in use by {holder}; wait for it, or stop it")
        try:
            yield
        finally:
            if distributed.is_main_process():
                file.truncate(0)


def _take_lock(file: IO[str], workdir: Path) -> str:
    """Take the lock and return "", or return the name of the process that holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another process"
    except OSError as error:
        console.print_warning(
            f"{workdir} cannot be locked ({error.strerror}); "
            "make sure that no other process uses it"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return ""


# ---- one config ----------------------------------------------------------------------------------


def read_run_config(workdir: Path) -> ConfigDict:
    """Load the config that the run was started with.

    The path of a pre-stage's model, which is stored relative to the workdir, is resolved.
    """
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    if len(config.prestage):
        config.model.path = str(workdir / config.model.path)
    return config


def changes_since_start(config: ConfigDict, workdir: Path) -> list[str]:
    """List the differences from the config that the run was started with, a line per setting."""
    path = workdir / "config.json"
    if not path.is_file():
        return []
    return config_differences(json.loads(path.read_text()), recorded_config(config, workdir))


def refuse_changed_config(config: ConfigDict, workdir: Path) -> None:
    """Refuse a workdir that was started with another config, unless `allow_change` is set."""
    changed = [] if config.allow_change else changes_since_start(config, workdir)
    if changed:
        raise RunRefused(
            f"{workdir} was started with another config: {format_changes(changed)}. "
            "Use another --workdir, or --config.allow_change=True to continue with the new one"
        )


def format_changes(changed: list[str]) -> str:
    return "; ".join(changed[:8]) + " ..." * (len(changed) > 8)


# ---- software ------------------------------------------------------------------------------------


def software_versions(model_ctx: ModelContext) -> dict[str, Any]:
    """Return the packages, commit and devices that are needed to reproduce a result."""
    devices = [d.device_kind for d in model_ctx.mesh.devices.flat]
    return {
        "python": sys.version.split()[0],
        "packages": fingerprints.package_versions(),
        "commit": _git_commit(),
        "code": fingerprints.code_hash(),
        "devices": {kind: devices.count(kind) for kind in dict.fromkeys(devices)},
        "mesh": dict(model_ctx.mesh.shape),
        "processes": jax.process_count(),
        "attention": model_ctx.cfg.compute.attention,
    }


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None
