"""Checkpoints on disk: `steps/` within stages (the newest few), `stages/` after each stage (kept for good).

A checkpoint is a tree of arrays and a JSON `progress`; Orbax renames it into place when it is whole, so a kill leaves the
previous one. Numbers sort in time: stage * STAGE + step.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from cptjax import console

STAGE = 10**9  # more steps than any stage has


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path | str, every: int = 0, minutes: float = 0, keep: int = 2, async_save: bool = True):
        if every < 0 or minutes < 0 or keep < 1:
            raise ValueError(f"checkpoint: every={every} minutes={minutes} keep={keep}; expected every, minutes >= 0 and keep >= 1")
        self.folder = Path(folder).absolute()
        self.every, self.seconds, self.saved = every, minutes * 60, time.monotonic()
        self.managers = {
            kind: ocp.CheckpointManager(
                self.folder / kind,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep if kind == "steps" else None, enable_async_checkpointing=async_save, create=True
                ),
            )
            for kind in ("steps", "stages")
        }

    def due(self, step: int) -> bool:
        """Whether the interval in steps or in minutes has passed."""
        return bool(self.every and step % self.every == 0) or bool(self.seconds and time.monotonic() - self.saved >= self.seconds)

    def save(self, kind: str, stage: int, step: int, tree: Any, progress: dict) -> None:
        """Start saving; it goes on in the background until the next save or `wait`."""
        number = stage * STAGE + step
        manager = self.managers[kind]
        if number in manager.all_steps():  # a resumed run stands where this one was saved
            return
        args = ocp.args.Composite(tree=ocp.args.StandardSave(tree), progress=ocp.args.JsonSave(progress))
        manager.save(number, args=args, force=True)
        self.saved = time.monotonic()

    def wait(self) -> None:
        """Until everything saved is on disk; an error of the background thread is raised here."""
        for manager in self.managers.values():
            manager.wait_until_finished()

    def found(self) -> list[tuple[int, int, str]]:
        """(stage, step, kind), the newest first; at one place the step checkpoint, which holds the optimiser, comes first."""
        numbers = [(n, kind == "steps", kind) for kind, manager in self.managers.items() for n in manager.all_steps()]
        return [(*divmod(n, STAGE), kind) for n, _, kind in sorted(numbers, reverse=True)]

    def progress(self, kind: str, stage: int, step: int) -> dict:
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return self.managers[kind].restore(stage * STAGE + step, args=args)["progress"]

    def restore(self, kind: str, stage: int, step: int, like: Any) -> Any:
        """The tree, on the shardings and types of `like` (a tree of ShapeDtypeStruct): any mesh, any device count."""
        args = ocp.args.Composite(tree=ocp.args.StandardRestore(like))
        return self.managers[kind].restore(stage * STAGE + step, args=args)["tree"]

    def stage_end(self, stage: int) -> int:
        """The step at which a stage ended."""
        steps = [n % STAGE for n in self.managers["stages"].all_steps() if n // STAGE == stage]
        if not steps:
            have = sorted({n // STAGE for n in self.managers["stages"].all_steps()})
            raise ValueError(f"{self.folder} has no finished stage {stage}; finished stages: {have or 'none'}")
        return max(steps)

    def newest(self, read: Callable[[str, int, int], Any]) -> Any | None:
        """What `read(kind, stage, step)` makes of the newest readable checkpoint; a damaged one is left out with a warning."""
        for stage, step, kind in self.found():
            try:
                return read(kind, stage, step)
            except (OSError, KeyError, TypeError, ValueError, jax.errors.JaxRuntimeError) as error:
                if isinstance(error, Refused):
                    raise
                line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                console.warn(f"checkpoint {kind} of stage {stage}, step {step} can not be read ({line[:160]}); trying the one before")
        return None

    def close(self) -> None:
        for manager in self.managers.values():
            manager.close()


class Refused(ValueError):
    """A readable checkpoint that must not be used, such as one of another config: never skipped over."""
