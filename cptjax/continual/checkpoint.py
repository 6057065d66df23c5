"""Checkpoints on disk: saved in the background, restored onto any mesh.

    steps/      the newest few inside a stage
    stages/     one at the end of each stage, never deleted
    damaged/    those that could not be read

A checkpoint holds named trees of arrays and a JSON record called `progress`. Orbax renames it into
place when it is complete, so a killed run still has the checkpoint before. The checkpoints are
numbered by stage * STEPS_PER_STAGE + step, so that they sort by time.
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
    """Return the shapes, types and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


STEPS_PER_STAGE = 10**9  # more steps than any stage has
# Errors of the storage, which do not mean that a file is damaged.
TRANSIENT_ERRORS = (
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
)
CHECKPOINT_KINDS = ("steps", "stages")


def _keep_log_record(record: logging.LogRecord) -> bool:
    """Drop Orbax's errors from the log, since they are also raised where the run waits for it."""
    return "orbax" not in record.pathname or record.levelno < logging.ERROR


logging.getLogger("absl").addFilter(_keep_log_record)


class RunRefused(ValueError):
    """A workdir or an intact checkpoint that must not be used, such as one of another config."""


class CheckpointDamaged(ValueError):
    """A checkpoint whose files are missing, truncated or corrupt."""


class Checkpoints:
    """The checkpoints of one run.

    `tidy` removes the incomplete files of a killed run, so only the run itself may set it.
    """

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
                f"checkpoint: expected every, minutes >= 0 and keep >= 1, got every={every} "
                f"minutes={minutes} keep={keep}"
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
        """Return whether the interval in steps or in minutes has passed.

        The first process decides about minutes, for all processes.
        """
        late = False
        if self.seconds:
            late = distributed.gather_objects(time.monotonic() - self.saved >= self.seconds)[0]
        return bool(self.every and step % self.every == 0) or late

    def save(
        self, kind: str, stage: int, step: int, trees: Mapping[str, Any], progress: dict
    ) -> None:
        """Start saving in the background; the next save or `wait` waits for it.

        A checkpoint that already exists is not written again.
        """
        number, manager = stage * STEPS_PER_STAGE + step, self.managers[kind]
        if number in manager.all_steps():  # the run was resumed from this one
            return
        parts = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        progress = progress | {"trees": {name: tree_shapes(tree) for name, tree in trees.items()}}
        self._check_disk_space(trees)
        with _explain_failed_save(self.folder):
            manager.save(
                number,
                args=ocp.args.Composite(**parts, progress=ocp.args.JsonSave(progress)),
                force=True,
            )
        self.saved = time.monotonic()

    def wait(self) -> None:
        """Wait until everything saved is on disk; raise the errors of the background thread."""
        with _explain_failed_save(self.folder):
            for manager in self.managers.values():
                manager.wait_until_finished()

    def _check_disk_space(self, trees: Mapping[str, Any]) -> None:
        """Refuse trees that do not fit on the disk, before anything is written."""
        size = sum(x.nbytes for x in jax.tree.leaves(trees))
        free = shutil.disk_usage(self.folder).free
        if any(distributed.gather_objects(free < size)):
            raise OSError(
                f"{self.folder}: a checkpoint needs up to {size / 1e6:.1f} MB, got "
                f"{free / 1e6:.1f} MB of free disk; free some space and run the same command "
                "again. What was saved before is intact"
            )

    def found(self) -> list[tuple[int, int, str]]:
        """List the checkpoints as (stage, step, kind), the newest first.

        Of two at the same step, the end of the stage is first.
        """
        numbers = [
            (n, kind == "stages", kind)
            for kind, manager in self.managers.items()
            for n in manager.all_steps()
        ]
        return [(*divmod(n, STEPS_PER_STAGE), kind) for n, _, kind in sorted(numbers, reverse=True)]

    def progress(self, kind: str, stage: int, step: int) -> dict:
        """Load the JSON record of a checkpoint."""
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        with _reading():
            return self.managers[kind].restore(stage * STEPS_PER_STAGE + step, args=args)[
                "progress"
            ]

    def restore(self, kind: str, stage: int, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Load the trees named in `like`, with its dtypes and shardings, onto any mesh.

        `like` has trees of ShapeDtypeStruct.
        """
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
        """Return the newest stage with a checkpoint at its end; 0 = none."""
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
        """Return `read(kind, stage, step)` for the newest readable checkpoint.

        Damaged checkpoints are set aside with a warning. Return None if there is no checkpoint, or
        only damaged ones inside the first stage. Raise RunRefused if a finished stage is lost.
        """
        damaged: list[tuple[str, int, int]] = []
        first_problem = ""
        for stage, step, kind in self.found():
            result, problem = None, ""
            try:
                result = read(kind, stage, step)
            except CheckpointDamaged as error:
                problem = str(error)
            if not any(distributed.gather_objects(bool(problem))):
                self._set_aside(damaged)
                return result
            damaged.append((kind, stage, step))
            first_problem = first_problem or problem
            console.print_warning(
                f"checkpoint {kind} of stage {stage}, step {step} cannot be read "
                f"({problem[:160]}); trying the one before"
            )
        if any(kind == "stages" for kind, _, _ in damaged):
            raise RunRefused(
                f"none of the {len(damaged)} checkpoints in {self.folder} can be read "
                f"({first_problem[:160]}); restore them, or move the workdir away to start again"
            )
        self._set_aside(damaged)
        return None

    def _set_aside(self, damaged: list[tuple[str, int, int]]) -> None:
        """Move damaged checkpoints to `damaged/`, so that the run can save at their steps again."""
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
        """Wait until everything saved is on disk, and release Orbax's threads."""
        with _explain_failed_save(self.folder):
            for manager in self.managers.values():
                manager.close()


def tree_shapes(tree: Any) -> dict[str, list[int]]:
    """Return the shape of every array in a tree, by path."""
    return {
        jax.tree_util.keystr(path): list(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def refuse_other_shapes(
    saved: Mapping[str, dict[str, list[int]]], like: Mapping[str, Any], where: str
) -> None:
    """Refuse an intact checkpoint of another model or optimizer."""
    for name, tree in like.items():
        got, expected = saved.get(name, {}), tree_shapes(tree)
        paths = got.keys() | expected.keys()
        different = sorted(path for path in paths if got.get(path) != expected.get(path))
        if different:
            path = different[0]
            raise RunRefused(
                f"{where} does not fit: {name}{path}: expected shape "
                f"{expected.get(path, 'none')} by the config, got {got.get(path, 'none')} "
                f"({len(different)} arrays differ); "
                "change the config back, or use another --workdir"
            )


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Raise CheckpointDamaged for an unreadable file; raise other errors unchanged."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    # A damaged file causes errors of JSON, of the array store or of a missing folder.
    except Exception as error:
        if any(word in str(error) for word in TRANSIENT_ERRORS):
            raise
        raise CheckpointDamaged(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextlib.contextmanager
def _explain_failed_save(folder: Path) -> Iterator[None]:
    """Turn the error of a failed save into one line."""
    try:
        yield
    except RunRefused:
        raise
    except Exception as error:
        full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
        hint = "the disk is full: free some space" if full else "check the disk"
        raise OSError(
            f"a checkpoint cannot be written to {folder} ({_first_line(error)[:200]}); {hint}, "
            "then run the same command again. What was saved before is intact"
        ) from error
