"""Checkpoints on disk: `steps/` within stages (the newest few), `stages/` after each stage (kept for good).

A checkpoint is some named trees of arrays and a JSON `progress`; Orbax renames it into place when it is whole, so a kill leaves
the previous one. Numbers sort in time: stage * STAGE + step. One that can not be read is moved to `damaged/`.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from cptjax.common import console, distributed


def abstract_tree(tree: Any) -> Any:
    """Shapes, types and places of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


STEPS_PER_STAGE = 10**9  # more steps than any stage has
TRANSIENT_ERRORS = (
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
)  # not the files' fault
CHECKPOINT_KINDS = ("steps", "stages")


def _keep_log_record(record: logging.LogRecord) -> bool:
    """What goes wrong in Orbax's threads is raised where the run waits for them; its log would tell it again, in hundreds of lines."""
    return "orbax" not in record.pathname or record.levelno < logging.ERROR


logging.getLogger("absl").addFilter(_keep_log_record)


class RunRefused(ValueError):
    """A readable checkpoint that must not be used, such as one of another config: never skipped over."""


class CheckpointDamaged(ValueError):
    """A checkpoint whose files are missing, cut or spoilt."""


class Checkpoints:
    """The checkpoints of one run; `tidy` removes what a killed writer left, so only the run itself may ask for it."""

    def __init__(
        self,
        folder: Path | str,
        every: int = 0,
        minutes: float = 0,
        keep: int = 2,
        async_save: bool = True,
        tidy: bool = False,
    ):
        if every < 0 or minutes < 0 or keep < 1:
            raise ValueError(
                f"checkpoint: every={every} minutes={minutes} keep={keep}; expected every, minutes >= 0 and keep >= 1"
            )
        self.folder = Path(folder).absolute()
        self.every, self.seconds, self.saved = every, minutes * 60, time.monotonic()
        more = {
            "enable_async_checkpointing": async_save,
            "create": True,
            "cleanup_tmp_directories": tidy,
        }
        options = {
            kind: ocp.CheckpointManagerOptions(
                max_to_keep=keep if kind == "steps" else None, **more
            )
            for kind in CHECKPOINT_KINDS
        }
        self.managers = {
            kind: ocp.CheckpointManager(self.folder / kind, options=options[kind])
            for kind in CHECKPOINT_KINDS
        }

    def due(self, step: int) -> bool:
        """Whether the interval in steps or in minutes has passed; processes agree on the clock of the first."""
        late = (
            bool(self.seconds)
            and distributed.gather_objects(time.monotonic() - self.saved >= self.seconds)[0]
        )
        return bool(self.every and step % self.every == 0) or late

    def save(
        self, kind: str, stage: int, step: int, trees: Mapping[str, Any], progress: dict
    ) -> None:
        """Start saving; it goes on in the background until the next save or `wait`."""
        number, manager = stage * STEPS_PER_STAGE + step, self.managers[kind]
        if number in manager.all_steps():  # a resumed run stands where this one was saved
            return
        parts = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        about = progress | {"trees": {name: tree_shapes(tree) for name, tree in trees.items()}}
        self._room(trees)
        with self._writing():
            manager.save(
                number,
                args=ocp.args.Composite(**parts, progress=ocp.args.JsonSave(about)),
                force=True,
            )
        self.saved = time.monotonic()

    def wait(self) -> None:
        """Until everything saved is on disk; an error of the background thread is raised here."""
        with self._writing():
            for manager in self.managers.values():
                manager.wait_until_finished()

    def _writing(self) -> "_Writing":
        return _Writing(self.folder)

    def _room(self, trees: Mapping[str, Any]) -> None:
        """Refuse what the disk can not hold: a half-written checkpoint helps nobody, and its threads die with pages of traces."""
        need, free = (
            sum(x.nbytes for x in jax.tree.leaves(trees)),
            shutil.disk_usage(self.folder).free,
        )
        if any(distributed.gather_objects(free < need)):
            raise OSError(
                f"a checkpoint takes up to {need / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free at {self.folder}; free some "
                "space and run the same command again. What was saved before is whole"
            )

    def found(self) -> list[tuple[int, int, str]]:
        """(stage, step, kind), the newest first; at one place the stage's end comes first."""
        numbers = [
            (n, kind == "stages", kind)
            for kind, manager in self.managers.items()
            for n in manager.all_steps()
        ]
        return [(*divmod(n, STEPS_PER_STAGE), kind) for n, _, kind in sorted(numbers, reverse=True)]

    def progress(self, kind: str, stage: int, step: int) -> dict:
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        with _reading():
            return self.managers[kind].restore(stage * STEPS_PER_STAGE + step, args=args)[
                "progress"
            ]

    def restore(self, kind: str, stage: int, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """The trees that `like` names, on its shardings and types (trees of ShapeDtypeStruct): any mesh, any device count."""
        refuse_other_shapes(
            self.progress(kind, stage, step)["trees"],
            like,
            f"checkpoint {kind} of stage {stage}, step {step}",
        )
        args = ocp.args.Composite(
            **{name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        )
        with _reading():
            return dict(
                self.managers[kind].restore(stage * STEPS_PER_STAGE + step, args=args).items()
            )

    def newest_stage(self) -> int:
        """Return the newest stage that is saved at its end; 0 = none."""
        steps = self.managers["stages"].all_steps()
        return max((n // STEPS_PER_STAGE for n in steps), default=0)

    def stage_end(self, stage: int) -> int:
        """Return the step at which a stage ended."""
        steps = [
            n % STEPS_PER_STAGE
            for n in self.managers["stages"].all_steps()
            if n // STEPS_PER_STAGE == stage
        ]
        if not steps:
            have = sorted({n // STEPS_PER_STAGE for n in self.managers["stages"].all_steps()})
            raise ValueError(
                f"{self.folder} has no finished stage {stage}; finished stages: {have or 'none'}"
            )
        return max(steps)

    def newest(self, read: Callable[[str, int, int], Any]) -> Any | None:
        """What `read(kind, stage, step)` makes of the newest readable checkpoint; damaged ones are put aside with a warning.

        None = there is none, or only damaged ones within the first stage. Where a finished stage is lost, it refuses.
        """
        damaged: list[tuple[str, int, int]] = []
        said = ""
        for stage, step, kind in self.found():
            result, problem = _try_read(read, kind, stage, step)
            if not any(distributed.gather_objects(bool(problem))):
                self._put_aside(damaged)
                return result
            damaged.append((kind, stage, step))
            said = said or problem
            console.print_warning(
                f"checkpoint {kind} of stage {stage}, step {step} can not be read ({problem[:160]}); trying the one before"
            )
        if any(kind == "stages" for kind, _, _ in damaged):
            raise RunRefused(
                f"none of the {len(damaged)} checkpoints in {self.folder} can be read ({said[:160]}); bring them back, or move the workdir "
                "away to start anew"
            )
        self._put_aside(damaged)
        return None

    def _put_aside(self, damaged: list[tuple[str, int, int]]) -> None:
        """Out of the way, so that the run can save at the same place again."""
        if damaged and distributed.is_main_process():
            for kind, stage, step in damaged:
                to = self.folder / "damaged" / f"{kind}-stage{stage}-step{step}"
                shutil.rmtree(to, ignore_errors=True)
                to.parent.mkdir(exist_ok=True)
                (self.folder / kind / str(stage * STEPS_PER_STAGE + step)).rename(to)
        if damaged:
            distributed.gather_objects(True)
            for manager in self.managers.values():
                manager.reload()

    def close(self) -> None:
        with self._writing():
            for manager in self.managers.values():
                manager.close()


def tree_shapes(tree: Any) -> dict[str, list[int]]:
    """The shape of every array of a tree by its path."""
    return {
        jax.tree_util.keystr(path): list(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def refuse_other_shapes(
    saved: Mapping[str, dict[str, list[int]]], like: Mapping[str, Any], where: str
) -> None:
    """A checkpoint of another model or optimiser is whole; it only does not fit."""
    for name, tree in like.items():
        there, here = saved.get(name, {}), tree_shapes(tree)
        other = sorted(
            path for path in there.keys() | here.keys() if there.get(path) != here.get(path)
        )
        if other:
            first = f"{name}{other[0]} has shape {there.get(other[0], 'none')} there, {here.get(other[0], 'none')} by the config"
            raise RunRefused(
                f"{where} does not fit: {first} ({len(other)} arrays differ); change the config back, or use another --workdir"
            )


def _try_read(
    read: Callable[[str, int, int], Any], kind: str, stage: int, step: int
) -> tuple[Any, str]:
    """(what was read, "") or (None, what is damaged)."""
    try:
        return read(kind, stage, step), ""
    except CheckpointDamaged as error:
        return None, str(error)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Tells damage from what is no fault of the files."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # a damaged file shows itself in many ways: of JSON, of the array store, of a missing folder
        if any(word in str(error) for word in TRANSIENT_ERRORS):
            raise
        raise CheckpointDamaged(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class _Writing:
    """Turns whatever a failed save raises into one line."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, RunRefused):
            full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
            hint = "the disk is full: free some space" if full else "look at the disk"
            raise OSError(
                f"a checkpoint can not be written to {self.folder} ({_first_line(error)[:200]}); {hint}, then run the same command again. "
                "What was saved before is whole"
            ) from error
