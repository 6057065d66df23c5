"""A folder imports only from folders on an earlier line of ORDER; no files import in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (  # names on one line may not import each other
    "types",
    "config sharding",
    "common",
    "models tasks",
    "data",
    "generation",
    "evaluation training",
    "continual",
    "analysis planning benchmark api",
)
RANK = {name: i for i, names in enumerate(ORDER) for name in names.split()}
FILES = sorted((ROOT / "cptjax").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p) for p in FILES}


def _imports(path: Path, everywhere: bool = True) -> set[str]:
    """All modules a file imports, or those at its top level.

    `from package import module` gives the module.
    """
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, (
                f"{path.name}:{node.lineno} imports relatively; write the whole name"
            )
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in full}
    return found


def folder_name(module: str) -> str:
    """The part of a module's name below `cptjax`: a folder, or a file at the top level."""
    return (module.split(".") + [""])[1]


def package_imports(path: Path, everywhere: bool = True) -> set[str]:
    return {m for m in _imports(path, everywhere) if m.split(".")[0] == "cptjax"}


@pytest.mark.parametrize("path", FILES, ids=[module_name(p) for p in FILES])
def test_a_file_imports_only_from_earlier_folders(path):
    folder = folder_name(module_name(path))
    if not folder:
        return  # cptjax/__init__.py offers the whole library
    assert folder in RANK, (
        f"{path.name}: add {folder!r} to a line of ORDER in tests/test_imports.py"
    )
    for module in package_imports(path):
        other = folder_name(module)
        assert other, f"{path.name} imports the package cptjax itself; import the module"
        assert other == folder or RANK[other] < RANK[folder], (
            f"{path.name} imports {module}, against ORDER"
        )


def test_no_circles():
    graph = {module_name(p): package_imports(p, everywhere=False) - {module_name(p)} for p in FILES}
    while ready := [m for m, uses in graph.items() if not uses & graph.keys()]:
        for module in ready:
            del graph[module]
    assert not graph, f"these import each other: {sorted(graph)}"


JAX_FREE = (
    "tasks",
    "common.files",
    "common.images",
    "common.run_log",
    "common.shuffle",
    "data.mixture",
    "evaluation.matrix",
    "evaluation.report",
    "evaluation.summary",
)
TEXT_FILES = [
    p for p in FILES if (module_name(p) + ".").startswith(tuple(f"cptjax.{m}." for m in JAX_FREE))
]


@pytest.mark.parametrize("path", TEXT_FILES, ids=module_name)
def test_text_code_never_imports_jax(path):
    banned = {"jax", "jaxlib", "flax", "optax", "orbax"}
    assert not {m.split(".")[0] for m in _imports(path)} & banned


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_are_data(path):
    names = {m.split(".")[0] for m in _imports(path)}
    assert names <= {"ml_collections", "configs"}, "configs import ml_collections only"


@pytest.mark.parametrize("path", [p for p in FILES if p.stem != "peer_hf"], ids=module_name)
def test_nothing_at_run_time_needs_torch(path):
    assert not {m.split(".")[0] for m in _imports(path)} & {"torch", "torchvision", "tests"}
