"""Workdirs in buckets: a local copy of their small files that follows the bucket, and locks.

An object in a bucket cannot grow, so a run writes its files into a folder on the local disk, as it
does without a bucket. A `FolderCopy` brings the files from the bucket at the start, since only what
is in the bucket counts, and puts changed files there again: before a checkpoint refers to them, at
the end of each stage, and every PUSH_SECONDS. An object is replaced as a whole, so that readers see
the old file or the new one. Checkpoints are not copied: Orbax writes them into the bucket.

The local folders lie in `cptjax/buckets` of the user's cache folder: `write/BUCKET/PATH` for the
process that writes a run, `compare/BUCKET/PATH` for the pages that compare runs, and
`read/BUCKET/PATH` for tools that only read.
"""

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cptjax.common import console, files

SCHEME = "gs://"
ADDRESS = re.compile(r"gs:/+(?P<bucket>[^/]+)/*(?P<path>.*?)/*")
RETRY_SECONDS = 180.0  # for which a request is tried again
BEAT_SECONDS = 20.0  # between two renewals of a lock
# After which a lock that is not renewed is free. A process that lost its lock ends when it pushes.
LOCK_SECONDS = 300.0
PUSH_SECONDS = 60.0
PUSH_SHARE = 0.05  # of the time, at most, in which large files are put into the bucket
READ, WRITE, COMPARE = "read", "write", "compare"
CHECKPOINTS, MODEL = "checkpoints", "hf"
DESCRIBES_OTHERS = ("hf/config.json", "progress.json")  # a model is made if it has its config
OTHER_RUNS = ("fresh", "base")  # folders in a run's folder that are runs with locks of their own
# Locks, and files that are not complete yet.
LOCAL_NAME = re.compile(r"\.(\w+\.)?lock|\..+\.\d+(\.partial)?|\.put-.*")
PROCESS_LOG = re.compile(r"run\.(\d+)\.log")
_copies: dict[Path, "FolderCopy"] = {}  # those that this process writes
_local = threading.local()


# ---- addresses and local folders -----------------------------------------------------------------


def is_address(folder: str | Path) -> bool:
    """Return whether a folder is the address of one in a bucket."""
    return bool(ADDRESS.fullmatch(str(folder)))


def copies_folder() -> Path:
    return files.cache_folder() / "buckets"


def local_path(address: str | Path, use: str) -> Path:
    """Return the local folder for an address; `use` is READ or that of a writing process.

    Another folder is returned as it is.
    """
    found = ADDRESS.fullmatch(str(address))
    if not found:
        return Path(address)
    _storage()  # says what is not installed
    console.show_addresses(f"{copies_folder() / use}/", SCHEME)
    path = copies_folder() / use / found["bucket"] / found["path"]
    if ".." in path.parts or not found["path"]:
        raise ValueError(f"{address}: expected gs://BUCKET/FOLDER")
    return path


def write_path(folder: str | Path, process: int) -> Path:
    """Return the folder in which a process writes a run: a folder on a disk, or a local copy."""
    if is_address(folder):
        return local_path(folder, f"{WRITE}.{process}" if process else WRITE)
    return files.orbax_folder(folder)


def address_of(path: str | Path) -> str:
    """Return the address that a local path stands for; "" = it is only a local path."""
    root, path = copies_folder(), Path(os.path.normpath(Path(path).absolute()))
    if not path.is_relative_to(root):
        return ""
    _, *parts = path.relative_to(root).parts
    return SCHEME + "/".join(parts)


def shown(path: str | Path) -> str:
    """Return a path as the user knows it: the address if it is in a bucket."""
    return address_of(path) or str(path)


def fetch(folder: str | Path, models: bool = False) -> Path:
    """Return a folder to read: a folder on a disk itself, a local copy of one in a bucket.

    It has no checkpoints, and only with `models` the weights in `hf/` folders.
    """
    path = local_path(folder, READ)
    if is_address(folder):
        pruned = (CHECKPOINTS,) if models else (CHECKPOINTS, MODEL)
        FolderCopy(path, pruned=pruned).pull()
    return path


def fetch_model(path: str) -> None:
    """Bring a pre-stage's model from the bucket if the path is a local copy for reading."""
    folder = Path(os.path.normpath(path))
    if folder.is_relative_to(copies_folder() / READ):
        fetch(address_of(folder), models=True)


def publish(path: Path) -> None:
    """Put one file that was written into a local copy into the bucket."""
    if address := address_of(path):
        _put(path, address)


# ---- requests ------------------------------------------------------------------------------------


@functools.cache
def _storage() -> Any:
    try:
        import gcsfs  # noqa: F401  Orbax uses it
        from google.cloud import storage
    except ImportError as error:
        raise ValueError(
            f"a folder in a bucket needs the package {error.name}; pip install 'cptjax[gcs]'"
        ) from None
    import logging

    import fsspec

    # Objects also change without it. Its warnings are about credentials that are not needed.
    fsspec.config.conf["gs"] = {"use_listings_cache": False}
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return storage


def _client() -> Any:
    """Return the client of this thread."""
    if getattr(_local, "process", None) != os.getpid():
        project = os.environ.get("GOOGLE_CLOUD_PROJECT", "cptjax")  # of no account for objects
        _local.client, _local.process = _storage().Client(project), os.getpid()
    return _local.client


def _blob(address: str) -> Any:
    found = ADDRESS.fullmatch(address)
    assert found, address
    return _client().bucket(found["bucket"]).blob(found["path"])


def _retry() -> Any:
    return _storage().retry.DEFAULT_RETRY.with_timeout(RETRY_SECONDS)


class BucketFailed(OSError):
    """A bucket that cannot be used."""


class BucketUnreachable(BucketFailed, files.TryAgain):
    """A bucket that does not answer now; the same command may work later."""


@contextlib.contextmanager
def explain_bucket_errors(address: str) -> Iterator[None]:
    """Turn errors of the storage service into one line with the address."""
    _storage()
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (exceptions.PreconditionFailed, BucketFailed):
        raise
    except (exceptions.Forbidden, exceptions.Unauthorized, GoogleAuthError) as error:
        raise BucketFailed(
            f"{address}: no access ({_first_words(error)}); log in with `gcloud auth "
            "application-default login`, and check the permissions of the bucket"
        ) from error
    except exceptions.NotFound as error:
        raise BucketFailed(f"{address}: not found ({_first_words(error)})") from error
    except Exception as error:
        known = (exceptions.GoogleAPIError, requests.RequestException)
        outside = type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp")
        if not (isinstance(error, known) or outside):
            raise
        raise BucketUnreachable(
            f"{address} cannot be reached ({_first_words(error)}); what was saved there is intact: "
            "run the same command again when it answers"
        ) from error


def _first_words(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def list_objects(address: str, pruned: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the objects under an address by their names in it, except in folders named so.

    Without such folders, all are listed by few requests.
    """
    found: dict[str, Any] = {}
    with explain_bucket_errors(address):
        root = _blob(address)
        prefix = f"{root.name}/"
        waiting = [prefix]
        while waiting:
            part = waiting.pop()
            page = _client().list_blobs(
                root.bucket, prefix=part, delimiter="/" if pruned else None, retry=_retry()
            )
            found |= {b.name.removeprefix(prefix): b for b in page if not b.name.endswith("/")}
            waiting += [p for p in page.prefixes if p.split("/")[-2] not in pruned]
    return found


def stored_bytes(folder: Path | str) -> int:
    """Return the size of all files in a folder, or in the bucket's folder that it is a copy of."""
    if address := address_of(folder):
        return sum(blob.size or 0 for blob in list_objects(address).values())
    return files.folder_bytes(folder)


def remove_objects(address: str, last: str = "") -> None:
    """Delete all objects under an address.

    With the name of the file that is written last, folders that have it are kept.
    """
    objects = list_objects(address)
    complete = {name.split("/")[0] for name in objects if name.split("/")[1:] == [last]}
    with explain_bucket_errors(address):
        for name, blob in objects.items():
            if name.split("/")[0] not in complete:
                blob.delete(retry=_retry())


def move_objects(source: str, target: str) -> None:
    """Move all objects under an address; those under the target are removed first."""
    remove_objects(target)
    blobs = list_objects(source)
    with explain_bucket_errors(source):
        for name, blob in blobs.items():
            new = _blob(f"{target}/{name}")
            blob.bucket.copy_blob(blob, new.bucket, new.name, retry=_retry())
        for blob in blobs.values():
            blob.delete(retry=_retry())


def _put(path: Path, address: str) -> None:
    """Replace an object by a file, which other threads may make longer meanwhile."""
    with explain_bucket_errors(address):
        blob = _blob(address)
        if path.suffix == ".safetensors":  # renamed into place, and large
            blob.upload_from_filename(str(path), retry=_retry())
            return
        part = path.with_name(f".put-{path.name}.{threading.get_ident()}")
        try:
            shutil.copyfile(path, part)
            blob.upload_from_filename(str(part), retry=_retry())
        finally:
            part.unlink(missing_ok=True)


def get_file(address: str, path: Path) -> None:
    """Replace a file by an object."""
    with explain_bucket_errors(address):
        blob = _blob(address)
        blob.reload(retry=_retry())
        _get(blob, path)


def _get(blob: Any, path: Path) -> None:
    """Replace a file by an object, unless it has the same content."""
    if path.is_file() and blob.md5_hash and path.stat().st_size == blob.size:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").digest()
        if base64.b64encode(digest).decode() == blob.md5_hash:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".put-{path.name}.{os.getpid()}")
    try:
        blob.download_to_filename(str(part), retry=_retry())
        os.utime(part, (blob.updated.timestamp(),) * 2)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---- the copy of a folder ------------------------------------------------------------------------


class FolderCopy:
    """A local copy of the small files of a folder in a bucket.

    `wants(name)` chooses files by their names in the folder; folders named in `pruned` are left
    out. Only one thread may `pull`; any may `push`.
    """

    def __init__(
        self,
        folder: Path,
        wants: Callable[[str], bool] = bool,
        pruned: tuple[str, ...] = (CHECKPOINTS,),
    ):
        self.folder, self.address, self.pruned = folder, address_of(folder), pruned
        self._chosen = wants
        self.lock: BucketLock | None = None  # held while this process pushes
        self._known: dict[str, tuple[int, int]] = {}  # state of the files that the bucket has
        self._pushing = threading.Lock()

    def wants(self, name: str) -> bool:
        """Return whether a file, or one in the bucket, belongs to the copy."""
        *folders, last = name.split("/")
        if LOCAL_NAME.fullmatch(last) or any(
            part in self.pruned or LOCAL_NAME.fullmatch(part) for part in folders
        ):
            return False
        return self._chosen(name)

    def _files(self) -> dict[str, Path]:
        paths = self.folder.rglob("*") if self.folder.is_dir() else ()
        found = {str(p.relative_to(self.folder)): p for p in paths if p.is_file()}
        return {name: path for name, path in found.items() if self.wants(name)}

    def pull(self) -> None:
        """Make the local files equal to those in the bucket."""
        objects = {
            n: b for n, b in list_objects(self.address, self.pruned).items() if self.wants(n)
        }
        for name, path in self._files().items():
            if name not in objects:
                path.unlink(missing_ok=True)
        with explain_bucket_errors(self.address):
            for name, blob in objects.items():
                _get(blob, self.folder / name)
        self._known = {name: _file_state(self.folder / name) for name in objects}

    def push(self) -> None:
        """Put changed files into the bucket, then remove there what was removed here.

        The files that say that others are complete are the last.
        """
        with self._pushing:
            found = self._files()
            for name in sorted(found, key=lambda name: (name.endswith(DESCRIBES_OTHERS), name)):
                if self.lock:  # putting a large file takes minutes
                    self.lock.renew(after=BEAT_SECONDS)
                try:
                    state = _file_state(found[name])
                    if self._known.get(name) != state:
                        _put(found[name], f"{self.address}/{name}")
                        self._known[name] = state
                except FileNotFoundError:  # removed since it was listed
                    continue
            for name in [name for name in self._known if not (self.folder / name).exists()]:
                with explain_bucket_errors(self.address):
                    _remove(f"{self.address}/{name}")
                del self._known[name]


def _file_state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _remove(address: str, **conditions: Any) -> None:
    from google.api_core import exceptions

    with contextlib.suppress(exceptions.NotFound):
        _blob(address).delete(retry=_retry(), **conditions)


def push(folder: Path) -> None:
    """Put the changed files of a run's folder into its bucket, if it is in one."""
    if copy := _copies.get(folder):
        copy.push()


def belongs_to_run(process: int) -> Callable[[str], bool]:
    """Return which files of a run's folder a process writes: the first all, the others a log."""

    def wants(name: str) -> bool:
        log = PROCESS_LOG.fullmatch(name)
        if process or log:
            return bool(log) and int(log[1]) == process
        return name.split("/")[0] not in OTHER_RUNS

    return wants


def push_all() -> None:
    """Put the changed files of all folders that this process writes into their buckets."""
    for copy in list(_copies.values()):
        copy.push()


def comparison_copy(folder: Path) -> FolderCopy:
    """Return a copy of a folder of runs for the pages that compare them.

    It lies apart from the folders that processes write: on this host, several processes may write
    runs of one folder at the same time, and their files are newer than those in the bucket.
    """
    wants = lambda name: not name.endswith(".log")
    return FolderCopy(local_path(address_of(folder), COMPARE), wants, (CHECKPOINTS, MODEL))


def pull_run(folder: Path) -> None:
    """Bring all small files of a run, on a process that does not write them."""
    FolderCopy(folder, lambda name: name.split("/")[0] not in OTHER_RUNS).pull()


@contextlib.contextmanager
def keep_pushing(copy: FolderCopy, lock: "BucketLock | None") -> Iterator[None]:
    """Let `push` find the copy, and push it in the background and at the end of this block."""
    copy.lock = lock
    _copies[copy.folder], stop = copy, threading.Event()
    thread = threading.Thread(target=_push_often, args=(copy, stop), daemon=True)
    thread.start()
    try:
        yield
    except BucketFailed:
        raise
    except BaseException:  # a signal, too
        stop.set()
        with contextlib.suppress(BucketFailed):
            copy.push()
        raise
    else:
        stop.set()
        copy.push()
    finally:
        stop.set()
        del _copies[copy.folder]
        thread.join()


def _push_often(copy: FolderCopy, stop: threading.Event) -> None:
    pushed, took = time.monotonic(), 0.0
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # the main thread has the same error, or it has passed
            if copy.lock:
                copy.lock.renew()
            began = time.monotonic()
            if began - pushed >= max(PUSH_SECONDS, took / PUSH_SHARE):
                copy.push()
                pushed = time.monotonic()
                took = pushed - began


# ---- one writer ----------------------------------------------------------------------------------


class BucketLock:
    """An object that names the process that writes a folder; that process renews it.

    `file` is the locked file in the local copy of the folder. A process that had locked the same
    file has ended, so its lock is taken over at once; that of another host after LOCK_SECONDS.
    """

    def __init__(self, file: Path, owner: str):
        self.address, self.owner = address_of(file), owner
        stat, boot = file.stat(), Path("/proc/sys/kernel/random/boot_id")
        kernel = boot.read_text().strip() if boot.exists() else socket.gethostname()
        self.place = f"{kernel} {stat.st_dev} {stat.st_ino}"
        self.generation, self.renewed = 0, 0.0
        self.abandoned = False  # the process that has it does not renew it any more
        self._renewing = threading.Lock()

    def take(self) -> str:
        """Take the lock and return "", or say who holds it."""
        with explain_bucket_errors(self.address):
            while not self._write(0):
                if (held := _read_lock(self.address)) is None:
                    continue
                text, generation, age = held
                self.abandoned = age > 3 * BEAT_SECONDS
                if text.get("owner") == self.owner:  # the answer to an earlier try was lost
                    self.generation = generation
                    break
                if text.get("place") != self.place and age <= LOCK_SECONDS:
                    return (
                        f"{text.get('owner', 'another process').partition(',')[0]}, which renewed "
                        f"its lock {age:.0f} s ago; if it has ended, start again in "
                        f"{LOCK_SECONDS - age:.0f} s, or remove {self.address}"
                    )
                if self._write(generation):
                    break
        return ""

    def _write(self, generation: int) -> bool:
        """Write the object if it still has a generation (0 = there is none)."""
        from google.api_core.exceptions import PreconditionFailed

        blob, text = _blob(self.address), {"owner": self.owner, "place": self.place}
        try:
            blob.upload_from_string(
                json.dumps(text),
                content_type="application/json",
                if_generation_match=generation,
                retry=_retry(),
            )
        except PreconditionFailed:
            return False
        self.generation, self.renewed = blob.generation, time.monotonic()
        return True

    def renew(self, after: float = 0.0) -> None:
        """Write the lock again if that is so many seconds ago; refuse if another process has it."""
        with self._renewing, explain_bucket_errors(self.address):
            if time.monotonic() - self.renewed < after or self._write(self.generation):
                return
            text, generation, _ = _read_lock(self.address) or ({}, 0, 0.0)
            if text.get("owner") != self.owner:
                raise BucketFailed(
                    f"{self.address} was removed or taken over by {text.get('owner', 'nobody')}: "
                    "this run ends, since only one process may write there"
                )
            self.generation = generation

    def release(self) -> None:
        """Remove the lock, if this process has it and the bucket answers."""
        from google.api_core.exceptions import PreconditionFailed

        with (
            contextlib.suppress(PreconditionFailed, BucketFailed),
            explain_bucket_errors(self.address),
        ):
            _remove(self.address, if_generation_match=self.generation)


def _read_lock(address: str) -> tuple[dict[str, Any], int, float] | None:
    """Return text, generation and age in seconds of a lock; None = there is none."""
    from google.api_core.exceptions import NotFound

    blob = _blob(address)
    try:
        text = blob.download_as_bytes(retry=_retry())
        blob.reload(retry=_retry())
    except NotFound:
        return None
    try:
        values = json.loads(text)
    except ValueError:
        values = {}
    age = max(time.time() - blob.updated.timestamp(), 0.0)
    return (values if isinstance(values, dict) else {}), blob.generation, age


def lock_owner(address: str) -> str:
    """Return the owner of a lock; "" = it is not locked."""
    with explain_bucket_errors(address):
        text, _, _ = _read_lock(address) or ({}, 0, 0.0)
    return text.get("owner", "")
