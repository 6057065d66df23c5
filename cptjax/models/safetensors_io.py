"""Read and write folders of safetensors in blocks, with one tensor in memory at a time."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from cptjax.common.files import local_folder, parse_json, sync_files, sync_folder

SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
INDEX_FILE = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file that has not been read yet."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def rows(self, some: slice, block_bytes: int = 4 << 20) -> Iterator[np.ndarray]:
        """Yield rows [n, row size] in blocks; a block is valid until the next one is read.

        Blocks are read into one small buffer, so that no file stays mapped and a block is still in
        the processor's cache when it is transposed.
        """
        dtype = np.dtype(jnp.dtype(SAFETENSORS_DTYPES[self.dtype]))
        width = math.prod(self.shape[1:])
        buffer = np.empty((max(1, block_bytes // (width * dtype.itemsize)), width), dtype)
        with open(self.file, "rb", buffering=0) as f:
            f.seek(self.offset + some.start * width * dtype.itemsize)
            for at in range(some.start, some.stop, len(buffer)):
                block = buffer[: some.stop - at]
                if f.readinto(block.view(np.uint8).data) != block.nbytes:
                    raise ValueError(
                        f"{self.file} ended inside {self.name}: it changed while it was read; "
                        "run the command again"
                    )
                yield block


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write; `make` is called just before, so that only one exists at a time."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def _find_shards(folder: Path) -> list[Path]:
    """Return the files of a checkpoint: those of its index, or all safetensors files."""
    index = folder / INDEX_FILE
    if not index.is_file():
        shards = sorted(folder.glob("*.safetensors"))
        if not shards and any(folder.glob("*.bin")):
            raise ValueError(
                f"{folder} holds only pickled weights (*.bin), which are never opened; save it as "
                "safetensors"
            )
        if not shards:
            raise ValueError(
                f"{folder} holds no *.safetensors file; expected a Hugging Face checkpoint folder"
            )
        if special := [shard for shard in shards if not shard.is_file()]:
            raise ValueError(f"{special[0]}: expected a file; copy it from the checkpoint")
        return shards
    try:
        names = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"{index} is not a safetensors index ({e}); download it again") from e
    absent = [
        n
        for n in names
        if not isinstance(n, str) or Path(n).name != n or not (folder / n).is_file()
    ]
    if absent:
        raise ValueError(
            f"{index.name} names {absent[0]}, which is not in {folder}; download the missing shard"
        )
    return [folder / n for n in names]


def _read_header(file: Path) -> list[StoredTensor]:
    """Return the tensors of a file."""
    try:
        with safe_open(file, "np"):  # checks that the tensors cover the file exactly
            pass
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = parse_json(f.read(size))
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({e}); download it again"
        ) from e
    header.pop("__metadata__", None)
    bad = [(name, t["dtype"]) for name, t in header.items() if t["dtype"] not in SAFETENSORS_DTYPES]
    if bad:
        raise ValueError(
            f"{bad[0][0]} in {file} is stored as {bad[0][1]}; expected one of "
            f"{', '.join(SAFETENSORS_DTYPES)}"
        )
    data = 8 + size  # the data begin after the header and the 8 bytes of its size
    return [
        StoredTensor(file, name, tuple(t["shape"]), t["dtype"], data + t["data_offsets"][0])
        for name, t in header.items()
    ]


def find_tensors(folder: str | Path, rename: Callable[[str], str]) -> dict[str, StoredTensor]:
    """Return every tensor of a folder by its new name; raise if two have the same new name."""
    out: dict[str, StoredTensor] = {}
    for file in _find_shards(Path(folder)):
        for tensor in _read_header(file):
            name = rename(tensor.name)
            if name in out:
                raise ValueError(
                    f"{tensor.name} in {file.name} was already read as {out[name].name} from "
                    f"{out[name].file.name}; remove one of them"
                )
            out[name] = tensor
    return out


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an empty array with 64-byte alignment, which a CPU device can use without a copy."""
    n = math.prod(shape) * jnp.dtype(dtype).itemsize
    raw = np.empty(n + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n].view(jnp.dtype(dtype)).reshape(shape)


def contiguous_runs(box: tuple[slice, ...], shape: tuple[int, ...]) -> list[slice]:
    """Return the contiguous runs of the flattened array that make up a box of it."""
    sides = [range(*b.indices(n)) for b, n in zip(box, shape, strict=True)]
    whole = len(shape)
    while whole and len(sides[whole - 1]) == shape[whole - 1]:
        whole -= 1
    step = math.prod(shape[whole:])
    if not whole:
        return [slice(0, step)]
    run, length = sides[whole - 1], len(sides[whole - 1])
    starts = (
        np.ravel_multi_index((*outer, run.start), shape[:whole])
        for outer in itertools.product(*sides[: whole - 1])
    )
    return [slice(int(s) * step, (int(s) + length) * step) for s in starts]


def as_unsigned(x: np.ndarray) -> np.ndarray:
    """View an array as unsigned integers, which numpy copies several times faster than bfloat16."""
    return x.view(f"u{x.itemsize}")


def cast_block(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a block in another dtype; a block that has the dtype already is not copied."""
    if x.dtype == jnp.bfloat16 and dtype == np.float32:  # bfloat16 is the upper half of float32
        return np.left_shift(as_unsigned(x), 16, dtype=np.uint32).view(np.float32)
    return x.astype(dtype, copy=False)


def copy_in_strips(target: np.ndarray, source: np.ndarray) -> None:
    """Assign target[...] = source in strips that fit the cache.

    If one of the two is a transposed view, this is about three times as fast as numpy's assignment.
    """
    for i in range(0, len(source), 16):
        target[i : i + 16] = source[i : i + 16]


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `folder` when it is complete."""
    folder = local_folder(folder, "folder")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; remove it, or choose another destination")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in folder.parent.iterdir():  # what killed processes left
        if path.name.startswith(f".{folder.name}.") and path.name.endswith(".partial"):
            shutil.rmtree(path, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    temporary.mkdir()
    try:
        yield temporary
        sync_files(temporary)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _group_into_shards(
    tensors: Iterable[PlannedTensor], itemsize: int, shard_bytes: float
) -> list[list[PlannedTensor]]:
    groups: list[list[PlannedTensor]] = [[]]
    size = 0  # of the last group
    for t in tensors:
        n = int(np.prod(t.shape)) * itemsize
        if groups[-1] and size + n > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(t)
        size += n
    return groups


def _write_shard(file: Path | None, tensors: list[PlannedTensor], dtype: str) -> None:
    code = next(k for k, v in SAFETENSORS_DTYPES.items() if v == dtype)
    header = {"__metadata__": {"format": "pt"}}
    start = 0
    for t in tensors:
        end = start + int(np.prod(t.shape)) * jnp.dtype(dtype).itemsize
        header[t.name] = {"dtype": code, "shape": list(t.shape), "data_offsets": [start, end]}
        start = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the format aligns the data
    with open(file or os.devnull, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for t in tensors:
            data = t.make().astype(dtype, copy=False)
            if data.shape != t.shape:
                raise ValueError(f"{t.name} was made with shape {data.shape}; expected {t.shape}")
            f.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        f.flush()
        if file:
            os.fsync(f.fileno())


def write_safetensors(
    folder: Path | None, tensors: list[PlannedTensor], dtype: str, shard_bytes: float
) -> None:
    """Write shards and their index.

    A process without a folder only computes the tensors, to take part in gathering them.
    """
    if dtype not in SAFETENSORS_DTYPES.values():
        raise ValueError(
            f"dtype={dtype!r}: expected one of {', '.join(SAFETENSORS_DTYPES.values())}"
        )
    itemsize = jnp.dtype(dtype).itemsize
    groups = _group_into_shards(tensors, itemsize, shard_bytes)
    count = len(groups)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    for name, group in zip(names, groups, strict=True):
        _write_shard(folder and folder / name, group, dtype)
    if folder and count > 1:
        files = {t.name: name for name, group in zip(names, groups, strict=True) for t in group}
        total = sum(int(np.prod(t.shape)) * itemsize for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2))
