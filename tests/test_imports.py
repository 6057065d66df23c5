"""Imports point one way: a file uses rows at or above its own, and nothing goes round in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = (  # a package stands for all of its files; a name may be listed before its file exists
    "types sharding metrics console order hlo hlo_costs chips images verify settings scorers templates rewards sampling multihost cli",
    "model advantages losses filters optim checkpoint trackers matrix summary flops logps objectives penalties layout patches video memory",
    "tasks tokenizer conversation processor_files batching processor prompting pool sampler",
    "data bench_data",
    "train runtime batches lessons teaching classroom drafts corpus rollouts recipe stage filtering ewc drift evaluate survey",
    "report workdir session resume exams reexam analysis learning continual",
    "sites programs ahead plan check bench bench_load bench_peer bench_work",
    "api",
)
JAX_FREE = {"tasks", "scorers", "rewards", "templates", "report", "verify", "matrix", "summary", "prompting", "images", "order"}
ROW = {name: i for i, names in enumerate(ROWS) for name in names.split()}
FILES = sorted((ROOT / "cptjax").rglob("*.py"))


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(p) for p in FILES}


def _imports(path: Path, everywhere: bool = True) -> set[str]:
    """Every module that a file imports (or those it needs to be imported itself); `from package import module` names the module."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno} imports relatively; write the whole name"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in full}
    return found


def _part(module: str) -> str:
    return (module.split(".") + [""])[1]


def _ours(path: Path, everywhere: bool = True) -> set[str]:
    return {m for m in _imports(path, everywhere) if m.split(".")[0] == "cptjax"}


@pytest.mark.parametrize("path", FILES, ids=[_module(p) for p in FILES])
def test_a_file_imports_only_from_its_row_or_lower(path):
    mine = _part(_module(path))
    if not mine:
        return  # cptjax/__init__.py shows the whole library
    assert mine in ROW, f"{path.name} is new: add {mine!r} to a row of ROWS in tests/test_imports.py"
    for module in _ours(path):
        part = _part(module)
        assert part, f"{path.name} imports the package cptjax itself; name the module"
        assert part in ROW, f"{path.name} imports {module}, which is new: add {part!r} to a row of ROWS in tests/test_imports.py"
        assert ROW[part] <= ROW[mine], f"{path.name} (row {ROW[mine]}) imports {module} (row {ROW[part]})"


def test_no_circles():
    graph = {_module(p): _ours(p, everywhere=False) - {_module(p)} for p in FILES}
    while ready := [m for m, uses in graph.items() if not uses & graph.keys()]:
        for module in ready:
            del graph[module]
    assert not graph, f"these import each other: {sorted(graph)}"


@pytest.mark.parametrize("path", [p for p in FILES if _part(_module(p)) in JAX_FREE], ids=lambda p: _module(p))
def test_text_code_never_imports_jax(path):
    assert not {m.split(".")[0] for m in _imports(path)} & {"jax", "jaxlib", "flax", "optax", "orbax"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_are_data(path):
    assert {m.split(".")[0] for m in _imports(path)} <= {"ml_collections", "configs"}, "configs import ml_collections only"


@pytest.mark.parametrize("path", [p for p in FILES if p.stem != "bench_peer"], ids=lambda p: _module(p))
def test_nothing_at_run_time_needs_torch(path):
    assert not {m.split(".")[0] for m in _imports(path)} & {"torch", "torchvision", "tests"}
