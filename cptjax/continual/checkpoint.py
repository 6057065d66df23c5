"""Checkpoints on disk: saved in the background, restored onto any mesh.

    steps/      the newest few inside a stage
    stages/     one at the end of each stage, never deleted
    damaged/    those that could not be read

A checkpoint holds named trees of arrays and a JSON record called `progress`, with the shape, dtype
and checksum of each array and a hash of the record itself, which are verified on reading. Orbax
renames a checkpoint into place when it is complete, so a killed run still has the checkpoint
before. The checkpoints are numbered by stage * STEPS_PER_STAGE + step, so that they sort by time.
Orbax sends these numbers between processes in 32 bits. In a bucket, where nothing can be renamed,
Orbax writes a file last that marks a checkpoint as complete.

An error of the disk or the network is not damage: reading is tried again, then the run stops. Only
a file that is missing, cannot be parsed, or does not match its checksum marks a checkpoint as
damaged.
"""

import contextlib
import logging
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from cptjax.common import buckets, console, distributed, files, phases
from cptjax.continual import checksums


def abstract_tree(tree: Any) -> Any:
    """Return the shapes, types and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


STEPS_PER_STAGE = 10**6  # more steps than any stage has
OLD_STEPS_PER_STAGE = 10**9  # of older versions
RETRY_SECONDS = (0.5, 2.0, 8.0)  # pauses before a failed read is tried again
# Words of errors that say nothing about the files: raised unchanged.
OTHER_ERRORS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")
# Words of errors of the disk or the network in the messages of the array store.
STORAGE_ERRORS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "OS error")
REQUEST_MODULES = ("gcsfs.", "aiohttp.", "google.")  # whose errors are those of a bucket
MISSING_WORDS = ("NOT_FOUND", "No such file")
COMMIT_FILE = "commit_success.txt"  # which Orbax writes last into a folder of a bucket
CHECKPOINT_KINDS = ("steps", "stages")
DAMAGED_NAME = re.compile(r"(?P<kind>steps|stages)-stage(?P<stage>\d+)-step(?P<step>\d+)")


def _keep_log_record(record: logging.LogRecord) -> bool:
    """Drop Orbax's errors from the log, since they are also raised where the run waits for it.

    Its advice to save less often, where a save takes a second, is dropped too.
    """
    if "orbax" not in record.pathname:
        return True
    return record.levelno < logging.ERROR and "Waiting for previous save" not in str(record.msg)


logging.getLogger("absl").addFilter(_keep_log_record)


def _hide_unfinished_reads(event: Any, hook: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """Print no traceback of the reads that Orbax leaves unfinished where another one failed."""
    code = getattr(event.object, "cr_code", None)
    if code is None or "orbax" not in code.co_filename:
        hook(event)


sys.unraisablehook = _hide_unfinished_reads


class RunRefused(ValueError):
    """A workdir or an intact checkpoint that must not be used, such as one of another config."""


class StateLost(ValueError):
    """A run cannot continue where it stopped, since a checkpoint or a file of results is lost."""


class CheckpointDamaged(ValueError):
    """A checkpoint whose files are missing, truncated or corrupt; `reason` does not name it."""

    def __init__(self, folder: Path, reason: str):
        super().__init__(folder, reason)
        self.reason = reason

    def __str__(self) -> str:
        folder, reason = self.args
        return f"{folder} is damaged: {reason}; bring back a copy of it"


def checkpoint_folder(workdir: Path) -> Path:
    """Return the folder of a run's checkpoints, which is in the bucket itself for a local copy."""
    folder = workdir / "checkpoints"
    return bucket_folder(folder) if buckets.address_of(folder) else folder


def bucket_folder(folder: Path) -> Any:
    """Return the bucket's folder that a local copy stands for, and set how often Orbax retries."""
    # Pauses of 1, 2, 4, ... s: as long as other requests, where the array store takes 15 minutes.
    count = int(buckets.RETRY_SECONDS).bit_length() - 1
    retries = {"max_retries": count, "initial_delay": "1s", "max_delay": "1h"}
    for context in (
        tensorstore_utils._BASE_TS_CONTEXT,
        tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT,
    ):
        context["gcs_request_retries"] = retries
    return epath.Path(buckets.address_of(folder))


def explain_folder(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Turn errors of a bucket into one line, if a folder is in one."""
    is_address = buckets.is_address(str(folder))
    return buckets.explain_bucket_errors(str(folder)) if is_address else contextlib.nullcontext()


def has_checkpoints(workdir: Path) -> bool:
    """Return whether a run has saved something."""
    folder = checkpoint_folder(workdir)
    with explain_folder(folder):
        return any(path.name.isdigit() for path in folder.glob("*/*"))


def open_checkpoints(workdir: Path) -> "Checkpoints | None":
    """Open the checkpoints of a run to read them; None = it has none."""
    folder = checkpoint_folder(workdir)
    with explain_folder(folder):
        if not folder.is_dir():  # opening would create it
            return None
    return Checkpoints(folder, async_save=False)


def remove_checkpoints(workdir: Path) -> None:
    """Delete all checkpoints of a run."""
    folder = checkpoint_folder(workdir)
    if buckets.is_address(str(folder)):
        buckets.remove_objects(str(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)


class Checkpoints:
    """The checkpoints of one run.

    `tidy` removes the incomplete files of a killed run, so only the run itself may set it.
    `on_saved(stage, step, kind)` is called when a checkpoint is completely on disk.
    """

    def __init__(
        self,
        folder: Path | str,
        every: int = 0,
        minutes: float = 0,
        keep: int = 2,
        async_save: bool = True,
        tidy: bool = False,
        on_saved: Callable[[int, int, str], None] | None = None,
    ):
        if every < 0 or minutes < 0 or keep < 1:
            raise ValueError(
                f"checkpoint: expected every, minutes >= 0 and keep >= 1, got every={every} "
                f"minutes={minutes} keep={keep}"
            )
        self.in_bucket = buckets.is_address(str(folder))
        self.folder = folder if self.in_bucket else Path(folder).absolute()
        self.every, self.seconds, self.saved = every, minutes * 60, time.monotonic()
        self.on_saved, self._saving = on_saved, None
        more = {
            "enable_async_checkpointing": async_save,
            "create": True,
            "cleanup_tmp_directories": tidy and not self.in_bucket,
            "single_host_load_and_broadcast": True,  # all processes see the same checkpoints
        }
        options = {
            kind: ocp.CheckpointManagerOptions(
                max_to_keep=keep if kind == "steps" else None, **more
            )
            for kind in CHECKPOINT_KINDS
        }
        if tidy and self.in_bucket:
            # Orbax would write a checkpoint into what a killed run left of the same one.
            for kind in CHECKPOINT_KINDS:
                address = str(self.folder / kind)
                distributed.decide_on_main(
                    lambda address=address: buckets.remove_objects(address, COMMIT_FILE)
                )
        with explain_folder(self.folder):
            self.managers = {
                kind: ocp.CheckpointManager(self.folder / kind, options=options[kind])
                for kind in CHECKPOINT_KINDS
            }
        self._refuse_old_numbers()

    def _refuse_old_numbers(self) -> None:
        for kind, manager in self.managers.items():
            for number in manager.all_steps():
                if number >= OLD_STEPS_PER_STAGE:
                    stage, step = divmod(number, OLD_STEPS_PER_STAGE)
                    raise RunRefused(
                        f"{self.folder / kind / str(number)} has the number that an older version "
                        f"gave it; rename it to {stage * STEPS_PER_STAGE + step}, and the others "
                        "likewise: stage * 1000000 + step"
                    )

    def due(self, step: int) -> bool:
        """Return whether the interval in steps or in minutes has passed.

        The first process decides about minutes, for all processes.
        """
        late = False
        if self.seconds:
            late = distributed.gather_objects(time.monotonic() - self.saved >= self.seconds)[0]
        return bool(self.every and step % self.every == 0) or late

    @phases.phase("saving")
    def save(
        self, kind: str, stage: int, step: int, trees: Mapping[str, Any], progress: dict
    ) -> None:
        """Start saving in the background; the next save or `wait` waits for it.

        A checkpoint that already exists is not written again.
        """
        number, manager = stage * STEPS_PER_STAGE + step, self.managers[kind]
        if number in manager.all_steps():  # the run was resumed from this one
            return
        self.wait()
        parts = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        described = {name: describe_arrays(tree) for name, tree in trees.items()}
        progress = files.add_hash(progress | {"trees": described})
        self._check_disk_space(trees)
        with _explain_failed_save(self.folder):
            manager.save(
                number,
                args=ocp.args.Composite(**parts, progress=ocp.args.JsonSave(progress)),
                force=True,
            )
        self.saved, self._saving = time.monotonic(), (stage, step, kind)

    @phases.phase("saving")
    def wait(self) -> None:
        """Wait until everything saved is on disk; raise the errors of the background thread."""
        with _explain_failed_save(self.folder):
            for manager in self.managers.values():
                manager.wait_until_finished()
            saved, self._saving = self._saving, None
            if saved and not self.in_bucket:
                files.sync_folder(self.folder / saved[2])
        if saved and self.on_saved:
            self.on_saved(*saved)

    def _check_disk_space(self, trees: Mapping[str, Any]) -> None:
        """Refuse trees that do not fit on the disk, before anything is written."""
        if self.in_bucket:
            return
        size = sum(x.nbytes for x in jax.tree.leaves(trees))
        space = (shutil.disk_usage(self.folder).free, socket.gethostname())
        free, host = min(distributed.gather_objects(space))
        if free < size:
            raise OSError(
                f"{self.folder}: a checkpoint needs up to {size / 1e6:.1f} MB, got "
                f"{free / 1e6:.1f} MB of free disk on host {host}; free some space and run the "
                "same command again. What was saved before is intact"
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

    def path(self, kind: str, stage: int, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.folder / kind / str(stage * STEPS_PER_STAGE + step)

    def progress(self, kind: str, stage: int, step: int) -> dict:
        """Load the JSON record of a checkpoint."""

        def read() -> dict:
            args = {"progress": ocp.args.JsonRestore()}
            record = self._read(kind, stage, step, args)["progress"]
            if not is_unverified(record) and not files.has_valid_hash(record):
                place = self.path(kind, stage, step)
                raise CheckpointDamaged(place, "its record does not match its hash")
            return record

        return distributed.run_on_all(read)

    def restore(self, kind: str, stage: int, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Load the trees named in `like`, with its dtypes and shardings, onto any mesh.

        `like` has trees of ShapeDtypeStruct.
        """
        where = f"checkpoint {kind} of stage {stage}, step {step}"
        record = self.progress(kind, stage, step)
        refuse_other_shapes(record["trees"], like, where)
        if is_unverified(record):
            console.print_warning(f"{where} is of an older version, without checksums: unverified")
        as_saved = {name: _with_saved_dtypes(like[name], record["trees"][name]) for name in like}
        args = {name: ocp.args.StandardRestore(tree) for name, tree in as_saved.items()}
        # Each process reads its own part, and all of them compute the checksums together.
        trees = distributed.run_on_all(lambda: self._read(kind, stage, step, args))
        if not is_unverified(record):
            _refuse_changed_arrays(trees, record["trees"], self.path(kind, stage, step))
        return {name: jax.tree.map(_cast_like, trees[name], like[name]) for name in like}

    def _read(self, kind: str, stage: int, step: int, args: dict[str, Any]) -> dict[str, Any]:
        """Read parts of a checkpoint; an error of the disk is tried again, then raised.

        Handlers read without the barrier of Orbax's CheckpointManager, at which the other processes
        would wait for one that fails.
        """
        place = self.path(kind, stage, step)
        for pause in (*RETRY_SECONDS, None):
            try:
                return {
                    name: _handler(arg).restore(place / name, args=arg)
                    for name, arg in args.items()
                }
            except Exception as error:
                problem = _refuse_other_errors(error, place)
                if pause is None and isinstance(problem, FileNotFoundError):
                    raise CheckpointDamaged(place, f"a file is missing: {problem}") from error
                if pause is None:
                    raise files.TryAgain(
                        f"{place} cannot be read ({problem}); nothing was changed: run the same "
                        "command again when the disk answers"
                    ) from error
                console.print_warning(f"{place}: {problem}; reading again in {pause:g} s")
                time.sleep(pause)
        raise AssertionError

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

    def newest(
        self, read: Callable[[str, int, int], Any], repeat_stages: bool = False
    ) -> Any | None:
        """Return `read(kind, stage, step)` for the newest readable checkpoint.

        Damaged checkpoints inside a stage are set aside with a warning. Return None if there is no
        other. A damaged end of a stage raises StateLost, unless finished stages may be repeated.
        """
        damaged: list[tuple[str, int, int]] = []
        for stage, step, kind in self.found():
            try:
                result = read(kind, stage, step)
            except CheckpointDamaged as error:
                reason = error.reason
            else:
                self._set_aside(damaged)
                return result
            name = f"checkpoint {kind} of stage {stage}, step {step}"
            if kind == "stages" and not repeat_stages:
                raise StateLost(f"{name} ({self.path(kind, stage, step)}) is damaged: {reason}")
            damaged.append((kind, stage, step))
            console.print_warning(f"{name} cannot be read ({reason}); trying the one before")
        self._set_aside(damaged)
        return None

    def newest_name(self) -> tuple[int, int, str] | None:
        """Return (stage, step, kind) of the newest checkpoint, one in `damaged/` included."""
        names = [
            (int(m["stage"]), int(m["step"]), m["kind"])
            for path in self._damaged()
            if (m := DAMAGED_NAME.fullmatch(path.name))
        ]
        return max([*names, *self.found()], key=checkpoint_order, default=None)

    def _damaged(self) -> list[Path]:
        folder = self.folder / "damaged"
        with explain_folder(self.folder):
            return list(folder.iterdir()) if folder.is_dir() else []

    def remove_steps(self, stage: int) -> None:
        """Delete the checkpoints inside all stages up to this one, whose end is saved."""
        manager = self.managers["steps"]
        with explain_folder(self.folder):
            for number in manager.all_steps():
                if number // STEPS_PER_STAGE <= stage:
                    manager.delete(number)

    def move_all(self, folder: Path) -> None:
        """Move all checkpoints into another folder of the same disk or bucket."""
        if distributed.is_main_process():
            for kind in CHECKPOINT_KINDS:
                self._move(self.folder / kind, folder / kind)
                (self.folder / kind).mkdir(exist_ok=True)
        self._reload()

    def _set_aside(self, damaged: list[tuple[str, int, int]]) -> None:
        """Move damaged checkpoints to `damaged/`, so that the run can save at their steps again."""
        if damaged and distributed.is_main_process():
            for kind, stage, step in damaged:
                to = self.folder / "damaged" / f"{kind}-stage{stage}-step{step}"
                self._move(self.path(kind, stage, step), to)
        if damaged:
            self._reload()

    def _move(self, folder: Path, to: Path) -> None:
        """Move a folder, in place of one that was moved there before."""
        if self.in_bucket:
            buckets.move_objects(str(folder), buckets.address_of(to) or str(to))
            return
        shutil.rmtree(to, ignore_errors=True)
        to.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(to)

    def _reload(self) -> None:
        distributed.gather_objects(True)
        with explain_folder(self.folder):
            for manager in self.managers.values():
                manager.reload()

    def close(self) -> None:
        """Wait until everything saved is on disk, and release Orbax's threads."""
        with _explain_failed_save(self.folder):
            for manager in self.managers.values():
                manager.close()


def _handler(arg: Any) -> Any:
    """Return the handler that reads one part of a checkpoint."""
    if isinstance(arg, ocp.args.JsonRestore):
        return ocp.JsonCheckpointHandler()
    return ocp.StandardCheckpointHandler()


def checkpoint_order(name: tuple[int, int, str]) -> tuple[int, int, bool]:
    """Return a key that sorts (stage, step, kind) by time."""
    stage, step, kind = name
    return stage, step, kind == "stages"


# ---- what a record says about the arrays ---------------------------------------------------------


def tree_shapes(tree: Any) -> dict[str, list[int]]:
    """Return the shape of every array in a tree, by path."""
    return {
        jax.tree_util.keystr(path): list(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe_arrays(tree: Any) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and checksum of every array in a tree, by path."""
    sums = checksums.array_checksums(tree)
    paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path): x for path, x in paths}
    return {
        path: {"shape": list(x.shape), "dtype": str(x.dtype), "checksum": sums[path]}
        for path, x in leaves.items()
    }


def is_unverified(record: Mapping[str, Any]) -> bool:
    """Return whether a record is of an older version, which stored only the shapes."""
    return any(
        isinstance(array, list) for tree in record["trees"].values() for array in tree.values()
    )


def _saved_shape(array: dict[str, Any] | list[int]) -> list[int]:
    return array["shape"] if isinstance(array, dict) else array


def _with_saved_dtypes(tree: Any, saved: Mapping[str, Any]) -> Any:
    """Return abstract arrays with the dtypes of the checkpoint, whose checksums need them."""

    def restored(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        array = saved[jax.tree_util.keystr(path)]
        dtype = array["dtype"] if isinstance(array, dict) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(restored, tree)


def _cast_like(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return x if x.dtype == like.dtype else x.astype(like.dtype)


def _refuse_changed_arrays(
    trees: Mapping[str, Any], saved: Mapping[str, Any], folder: Path
) -> None:
    """Raise CheckpointDamaged if a restored array does not match its checksum."""
    for name, tree in trees.items():
        sums = {path: array["checksum"] for path, array in saved[name].items()}
        if changed := checksums.changed_arrays(tree, sums):
            raise CheckpointDamaged(
                folder,
                f"{name}{changed[0]} does not match its checksum ({len(changed)} arrays differ)",
            )


def refuse_other_shapes(
    saved: Mapping[str, Mapping[str, Any]], like: Mapping[str, Any], where: str
) -> None:
    """Refuse an intact checkpoint of another model or optimizer."""
    for name, tree in like.items():
        expected = tree_shapes(tree)
        got = {path: _saved_shape(array) for path, array in saved.get(name, {}).items()}
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


# ---- errors --------------------------------------------------------------------------------------


def _refuse_other_errors(error: Exception, folder: Path) -> OSError:
    """Return an error of the disk or the network; raise CheckpointDamaged for a damaged file.

    Lack of memory and of permission, and errors of the program, are raised unchanged. Orbax raises
    errors of the array store from errors of its own, which do not say what happened.
    """
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = "\n".join(map(str, causes))
    reason = _first_line(causes[-1]).replace(f"{folder}/", "")[:300]

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    unrelated = is_any(MemoryError, PermissionError, jax.errors.JaxRuntimeError)
    requests = any(type(cause).__module__.startswith(REQUEST_MODULES) for cause in causes)
    if unrelated or any(word in text for word in OTHER_ERRORS):
        raise error
    if is_any(FileNotFoundError) or any(word in text for word in MISSING_WORDS):
        return FileNotFoundError(reason)
    if is_any(OSError) or requests or any(word in text for word in STORAGE_ERRORS):
        return OSError(reason)
    # A damaged file causes errors of JSON, of the array store or of Orbax's own records.
    raise CheckpointDamaged(folder, reason) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextlib.contextmanager
def _explain_failed_save(folder: Path) -> Iterator[None]:
    """Turn the error of a failed save into one line."""
    try:
        yield
    except (RunRefused, buckets.BucketFailed):
        raise
    except Exception as error:
        if buckets.is_address(str(folder)):
            raise buckets.BucketUnreachable(
                f"{folder}: a checkpoint cannot be written ({_first_line(error)[:200]}); run the "
                "same command again when the bucket answers. What was saved before is intact"
            ) from error
        full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
        hint = "the disk is full: free some space" if full else "check the disk"
        raise OSError(
            f"a checkpoint cannot be written to {folder} ({_first_line(error)[:200]}); {hint}, "
            "then run the same command again. What was saved before is intact"
        ) from error
