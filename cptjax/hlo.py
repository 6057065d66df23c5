"""Totals of a compiled program read from its text: transfers, arithmetic and memory traffic, loops counted as often as they run.

XLA's own `cost_analysis` counts a loop's body once, whatever its trip count. Here a loop counts as often as its text says, or as
its condition compares with one constant; a loop whose end depends on data counts `dynamic` times, and inside another such loop once.
The branches of a conditional count in equal parts.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_head = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_line = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_shape = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_operand = re.compile(r"%([\w.\-]+)")
_called = re.compile(r"(?:calls|body|to_apply|called_computations|branch_computations|true_computation|false_computation)=\{?([%\w.\-, ]+)")
_trip = re.compile(r'known_trip_count"?:\s*\{\s*"n":\s*"(\d+)"')
_groups = re.compile(r"replica_groups=(\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[[^\]]*\] ?\{[^}]*\})")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All transfers of one kind over one mesh axis in a run of the program, per device."""

    kind: str
    axis: str
    size: int  # members of a group
    bytes: float  # of the whole array: what an all-gather puts out, what a reduce-scatter takes in
    calls: float


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    op: str
    rest: str
    root: bool = False

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of what it reads; attributes follow the closing bracket."""
        return _operand.findall(_within(self.rest))


def _within(rest: str) -> str:
    """What stands before the bracket that closes the operand list."""
    depth = 1
    for i, c in enumerate(rest):
        depth += (c == "(") - (c == ")")
        if not depth:
            return rest[:i]
    return rest


Computations = dict[str, list[Instruction]]


def parse(text: str) -> tuple[Computations, str]:
    """Computations by name, and the entry's name."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        stripped = line.rstrip()
        if stripped.endswith("{") and not stripped.startswith(" ") and (head := _head.match(stripped)):
            current = computations.setdefault(head[1], [])
            entry = head[1] if stripped.startswith("ENTRY") else entry
        elif current is not None and (found := _line.match(stripped)):
            root, *parts = found.groups()
            current.append(Instruction(*parts, bool(root)))
    return computations, entry


def callees(i: Instruction) -> list[str]:
    """Computations that an instruction runs, a loop's condition left out."""
    if i.op.endswith(("-update", "-done")):
        return []  # counted where it starts
    return [name for names in _called.findall(i.rest) for name in names.replace("%", "").replace(" ", "").split(",") if name]


def trips(loop: Instruction, computations: Computations) -> int | None:
    """How often a loop runs; None where that depends on data."""
    if known := _trip.search(loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = list(computations.get(condition[1], ())) if condition else []
    for i in list(body):
        body += [j for name in callees(i) for j in computations.get(name, ())]
    compares = [i for i in body if i.op == "compare"]
    whole = (i for i in body if i.op == "constant" and i.shape.startswith(("s32[]", "u32[]")))
    constants = [int(n[0]) for i in whole if (n := re.match(r"\d+", i.rest))]
    if len(compares) != 1 or len(constants) != 1 or any(i.op in ("and", "or", "reduce") for i in body):
        return None
    return constants[0] + ("direction=LE" in compares[0].rest)


def counts(computations: Computations, entry: str, dynamic: float = 1.0) -> dict[str, float]:
    """How often each computation runs."""
    runs = dict.fromkeys(computations, 0.0)

    def visit(name: str, times: float, dynamic: float) -> None:
        runs[name] += times
        for i in computations[name]:
            inside, within = times, dynamic
            if i.op == "while" and (n := trips(i, computations)) is not None:
                inside *= n
            elif i.op == "while":
                inside, within = times * dynamic, 1.0
            called = [c for c in callees(i) if c in computations]
            for callee in called:
                visit(callee, inside / len(called) if i.op == "conditional" else inside, within)

    visit(entry, 1.0, dynamic)
    return runs


def size(shape: str, only_main: bool = False) -> int:
    """Bytes of a shape, or of a tuple of shapes; `only_main`: without what a TPU keeps in its vector memory (layout S(n))."""
    found = (x for x in _shape.findall(shape) if not (only_main and "S(" in x[2]))
    return sum(BYTES.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes, _ in found)


def dims(shape: str) -> list[int]:
    """Sizes of the first array of a shape."""
    return [int(d) for d in _shape.search(shape)[2].split(",") if d]


def collectives(text: str, mesh: Mesh, dynamic: float = 1.0) -> list[Collective]:
    """Every kind of transfer with its mesh axis, the largest first."""
    computations, entry = parse(text)
    runs = counts(computations, entry, dynamic)
    total: dict[tuple[str, str, int], list[float]] = {}
    for name, instructions in computations.items():
        for i in instructions:
            kind = i.op.removesuffix("-start")
            if kind not in KINDS or not runs[name]:
                continue
            group = _first_group(i.rest)
            volume = _volume(i, kind, len(group))
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # so the TPU compiler writes it
            bill = total.setdefault((kind, _axis(group, mesh), len(group)), [0.0, 0.0])
            bill[0] += volume * runs[name]
            bill[1] += runs[name]
    return [Collective(*key, *value) for key, value in sorted(total.items(), key=lambda item: -item[1][0])]


def _volume(i: Instruction, kind: str, members: int) -> float:
    """Bytes of the whole array; an asynchronous start shows what goes in beside what comes out."""
    volume = float(size(i.shape))
    if i.op == "all-gather-start":
        return volume * members / (members + 1)
    if i.op == "collective-permute-start":
        return volume / 2
    return volume * members if kind == "reduce-scatter" else volume


def _first_group(rest: str) -> tuple[int, ...]:
    found = _groups.search(rest)
    if not found:
        pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest)
        moved = re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pairs else []
        return next(((int(a), int(b)) for a, b in moved if a != b), (0,))
    if found[1].startswith("{{"):
        return tuple(int(d) for d in found[1][2:].split("}")[0].split(",") if d)
    if found[1].startswith("mesh["):
        return _named_group(found[1])
    shape, rest_ = found[1].split("<=")
    sizes = [int(d) for d in re.search(r"\[([\d,]+)\]", rest_)[1].split(",")]
    order = re.search(r"T\(([\d,]+)\)", rest_)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    ids = ids.transpose([int(d) for d in order[1].split(",")]) if order else ids
    return tuple(ids.reshape([int(d) for d in shape.strip("[]").split(",")])[0].tolist())


def _named_group(text: str) -> tuple[int, ...]:
    """mesh['a'=16,'b'=4] {'a'}: the devices along the named axes."""
    axes, chosen = text.split("]", 1)
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    names = re.findall(r"'([^']+)'", chosen)
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return tuple(ids[tuple(slice(None) if a in names else 0 for a in sizes)].reshape(-1).tolist())


def _axis(group: tuple[int, ...], mesh: Mesh) -> str:
    """The mesh axes along which these devices lie; they are numbered as in the mesh's device order."""
    at = np.stack(np.unravel_index(group, mesh.devices.shape))
    moved = [a for a, places in zip(mesh.axis_names, at, strict=True) if len(set(places.tolist())) > 1]
    return "+".join(moved) or "none"


def arithmetic(text: str, dynamic: float = 1.0) -> float:
    """Multiply-adds, each counted as two, of all matrix products that one device does; recomputed ones as often as they are done."""
    computations, entry = parse(text)
    runs = counts(computations, entry, dynamic)
    return sum(runs[name] * sum(_flops(i, _shapes(found)) for i in found) for name, found in computations.items() if runs[name])


def _shapes(instructions: list[Instruction]) -> dict[str, str]:
    return {i.name: i.shape for i in instructions}


def _flops(i: Instruction, shapes: dict[str, str]) -> float:
    if i.op == "dot":
        left = dims(shapes[i.operands[0]])
        over = [int(d) for d in re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1].split(",") if d]
        return 2.0 * math.prod(dims(i.shape)) * math.prod(left[d] for d in over)
    if i.op == "convolution":
        return _convolution(i, dims(shapes[i.operands[0]]), dims(shapes[i.operands[1]]))
    if i.op == "custom-call" and "splash" in i.name:
        return _splash(i)
    if i.op == "custom-call" and "__cudnn$fmha" in i.rest:
        return _cudnn(i, [dims(shapes[o]) for o in i.operands[:3]])
    return 0.0


def _convolution(i: Instruction, left: list[int], right: list[int]) -> float:
    """A TPU's matrix product: batch axes are windows of which one position counts each."""
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    lhs, rhs, out = (names[n] for n in (1, 2, 3))
    outer = math.prod(d for d, name in zip(dims(i.shape), out, strict=True) if name in "bf")
    inner = right[rhs.index("i")]
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(name for name in out if name.isdigit())
    every = lambda name, default: fields[name].split("x") if name in fields else [default] * len(spatial)
    pairs = 1
    settings = (every("pad", "0_0"), every("stride", "1"), every("lhs_dilate", "1"), every("rhs_dilate", "1"))
    for axis, pad, stride, spread, gap in zip(spatial, *settings, strict=True):
        o, k = np.arange(dims(i.shape)[out.index(axis)])[:, None], np.arange(right[rhs.index(axis)])
        place = o * int(stride) + k * int(gap) - int(pad.split("_")[0])
        inside = (place >= 0) & (place <= (left[lhs.index(axis)] - 1) * int(spread)) & (place % int(spread) == 0)
        pairs *= int(inside.sum())
    return 2.0 * outer * inner * pairs


def _splash(i: Instruction) -> float:
    """The TPU's attention kernel, causal outside the vision tower: two products forward, three for queries', four for keys' gradients."""
    listed = _shape.findall(i.rest.split("operand_layout_constraints=")[1])
    q, k = [[int(x) for x in sizes.split(",")] for kind, sizes, _ in listed if kind in ("bf16", "f32")][:2]
    *heads, t, width = q
    s = k[-2]
    seen = 1.0 if "vision" in i.rest else (s - t + (t + 1) / 2) / s
    return 2.0 * (2 if "fwd" in i.name else 3 if "dq" in i.name else 4) * math.prod(heads) * t * s * width * seen


def _cudnn(i: Instruction, shapes: list[list[int]]) -> float:
    """The GPU's attention kernel, whole squares: two products forward, five backward."""
    (b, t, n, h), s = shapes[0], shapes[1][1]
    return 2.0 * (5 if "Backward" in i.rest else 2) * b * n * t * s * h


FREE = "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id iota".split()


def traffic(text: str, dynamic: float = 1.0) -> float:
    """Bytes that one device reads from and writes to its main memory: what each fused group takes and gives, slices as slices."""
    computations, entry = parse(text)
    runs = counts(computations, entry, dynamic)
    fused = {c for found in computations.values() for i in found if i.op not in ("while", "conditional", "call") for c in callees(i)}
    total = 0.0
    for name, found in computations.items():
        if runs[name] and name not in fused:
            shapes = _shapes(found)
            total += runs[name] * sum(_moved(i, shapes, computations) for i in found)
    return total


def _moved(i: Instruction, shapes: dict[str, str], computations: Computations) -> float:
    if i.op in FREE or i.op.endswith(("-done", "-update")):
        return 0.0
    taken = [size(shapes.get(o, ""), only_main=True) for o in i.operands]
    given = size(i.shape, only_main=True)
    if i.op == "dynamic-update-slice":
        return 2.0 * taken[1]
    if i.op in ("dynamic-slice", "gather", "slice"):
        return 2.0 * given
    if i.op == "fusion" and (body := computations.get(next(iter(callees(i)), ""))):
        taken, given = _of_fusion(body, taken, given)
    return sum(taken) + given


def _of_fusion(body: list[Instruction], taken: list[int], given: int) -> tuple[list[int], int]:
    """A parameter that is only sliced counts as its slices; a result that is written into a parameter as what is written."""
    taken = list(taken)
    for p in body:
        if p.op != "parameter":
            continue
        number, users = int(p.rest.split(")")[0]), [i for i in body if p.name in i.operands]
        if users and number < len(taken) and all(u.op in ("dynamic-slice", "slice", "gather") and u.operands[0] == p.name for u in users):
            taken[number] = min(taken[number], sum(size(u.shape) for u in users))
        if users and number < len(taken) and all(u.op == "dynamic-update-slice" and u.operands[0] == p.name for u in users):
            written = sum(size(_shapes(body).get(u.operands[1], "")) for u in users)
            taken[number], given = 0, min(given, written)
    return taken, given


def largest(report: str, count: int = 12) -> list[tuple[float, str]]:
    """The largest buffers (bytes, what lies there) of the TPU compiler's memory report."""
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    main = report.split("Memory Space:")[1] if "Memory Space:" in report else report
    found = re.findall(r"^ *[\d.]+\w+\( *\d+%\); +([\d.]+)([KMG]?i?B); +\d+; +\d+; (.*)$", main, re.M)
    return [(float(n) * units[unit], what) for n, unit, what in found[:count]]


def written(folder: str) -> tuple[str, str]:
    """What the TPU compiler wrote there: the largest program's text, and its report of buffers."""
    texts = sorted(Path(folder).glob("*.after_optimizations.txt"), key=lambda path: -path.stat().st_size)
    if not texts:
        return "", ""
    report = texts[0].with_name(texts[0].name.replace("after_optimizations.txt", "after_optimizations-memory-usage-report.txt"))
    return texts[0].read_text(), report.read_text() if report.is_file() else ""


def assigned(folder: str) -> dict[str, float]:
    """Sizes from the TPU compiler's assignment of buffers, once it and the program's text are written; {} before."""
    done = list(Path(folder).glob("module_0000*.after_optimizations_after_buffer_assignment.txt"))
    lists = list(Path(folder).glob("module_0000*.after_optimizations-buffer-assignment.txt"))
    if not done or not lists:
        return {}
    out = dict.fromkeys(("arguments", "outputs", "donated", "temporaries"), 0.0)
    for n, kind in re.findall(r"^allocation \d+: size (\d+),(.*):$", lists[0].read_text(), re.M):
        given, back = " parameter " in kind, "maybe-live-out" in kind
        out["arguments"] += int(n) * given
        out["outputs"] += int(n) * back
        out["donated"] += int(n) * (given and back)
        out["temporaries"] += int(n) * ("preallocated-temp" in kind and "color" not in kind)
    return out
