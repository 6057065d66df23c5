"""Totals of a compiled program read from its text: collectives and matrix products, loops counted as often as they run.

XLA's own `cost_analysis` counts a loop's body once, whatever its trip count.
"""

import dataclasses
import itertools
import math
import re

import numpy as np
from jax.sharding import Mesh

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_head = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_line = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_shape = re.compile(r"(\w+)\[([\d,]*)\]")
_called = re.compile(r"(?:calls|body|to_apply|condition|called_computations|branch_computations)=\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)\}?")
_trip = re.compile(r'known_trip_count"?:\s*\{\s*"n":\s*"(\d+)"')
_groups = re.compile(r"replica_groups=(\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All transfers of one kind over one mesh axis in a run of the program, per device."""

    kind: str
    axis: str
    size: int  # members of a group
    bytes: float
    calls: float


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    op: str
    rest: str


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Computations by name, and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        stripped = line.rstrip()
        if stripped.endswith("{") and not stripped.startswith(" ") and (head := _head.match(stripped)):
            current = computations.setdefault(head[1], [])
            entry = head[1] if stripped.startswith("ENTRY") else entry
        elif current is not None and (found := _line.match(stripped)):
            current.append(Instruction(*found.groups()))
    return computations, entry


def counts(computations: dict[str, list[Instruction]], entry: str) -> dict[str, float]:
    """How often each computation runs; a loop of unknown length counts once."""
    runs = dict.fromkeys(computations, 0.0)

    def visit(name: str, times: float) -> None:
        runs[name] += times
        for i in computations[name]:
            trip = _trip.search(i.rest) if i.op == "while" else None
            for names in _called.findall(i.rest):
                for callee in names.replace("%", "").replace(" ", "").split(","):
                    if callee in computations:
                        visit(callee, times * (int(trip[1]) if trip else 1))

    visit(entry, 1.0)
    return runs


def size(shape: str) -> int:
    """Bytes of a shape, or of a tuple of shapes."""
    return sum(BYTES.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in _shape.findall(shape))


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Every kind of transfer with its mesh axis."""
    computations, entry = parse(text)
    runs = counts(computations, entry)
    total: dict[tuple[str, str, int], list[float]] = {}
    for name, instructions in computations.items():
        for i in instructions:
            kind = i.op.removesuffix("-start")
            if kind not in KINDS or not runs[name]:
                continue
            group = _first_group(i.rest)
            volume = max(size(i.shape) // (2 if i.op.endswith("-start") and i.shape.startswith("(") else 1), 1)
            volume *= len(group) if kind == "reduce-scatter" else 1  # what goes in
            entry_ = total.setdefault((kind, _axis(group, mesh), len(group)), [0.0, 0.0])
            entry_[0] += volume * runs[name]
            entry_[1] += runs[name]
    return [Collective(*key, *value) for key, value in sorted(total.items(), key=lambda item: -item[1][0])]


def _first_group(rest: str) -> tuple[int, ...]:
    found = _groups.search(rest)
    if not found:
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
        return (int(pairs[1]), int(pairs[2])) if pairs else (0,)
    if found[1].startswith("{{"):
        return tuple(int(d) for d in found[1][2:].split("}")[0].split(",") if d)
    shape, rest_ = found[1].split("<=")
    dims = [int(d) for d in re.search(r"\[([\d,]+)\]", rest_)[1].split(",")]
    order = re.search(r"T\(([\d,]+)\)", rest_)
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose([int(d) for d in order[1].split(",")]) if order else ids
    return tuple(ids.reshape([int(d) for d in shape.strip("[]").split(",")])[0].tolist())


def _axis(group: tuple[int, ...], mesh: Mesh) -> str:
    """The mesh axes whose members form this group (positions in the mesh's device order)."""
    places = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    for n in range(1, 4):
        for axes in itertools.combinations(range(3), n):
            index = tuple(slice(None) if a in axes else 0 for a in range(3))
            if len(group) == places[index].size and set(group) == set(places[index].reshape(-1).tolist()):
                return "+".join(mesh.axis_names[a] for a in axes)
    sizes = {mesh.shape[a]: a for a in mesh.axis_names}
    return sizes.get(len(group), f"{len(group)} devices")
