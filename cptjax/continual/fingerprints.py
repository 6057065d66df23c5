"""Fingerprints of what decides a run's results: settings, code, packages, input files, rows.

Equal fingerprints mean equal inputs. A run compares those of its files and rows with the ones of
its start; the processes of a run compare all of them with each other.

Images that a row refers to are not read: a changed image is not noticed.
"""

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cptjax.config import config_to_dict, resolve_stages
from cptjax.data.datasets import Datasets
from cptjax.models.hf_config import locate_checkpoint
from cptjax.tasks import hub
from cptjax.tasks.task import example_text
from cptjax.tasks.user_data.readers import DATA_SUFFIXES

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
SOURCE_SUFFIXES = (".py", ".jinja", ".b64")
WHOLE_FILE_BYTES = 256 << 20  # a longer file is hashed in SAMPLES pieces
SAMPLES, SAMPLE_BYTES = 256, 1 << 16
SAMPLED_ROWS = 256  # of a split


def process_fingerprints(config: ConfigDict, hashes: Mapping[str, str]) -> dict[str, str]:
    """Return what all processes of a run must share, before anything is loaded.

    `hashes` are those of `file_hashes`. The keys name the setting, package or file; the values of
    settings are readable. The source of this package is compared file by file, which is stricter
    than its git commit: a file that is changed and not committed counts, and a host may have a copy
    without git. versions.json records the commit.
    """
    packages = {f"version of {name}": v or "none" for name, v in package_versions().items()}
    sources = {f"cptjax/{name}": value for name, value in source_hashes().items()}
    return dict(_flatten_settings(config)) | sources | packages | dict(hashes)


def _flatten_settings(config: ConfigDict) -> Iterator[tuple[str, str]]:
    def walk(value: Any, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for key in sorted(value):
                yield from walk(value[key], f"{name}.{key}")
        else:
            yield name, repr(value)

    return walk(config_to_dict(config), "config")


@functools.cache
def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that results depend on."""
    versions: dict[str, str | None] = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


@functools.cache
def source_hashes() -> dict[str, str]:
    """Return a hash of each source file of this package, by its path in the package."""
    package = Path(__file__).parents[1]
    sources = sorted(p for p in package.rglob("*") if p.suffix in SOURCE_SUFFIXES)
    return {str(p.relative_to(package)): _short_hash([p]) for p in sources}


def code_hash() -> str:
    """Return a hash of the source of this package, committed or not."""
    return _short_hash(f"{name} {value}" for name, value in source_hashes().items())


# ---- files ---------------------------------------------------------------------------------------


def file_hashes(config: ConfigDict) -> dict[str, str]:
    """Return the hashes of the files and folders that the settings of a run name.

    Each key is "setting: path". A path that does not exist is left out: the code that reads it
    says so.
    """
    hashes = {}
    for name, value in _settings_with_files(config):
        for path in _named_paths(value):
            hashes[f"{name}: {path}"] = hash_path(path)
    return hashes | _model_hash(config)


def _settings_with_files(config: ConfigDict) -> Iterator[tuple[str, Any]]:
    """Yield the settings that may name a file: those of the tasks, templates, corpora."""
    for task, settings in config.tasks.to_dict().items():
        for key, value in settings.items():
            yield f"tasks.{task}.{key}", value
    yield "eval.templates", config.eval.templates
    for stage in resolve_stages(config):
        c, where = stage.config, f"stage {stage.number}: "
        yield f"{where}data.template", c.data.template
        yield f"{where}method.corpus", c.method.corpus
        yield f"{where}method.plugin", c.method.plugin
        yield f"{where}method.kl_reference", c.method.kl_reference
        yield f"{where}method.distill.teacher", c.method.distill.teacher
        like = (c.method.filter or {}).get("like")
        yield f"{where}method.filter.like", like and str(Path(like) / "filters")


def _named_paths(value: Any) -> list[Path]:
    """Return the existing files and folders that a setting names, as "file.py:function" too."""
    if isinstance(value, (tuple, list)):
        return [path for part in value for path in _named_paths(part)]
    if not isinstance(value, str) or not value:
        return []
    path = Path(value.rpartition(":")[0] if ".py:" in value else value).expanduser()
    is_path = path.is_absolute() or len(path.parts) > 1 or path.suffix
    try:
        return [path] if is_path and path.exists() else []
    except OSError:  # a prompt is too long for a file name
        return []


def _model_hash(config: ConfigDict) -> dict[str, str]:
    """Return the hash of the model folder, or the revision of a hub id.

    The model of a pre-stage lies in the workdir, which may be moved, so its key has no path.
    """
    path = config.model.path
    if not path:
        return {}
    folder = locate_checkpoint(path)
    if folder.parent.name == "snapshots":
        return {f"model.path: {path}": f"revision {folder.name}"}
    name = "model of the pre-stage" if len(config.prestage) else f"model.path: {path}"
    return {name: hash_path(folder)}


def hash_path(path: Path) -> str:
    """Return a hash of a file, or of the data files and weights in a folder.

    Of a folder with neither, such as one of images, the names and sizes are hashed.
    """
    if path.is_file():
        return _short_hash([path])
    files = sorted(p for p in path.iterdir() if p.is_file())
    suffixes = (*DATA_SUFFIXES, ".arrow", ".safetensors", ".jinja")
    if any(p.suffix in suffixes for p in files):
        return _short_hash(part for p in files for part in (p.name, p))
    every = sorted(p for p in path.rglob("*") if p.is_file())
    return _short_hash(f"{p.relative_to(path)} {p.stat().st_size}" for p in every)


def _short_hash(parts: Iterable[str | Path]) -> str:
    """Return a hash of texts and of the contents of files."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            total.update(f"{len(part)} {part}\n".encode())
            continue
        size = part.stat().st_size
        total.update(f"{size} bytes\n".encode())
        with part.open("rb") as file:
            for start in _starts(size):
                file.seek(start)
                total.update(file.read(SAMPLE_BYTES))
    return total.hexdigest()[:16]


def _starts(size: int) -> Sequence[int]:
    """Return the positions of the pieces of a file that are hashed."""
    if size <= WHOLE_FILE_BYTES:
        return range(0, size, SAMPLE_BYTES)
    return [i * (size - SAMPLE_BYTES) // (SAMPLES - 1) for i in range(SAMPLES)]


# ---- rows ----------------------------------------------------------------------------------------


def row_hashes(datasets: Datasets) -> dict[str, str]:
    """Return a hash of the rows of every split that is loaded: number, ids, texts and answers.

    Of public datasets that were read, also the revision on the hub, or a hash of the local files.
    """
    hashes = {}
    for name, source in hub.sources_read().items():
        known = isinstance(source, str)
        hashes[f"dataset {name}"] = source if known else _short_hash(map(Path, source))
    for spec, rows in datasets.loaded_splits():
        number = len(rows.examples)
        sampled = [rows.examples[i] for i in range(0, number, max(1, number // SAMPLED_ROWS))]
        texts = (repr((e.id, example_text(e), e.answer, e.target)) for e in sampled)
        hashes[f"rows of {spec.task} {spec.split}"] = f"{number} rows, {_short_hash(texts)}"
    return hashes
