"""A run's folder: where it may lie, which process holds it, which config started it, and what it was run with."""

import contextlib
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import jax
from ml_collections import ConfigDict

from cptjax.common import console, distributed
from cptjax.config import config_differences, recorded_config
from cptjax.continual.checkpoint import RunRefused
from cptjax.data.model_context import ModelContext

RECORDED_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "datasets",
    "grain",
    "ml-collections",
    "numpy",
    "cptjax",
)


def local_folder(workdir: str | Path) -> Path:
    """The folder, unless it is the address of a bucket."""
    if re.match(r"\w{2,}:/", str(workdir)):
        raise ValueError(
            f"--workdir={workdir}: expected a folder; mount the bucket (gcsfuse) or a shared disk and give the path"
        )
    return Path(workdir)


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """No other process works on the folder meanwhile; the lock is the system's, so it is free again however this process ends."""
    refused = ""
    with contextlib.ExitStack() as stack:
        if distributed.is_main_process():
            workdir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((workdir / ".lock").open("a+"))
            refused = _take_lock(file, workdir)
        if refused := distributed.gather_objects(refused)[0]:
            raise RunRefused(refused)
        try:
            yield
        finally:
            if distributed.is_main_process():
                file.truncate(0)


def _take_lock(file: IO[str], workdir: Path) -> str:
    """ "" where this process holds the lock now, else who does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return f"{workdir} is in use by {file.read().strip() or 'another process'}; wait for it, or stop it"
    except OSError as error:
        console.print_warning(
            f"{workdir} can not be locked ({error.strerror}); see to it that no other process works on it"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return ""


def read_run_config(workdir: Path) -> ConfigDict:
    """The config that started the workdir, a pre-stage's model at its place again."""
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    if len(config.prestage):
        config.model.path = str(workdir / config.model.path)
    return config


def changes_since_start(config: ConfigDict, workdir: Path) -> list[str]:
    """What differs from the config that started the workdir."""
    path = workdir / "config.json"
    return (
        config_differences(json.loads(path.read_text()), recorded_config(config, workdir))
        if path.is_file()
        else []
    )


def refuse_changed_config(config: ConfigDict, workdir: Path) -> None:
    """A workdir belongs to the config that started it."""
    changed = [] if config.allow_change else changes_since_start(config, workdir)
    if changed:
        raise RunRefused(
            f"{workdir} was started with another config: {format_changes(changed)}. "
            "Use another --workdir, or --config.allow_change=True to go on with the new one"
        )


def format_changes(changed: list[str]) -> str:
    return "; ".join(changed[:8]) + " ..." * (len(changed) > 8)


def software_versions(model_ctx: ModelContext) -> dict[str, Any]:
    """Packages, commit and devices: what a number needs to be made again."""
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    devices = [d.device_kind for d in model_ctx.mesh.devices.flat]
    return {
        "python": sys.version.split()[0],
        "packages": found,
        "commit": _git_commit(),
        "devices": {kind: devices.count(kind) for kind in dict.fromkeys(devices)},
        "mesh": dict(model_ctx.mesh.shape),
        "processes": jax.process_count(),
        "attention": model_ctx.cfg.attention,
    }


def _git_commit() -> str | None:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git on this machine
        return None
    return asked.stdout.strip() or None
