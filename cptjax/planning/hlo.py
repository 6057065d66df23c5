"""Read compiled programs: how often each instruction runs, and every transfer with its mesh axis.

XLA's `cost_analysis` counts the body of a loop once, for any number of iterations. This module
takes the number of iterations from the text of the program or from the only constant of the loop's
condition. A loop whose end depends on data counts `dynamic` times, but once inside another such
loop. The branches of a conditional count in equal parts.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

DTYPE_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
COLLECTIVE_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

# An axis of a slice is closed to a ring if its length is a multiple of this: of a whole pod for
# chips on a plane, of a cube of 4 x 4 x 4 for others.
TORUS_LENGTHS = {"TPU v5 lite": 16, "TPU v5e": 16, "TPU v6 lite": 16, "TPU v6e": 16}
CUBE_LENGTH = 4

_head = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_line = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
SHAPE_PATTERN = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_operand = re.compile(r"%([\w.\-]+(?:#\d+)?)")
_element = re.compile(r"%([\w.\-]+)#(\d+)")  # of a tuple, where the text has no instruction for it
_called = re.compile(
    r"(?:calls|body|to_apply|called_computations|branch_computations|true_computation"
    r"|false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_trip = re.compile(r'known_trip_count"?:\s*\{\s*"n":\s*"(\d+)"')
_groups = re.compile(
    r"replica_groups=(\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
    r"|mesh\[[^\]]*\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))? ?\{[^}]*\})"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All transfers of one kind over one mesh axis in one call of a program, per device."""

    kind: str
    axis: str
    size: int  # members of a group
    bytes: float  # of the whole array: the output of an all-gather, the input of a reduce-scatter
    calls: float
    links: int = 2  # of a device that its rings use at the same time, in any direction
    slices: int = 1  # that a group spans


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    op: str
    rest: str
    root: bool = False

    @functools.cached_property
    def operands(self) -> list[str]:
        """The names of the values that the instruction reads."""
        return _operand.findall(_operand_list(self.rest))


def _operand_list(rest: str) -> str:
    """Return the text before the bracket that closes the operand list."""
    depth = 1
    for i, c in enumerate(rest):
        depth += (c == "(") - (c == ")")
        if not depth:
            return rest[:i]
    return rest


Computations = dict[str, list[Instruction]]


@functools.lru_cache(maxsize=2)
def parse_hlo(text: str) -> tuple[Computations, str]:
    """Return the computations by name, and the name of the entry.

    A newer form of the text reads an element of a tuple as `%tuple#2`; the instruction that older
    forms have for it is added.
    """
    computations: Computations = {}
    entry, instructions, shapes = "", None, {}
    for line in text.splitlines():
        stripped = line.rstrip()
        if (
            stripped.endswith("{")
            and not stripped.startswith(" ")
            and (head := _head.match(stripped))
        ):
            instructions, shapes = computations.setdefault(head[1], []), {}
            entry = head[1] if stripped.startswith("ENTRY") else entry
        elif instructions is not None and (match := _line.match(stripped)):
            root, name, shape, op, rest = match.groups()
            for read, index in _element.findall(_operand_list(rest)):
                if (element := f"{read}#{index}") not in shapes:
                    shapes[element] = tuple_shapes(shapes[read])[int(index)]
                    get = f"%{read}), index={index}"
                    instructions.append(
                        Instruction(element, shapes[element], "get-tuple-element", get)
                    )
            shapes[name] = shape
            instructions.append(Instruction(name, shape, op, rest, bool(root)))
        elif instructions and stripped != "}":  # an attribute of the last one has several lines
            last = instructions[-1]
            instructions[-1] = dataclasses.replace(last, rest=f"{last.rest} {stripped}")
    return computations, entry


def called_computations(i: Instruction) -> list[str]:
    """Return the computations that an instruction runs, except the condition of a loop."""
    if i.op.endswith(("-update", "-done")):
        return []  # counted at the "-start"
    return [
        name
        for listed, single in _called.findall(i.rest)
        for name in (listed or single).replace("%", "").replace(" ", "").split(",")
        if name
    ]


def loop_trips(loop: Instruction, computations: Computations) -> int | None:
    """Return the number of iterations of a loop; None if it depends on data."""
    if known := _trip.search(loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = list(computations.get(condition[1], ())) if condition else []
    for i in list(body):
        body += [j for name in called_computations(i) for j in computations.get(name, ())]
    compares = [i for i in body if i.op == "compare"]
    whole = (i for i in body if i.op == "constant" and i.shape.startswith(("s32[]", "u32[]")))
    constants = [int(n[0]) for i in whole if (n := re.match(r"\d+", i.rest))]
    if (
        len(compares) != 1
        or len(constants) != 1
        or any(i.op in ("and", "or", "reduce") for i in body)
    ):
        return None
    return -(
        -(constants[0] + ("direction=LE" in compares[0].rest)) // _stride(loop, body, computations)
    )


def _stride(loop: Instruction, condition: list[Instruction], computations: Computations) -> int:
    """Return the increment of the loop counter per iteration: more than 1 in unrolled loops."""
    counter = next(
        (
            int(n[1])
            for i in condition
            if i.op == "get-tuple-element" and (n := re.search(r"index=(\d+)", i.rest))
        ),
        None,
    )
    name = re.search(r"body=%?([\w.\-]+)", loop.rest)
    body = {i.name: i for i in computations.get(name[1], ())} if name else {}
    root = next((i for i in body.values() if i.root), None)
    if counter is None or root is None or root.op != "tuple":
        return 1
    step = body[root.operands[counter]]
    inputs = [body[o] for o in step.operands] + [
        j for c in called_computations(step) for j in computations.get(c, ())
    ]
    constants = [
        int(n[0]) for i in inputs if i.op == "constant" and (n := re.match(r"\d+", i.rest))
    ]
    return max(constants[0], 1) if len(constants) == 1 else 1


def run_counts(computations: Computations, entry: str, dynamic: float = 1.0) -> dict[str, float]:
    """Return how often each computation runs."""
    runs = dict.fromkeys(computations, 0.0)

    def visit(name: str, times: float, dynamic: float) -> None:
        runs[name] += times
        for i in computations[name]:
            inside, within = times, dynamic
            if i.op == "while" and (n := loop_trips(i, computations)) is not None:
                inside *= n
            elif i.op == "while":
                inside, within = times * dynamic, 1.0
            called = [c for c in called_computations(i) if c in computations]
            for callee in called:
                visit(callee, inside / len(called) if i.op == "conditional" else inside, within)

    visit(entry, 1.0, dynamic)
    return runs


def tuple_shapes(shape: str) -> list[str]:
    """Return the shapes of the elements of a tuple, as in `(s32[], f32[2]{0:T(128)})`."""
    parts, depth = [""], 0
    for c in re.sub(r"/\*.*?\*/", "", shape)[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def shape_bytes(shape: str, only_main: bool = False) -> int:
    """Return the bytes of a shape or tuple of shapes.

    `only_main` leaves out a TPU's vector memory (layout S(n)).
    """
    arrays = (x for x in SHAPE_PATTERN.findall(shape) if not (only_main and "S(" in x[2]))
    return sum(
        DTYPE_BYTES.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes, _ in arrays
    )


def array_dims(shape: str) -> list[int]:
    """Return the sizes of the first array of a shape."""
    return [int(d) for d in SHAPE_PATTERN.search(shape)[2].split(",") if d]


def find_collectives(
    text: str, mesh: Mesh, dynamic: float = 1.0, slices: int = 1
) -> list[Collective]:
    """Return every kind of transfer with its mesh axis, the largest first."""
    computations, entry = parse_hlo(text)
    runs = run_counts(computations, entry, dynamic)
    total: dict[tuple[str, str, int, int, int], list[float]] = {}
    chains: set[str] = set()
    for name, instructions in computations.items():
        for i in instructions if runs[name] else ():
            transfer = find_transfer(i, name, mesh, slices)
            if transfer is None or (transfer.chain and transfer.chain in chains):
                continue
            chains.add(transfer.chain)
            key = (transfer.kind, transfer.axis, transfer.members, transfer.links, transfer.slices)
            sums = total.setdefault(key, [0.0, 0.0])
            sums[0] += transfer.bytes * runs[name]
            sums[1] += runs[name]
    return [
        Collective(kind, axis, members, volume, calls, links, spanned)
        for (kind, axis, members, links, spanned), (volume, calls) in sorted(
            total.items(), key=lambda item: -item[1][0]
        )
    ]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The data that one instruction transfers, per device."""

    kind: str
    axis: str
    members: int
    bytes: float  # of the whole array
    links: int = 2
    backwards: bool = False  # a permutation to the previous member
    chain: str = ""  # the same for all parts of a transfer that is spread over fused groups
    slices: int = 1  # that the members are on


def find_transfer(i: Instruction, computation: str, mesh: Mesh, slices: int = 1) -> Transfer | None:
    """Return what an instruction of a computation transfers, or None.

    The mesh is over so many `slices`, one after the other along its first axis.
    """
    # A transfer between slices goes through the hosts.
    if across := re.search(r"_xla_megascale_transfer_type=\"(\w+)\"", i.rest):
        kind = across[1].lower().replace("_", "-")
        if i.op != ("recv" if kind == "all-gather" else "send"):
            return None
        volume = float(shape_bytes(SHAPE_PATTERN.search(i.shape)[0]))
        return Transfer(kind, "data", slices, volume, slices=slices)
    kind = i.op.removesuffix("-start")
    if kind not in COLLECTIVE_KINDS:
        return None
    group = _first_group(i.rest)
    volume = _volume(i, kind, len(group))
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # as the TPU compiler writes it
    chain = re.search(r"channel_id=\d+(?=.*chain_id=\"\d+\")", i.rest)
    return Transfer(
        kind,
        _axis(group, mesh),
        len(group),
        volume,
        _ring_links(group, mesh),
        kind == "collective-permute" and group[-1] < group[0],
        chain[0] if chain else "",
        _spanned_slices(_moves(i.rest) or [group], mesh, slices),
    )


def _volume(i: Instruction, kind: str, members: int) -> float:
    """Return the bytes of the whole array of a collective; of an all-to-all, those of a member.

    The shape of an asynchronous start includes both the input and the output.
    """
    volume = float(shape_bytes(i.shape))
    if i.op in ("all-gather-start", "reduce-scatter-start"):
        return volume * members / (members + 1)
    if i.op == "collective-permute-start":
        return volume / 2
    return volume * members if kind == "reduce-scatter" else volume


def _first_group(rest: str) -> tuple[int, ...]:
    """Return the devices of the first group of a collective."""
    groups = _groups.search(rest)
    if not groups:
        return next((pair for pair in _moves(rest) if pair[0] != pair[1]), (0,))
    if groups[1].startswith("{{"):
        return tuple(int(d) for d in groups[1][2:].split("}")[0].split(",") if d)
    if groups[1].startswith("mesh["):
        return _named_group(groups[1])
    shape, order_text = groups[1].split("<=")
    sizes = [int(d) for d in re.search(r"\[([\d,]+)\]", order_text)[1].split(",")]
    order = re.search(r"T\(([\d,]+)\)", order_text)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    ids = ids.transpose([int(d) for d in order[1].split(",")]) if order else ids
    return tuple(ids.reshape([int(d) for d in shape.strip("[]").split(",")])[0].tolist())


def _moves(rest: str) -> list[tuple[int, ...]]:
    """Return from which device to which a permutation moves; [] for other collectives."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest)
    moved = re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pairs else []
    return [(int(a), int(b)) for a, b in moved]


def _spanned_slices(groups: list[tuple[int, ...]], mesh: Mesh, slices: int) -> int:
    """Return how many slices the group that spans most of them is on."""
    size = mesh.devices.size // slices
    return max(len({place // size for place in group}) for group in groups)


def _named_group(text: str) -> tuple[int, ...]:
    """Return the devices along the named axes of mesh['a'=16,'b'=4] {'a'}.

    If the mesh does not have the devices in order, they follow: device_ids=([4,16]T(1,0)).
    """
    axes, chosen = text.split("]", 1)
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    names = re.findall(r"'([^']+)'", chosen)
    ids = np.arange(math.prod(sizes.values()))
    if order := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", chosen):
        shape, permutation = ([int(n) for n in part.split(",")] for part in order.groups())
        ids = ids.reshape(shape).transpose(permutation)
    elif "device_ids" in chosen:
        raise ValueError(f"cannot read the devices of a transfer: {text}")
    ids = ids.reshape(tuple(sizes.values()))
    return tuple(ids[tuple(slice(None) if a in names else 0 for a in sizes)].reshape(-1).tolist())


def _axis(group: tuple[int, ...], mesh: Mesh) -> str:
    """Return the mesh axes that a group of devices, numbered in the mesh's order, spans."""
    at = np.stack(np.unravel_index(group, mesh.devices.shape))
    moved = [
        a for a, places in zip(mesh.axis_names, at, strict=True) if len(set(places.tolist())) > 1
    ]
    return "+".join(moved) or "none"


def _ring_links(group: tuple[int, ...], mesh: Mesh) -> int:
    """Return how many links of a device the rings of a group use at the same time.

    Along each axis of the torus that the group spans these are two links where the axis is closed,
    else one: of a line, the devices at the ends have one neighbour. A GPU has one link to a switch.
    """
    devices = list(mesh.devices.flat)
    if devices[0].platform == "gpu":
        return 1
    if not hasattr(devices[0], "coords"):
        return 2  # no torus
    everywhere, members = np.array([d.coords for d in devices]), np.array(group)
    sizes = everywhere.max(0) - everywhere.min(0) + 1
    places = [len(set(column.tolist())) for column in everywhere[members].T]
    closed = TORUS_LENGTHS.get(devices[0].device_kind, CUBE_LENGTH)
    links = sum(
        2 if n == size and size % closed == 0 else 1
        for n, size in zip(places, sizes, strict=True)
        if n > 1
    )
    return max(links, 1)


def largest_buffers(report: str, count: int = 12) -> list[tuple[float, str]]:
    """Return the largest buffers as (bytes, content), from the compiler's memory report."""
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    main = report.split("Memory Space:")[1] if "Memory Space:" in report else report
    lines = re.findall(
        r"^ *[\d.]+\w+\( *\d+%\); +([\d.]+)([KMG]?i?B); +\d+; +\d+; (.*)$", main, re.M
    )
    return [(float(n) * units[unit], content) for n, unit, content in lines[:count]]


def read_compiler_dump(folder: str) -> tuple[str, str]:
    """Return the compiler's text of the largest program, and its memory report."""
    texts = sorted(
        Path(folder).glob("*after_optimizations.txt"), key=lambda path: -path.stat().st_size
    )
    if not texts:
        return "", ""
    report = texts[0].with_name(
        texts[0].name.replace(
            "after_optimizations.txt", "after_optimizations-memory-usage-report.txt"
        )
    )
    return texts[0].read_text(), report.read_text() if report.is_file() else ""


def read_buffer_sizes(folder: str) -> dict[str, float]:
    """Return the sizes of the buffers that the TPU compiler assigned; {} before it did so."""
    # The number of a module counts all that the process has compiled.
    done = list(Path(folder).glob("module_*.after_optimizations_after_buffer_assignment.txt"))
    lists = list(Path(folder).glob("module_*.after_optimizations-buffer-assignment.txt"))
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
