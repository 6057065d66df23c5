"""Read the rows of a public dataset from the hub or from a local copy of its files."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cptjax.common import console, files
from cptjax.common.shuffle import permutation
from cptjax.tasks.task import Examples, Task, did_you_mean, limit_rows
from cptjax.types import Example

SPLIT_NAME = re.compile(r"(^|[-_.])(train|validation|val|valid|dev|test|testdev|eval)([-_.]|$)")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")  # JSON files without rows
DATA_FILES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
    ".tsv": "csv",
}
# How `datasets` reads files with tabs: an empty text is not a missing value.
TAB_SEPARATED = {"delimiter": "\t", "keep_default_na": False}


@dataclasses.dataclass(frozen=True)
class HubSource:
    """One split of a hub dataset, and which of its rows are used."""

    dataset: str
    split: str
    config: str | None = None
    needs: str = ""  # keep only rows in which this column is not null
    # which rows to keep, before the two settings below: rows -> mask
    keep: Callable[["ArrowRows"], np.ndarray] | None = None
    # The part of the rows in a fixed random order, where the dataset lacks the split.
    part: tuple[float, float] = (0.0, 1.0)
    most: int | None = None  # largest number of rows taken from that order
    tabs: bool = False  # the files of the hub are texts with tabs
    file: str = ""  # the name of its data file without suffix, where it does not name the split


BuildExample = Callable[[dict[str, Any]], Example]


def make_hub_task(
    name: str, sources: dict[str, HubSource], build: BuildExample, scorer: str, **fields: Any
) -> Task:
    """Return a task whose splits are public datasets."""
    return Task(name, functools.partial(load_hub_split, name, sources, build), scorer, **fields)


def load_hub_split(
    name: str,
    sources: dict[str, HubSource],
    build: BuildExample,
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
):
    """Load a split's examples; images stay encoded until an example is accessed."""
    source = pick_source(name, sources, split)
    rows = load_rows(source, root)
    return Examples(name, split, rows, build, limit_rows(usable_rows(rows, source), limit, seed))


def pick_source(name: str, sources: dict[str, HubSource], split: str) -> HubSource:
    """Return the source of a split, or raise a ValueError that names the splits."""
    if split not in sources:
        raise ValueError(
            f"task {name}: no split {split!r}; it has "
            f"{', '.join(sources)}{did_you_mean(split, sources)}"
        )
    return sources[split]


class ArrowRows(Sequence[dict[str, Any]]):
    """The rows of a datasets.Dataset as plain Python values.

    Images stay encoded, as {"bytes", "path"}, whatever their feature type.
    """

    def __init__(self, dataset: Any):
        self.table = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table[int(index)].to_pylist()[0]

    def column(self, name: str):
        """Return one column as an Arrow array, without reading the others."""
        return self.table.select_columns([name])[:].column(name)

    @property
    def names(self) -> list[str]:
        return self.table.column_names


def load_rows(source: HubSource, root: str = "") -> ArrowRows:
    """Load the rows of a split from the copy under `root`, or from the hub if there is none."""
    import datasets  # slow to import, and synthetic tasks never need it

    name = " ".join(filter(None, (source.dataset, source.config, source.split)))
    if folder := find_local_copy(source.dataset, root):
        dataset, _sources_read[name] = _from_folder(folder, source)
        return ArrowRows(dataset)
    try:
        options = TAB_SEPARATED if source.tabs else {}
        dataset = datasets.load_dataset(
            source.dataset, source.config, split=source.split, **options
        )
        _sources_read[name] = _hub_revision(dataset)
        return ArrowRows(dataset)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if files.is_outage(error):
            raise files.TryAgain(
                f"{source.dataset}: the hub does not answer ({reason}); run the same command "
                "again, or put a copy under data.root"
            ) from error
        raise ValueError(
            f"{source.dataset} cannot be loaded from the hub ({reason}); put a copy under data.root"
        ) from error


def media_folders(root: str = "") -> tuple[Path, ...]:
    """Return the folders that hold the images and videos of public datasets."""
    import datasets
    import huggingface_hub

    c, hub_cache = datasets.config, huggingface_hub.constants.HF_HUB_CACHE
    caches = (c.HF_DATASETS_CACHE, c.DOWNLOADED_DATASETS_PATH, hub_cache)
    return (*map(Path, caches), *([Path(root)] if root else []))


_sources_read: dict[str, str | list[str]] = {}


def record_source(name: str, files: list[str]) -> None:
    """Record the files of a dataset that is read without `load_rows`."""
    _sources_read[name] = files


def sources_read() -> Mapping[str, str | list[str]]:
    """Return the datasets that this process has read, by name, config and split.

    A value is the revision on the hub, or the files of a local copy.
    """
    return _sources_read


def _hub_revision(dataset: Any) -> str:
    """Return the revision of a dataset: the name of the folder that caches its rows."""
    files = [Path(file["filename"]) for file in dataset.cache_files]
    return f"revision {files[0].parent.name}" if files else "unknown revision"


@functools.cache
def find_local_copy(dataset: str, root: str) -> Path | None:
    """Return the folder under `root` that holds a dataset: <org>__<name>, <org>/<name> or <name>.

    Return None if there is none, after printing once that the hub is used.
    """
    candidates = local_folders(dataset, root)
    for folder in candidates:
        if folder.is_dir():
            return folder
    if candidates:
        console.print_message(
            f"{dataset}: no copy under data.root (looked for {', '.join(map(str, candidates))}); "
            "using the hub"
        )
    return None


def local_folders(dataset: str, root: str) -> list[Path]:
    """Return where a copy of a dataset may be under `root`; nowhere if `root` is empty."""
    if not root:
        return []
    if not Path(root).is_dir():
        raise ValueError(
            f"data.root={root!r}: no such folder; give the folder of the datasets, or leave "
            "data.root empty to use the hub"
        )
    org, _, name = dataset.rpartition("/")
    return [Path(root, f"{org}__{name}"), Path(root, org, name), Path(root, name)]


def usable_rows(rows: ArrowRows, source: HubSource) -> np.ndarray:
    """Return the indices of the rows that a source uses."""
    order = np.arange(len(rows))
    if source.needs:
        order = order[np.asarray(rows.column(source.needs).is_valid())]
    if source.keep:
        order = order[source.keep(rows)[order]]
    if source.part != (0.0, 1.0) or source.most is not None:
        order = order[permutation(len(order), (0,))]
        start, stop = (round(share * len(order)) for share in source.part)
        order = np.sort(order[start:stop][: source.most])
    return order


def _from_folder(folder: Path, source: HubSource) -> tuple[Any, list[str]]:
    """Read one split from a folder; return it and its files.

    The folder is the output of save_to_disk, a clone of the repository, or plain data files.
    """
    import datasets

    inner = folder / source.config if source.config else folder
    for place in (inner / source.split, inner, folder):
        if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(place))
            if isinstance(loaded, datasets.DatasetDict):
                if source.split not in loaded:
                    raise ValueError(
                        f"{place}: no split {source.split!r} of {source.dataset}; "
                        f"it has {', '.join(loaded)}"
                    )
                loaded = loaded[source.split]
            return loaded, [file["filename"] for file in loaded.cache_files]
    files = find_split_files(folder, source)
    kind = DATA_FILES[Path(files[0]).suffix]
    options = TAB_SEPARATED if kind == "csv" else {}
    dataset = datasets.load_dataset(
        kind, data_files={source.split: files}, split=source.split, **options
    )
    return dataset, files


def find_split_files(folder: Path, source: HubSource) -> list[str]:
    """Return the data files of a split: those named after it, or in a folder of that name.

    A single file that is named after no split is the training split. A dataset with several configs
    has a folder for each; the default config, or a copy of one config alone, is at the top.
    """
    inner = folder / source.config if source.config else folder
    top = [
        path
        for place in (folder, folder / "data", folder / "default", folder / source.split)
        for path in place.glob("*")
    ]
    deep = list(inner.rglob("*")) if inner.is_dir() else []
    for candidates in (deep, top) if source.config else (top, deep):
        files = sorted(
            path
            for path in candidates
            if path.suffix in DATA_FILES and path.name not in DESCRIPTIONS
        )
        matching = [
            path
            for path in files
            if re.match(rf"{source.split}([-_.]|$)", path.stem)
            or path.parent.name == source.split
            or path.stem == source.file
        ]
        if (
            not matching
            and source.split == "train"
            and len(files) == 1
            and not SPLIT_NAME.search(files[0].stem)
        ):
            matching = files
        if matching:
            return [
                str(path)
                for path in matching
                if path.suffix == matching[0].suffix and path.parent == matching[0].parent
            ]
    present = sorted({path.name for path in (*top, *deep) if path.suffix in DATA_FILES})[:5]
    raise ValueError(
        f"{inner}: no data files of split {source.split!r} of {source.dataset}; "
        f"expected {source.split}-*.parquet (or .arrow, .jsonl, .json) or a folder "
        f"{source.split}/, found {', '.join(present) or 'nothing'}"
    )
