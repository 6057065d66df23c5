"""Count the FLOPs and the memory traffic of a compiled program on one device."""

import math
import re

import numpy as np

from cptjax.planning import hlo


def count_flops(text: str, dynamic: float = 1.0) -> float:
    """Return the FLOPs of all matrix products on one device.

    A multiply-add counts as two, and recomputed products count again.
    """
    computations, entry = hlo.parse_hlo(text)
    runs = hlo.run_counts(computations, entry, dynamic)
    total = 0.0
    for name, instructions in computations.items():
        if runs[name]:
            shapes = instruction_shapes(instructions)
            total += runs[name] * sum(_flops(i, shapes) for i in instructions)
    return total


def fused_flops(
    i: hlo.Instruction, shapes: dict[str, str], computations: hlo.Computations
) -> float:
    """Return the FLOPs of an instruction and of what is fused into it."""
    total = _flops(i, shapes)
    for name in hlo.called_computations(i):
        body = computations.get(name, [])
        inner = instruction_shapes(body)
        total += sum(fused_flops(j, inner, computations) for j in body)
    return total


def instruction_shapes(instructions: list[hlo.Instruction]) -> dict[str, str]:
    """Return the shape of each instruction by name."""
    return {i.name: i.shape for i in instructions}


def _flops(i: hlo.Instruction, shapes: dict[str, str]) -> float:
    if i.op == "dot":
        over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1]
        return _product(i, shapes, over)
    if i.op == "custom-call" and "__cublas" in i.rest:
        over = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.rest)[1]
        return _product(i, shapes, over.replace('"', ""))
    if i.op == "convolution":
        return _convolution(
            i, hlo.array_dims(shapes[i.operands[0]]), hlo.array_dims(shapes[i.operands[1]])
        )
    if (stated := _stated_cost(i, "flops")) is not None:
        return stated
    if i.op == "custom-call" and "splash" in i.name:
        return _splash(i)
    if i.op == "custom-call" and "__cudnn$fmha" in i.rest:
        return _cudnn(i, [hlo.array_dims(shapes[o]) for o in i.operands[:3]])
    return 0.0


def _product(i: hlo.Instruction, shapes: dict[str, str], contracted: str) -> float:
    """Count the FLOPs of a product; `contracted` lists axes of the left operand, as in "0,2"."""
    left = hlo.array_dims(shapes[i.operands[0]])
    over = math.prod(left[int(d)] for d in contracted.split(",") if d)
    return 2.0 * math.prod(hlo.array_dims(i.shape)) * over


def _stated_cost(i: hlo.Instruction, name: str) -> float | None:
    """Return a cost that a kernel of Pallas states, where it depends on data."""
    stated = re.search(rf'"cost_estimate":\{{[^}}]*"{name}":"(\d+)"', i.rest)
    return float(stated[1]) if stated and i.op == "custom-call" else None


def _convolution(i: hlo.Instruction, left: list[int], right: list[int]) -> float:
    """Count the FLOPs of a convolution, the form of matrix products on TPUs.

    Only window positions inside the (dilated) input count.
    """
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    lhs, rhs, out = (names[n] for n in (1, 2, 3))
    outer = math.prod(
        d for d, name in zip(hlo.array_dims(i.shape), out, strict=True) if name in "bf"
    )
    inner = right[rhs.index("i")]
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(name for name in out if name.isdigit())

    def every(name: str, default: str) -> list[str]:
        """Return a window's setting for each spatial axis."""
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    pairs = 1
    settings = (
        every("pad", "0_0"),
        every("stride", "1"),
        every("lhs_dilate", "1"),
        every("rhs_dilate", "1"),
    )
    for axis, pad, stride, spread, gap in zip(spatial, *settings, strict=True):
        o, k = (
            np.arange(hlo.array_dims(i.shape)[out.index(axis)])[:, None],
            np.arange(right[rhs.index(axis)]),
        )
        place = o * int(stride) + k * int(gap) - int(pad.split("_")[0])
        inside = (
            (place >= 0)
            & (place <= (left[lhs.index(axis)] - 1) * int(spread))
            & (place % int(spread) == 0)
        )
        pairs *= int(inside.sum())
    return 2.0 * outer * inner * pairs


def _splash(i: hlo.Instruction) -> float:
    """Count the FLOPs of the TPU's attention kernel, which is causal outside the vision tower.

    It computes 2 products forward, 3 for the gradient of queries, and 4 for that of keys.
    """
    listed = hlo.SHAPE_PATTERN.findall(i.rest.split("operand_layout_constraints=")[1])
    q, k = [
        [int(x) for x in sizes.split(",")] for kind, sizes, _ in listed if kind in ("bf16", "f32")
    ][:2]
    *heads, t, width = q
    s = k[-2]
    seen = 1.0 if "vision" in i.rest else (s - t + (t + 1) / 2) / s
    return (
        2.0
        * (2 if "fwd" in i.name else 3 if "dq" in i.name else 4)
        * math.prod(heads)
        * t
        * s
        * width
        * seen
    )


def _cudnn(i: hlo.Instruction, shapes: list[list[int]]) -> float:
    """Count the FLOPs of the GPU's attention kernel: 2 products forward, 5 backward, unmasked."""
    (b, t, n, h), s = shapes[0], shapes[1][1]
    return 2.0 * (5 if "Backward" in i.rest else 2) * b * n * t * s * h


FREE_OPCODES = (
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "partition-id iota"
).split()
FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "NopReturnToken")


def count_memory_traffic(text: str, dynamic: float = 1.0) -> float:
    """Return the bytes that one device reads from and writes to its main memory.

    The inputs and outputs of each fusion count; of an array that is sliced, only the slices.
    """
    computations, entry = hlo.parse_hlo(text)
    runs = hlo.run_counts(computations, entry, dynamic)
    fused = {
        c
        for instructions in computations.values()
        for i in instructions
        if i.op not in ("while", "conditional", "call")
        for c in hlo.called_computations(i)
    }
    total = 0.0
    for name, instructions in computations.items():
        if runs[name] and name not in fused:
            shapes = instruction_shapes(instructions)
            total += runs[name] * sum(moved_bytes(i, shapes, computations) for i in instructions)
    return total


def moved_bytes(
    i: hlo.Instruction, shapes: dict[str, str], computations: hlo.Computations
) -> float:
    """Return the bytes of main memory that an instruction reads and writes."""
    if i.op in FREE_OPCODES or i.op.endswith(("-done", "-update")):
        return 0.0
    if i.op == "custom-call" and any(f'"{name}"' in i.rest for name in FREE_CALLS):
        return 0.0
    if (stated := _stated_cost(i, "bytes_accessed")) is not None:
        return stated
    if i.op == "async-start":
        return sum(_body_bytes(name, computations) for name in hlo.called_computations(i))
    # The last result of a call of cuBLAS is its workspace.
    has_workspace = i.op == "custom-call" and "__cublas" in i.rest
    given = hlo.shape_bytes(i.shape.split(", s8[")[0] if has_workspace else i.shape, True)
    if i.op.endswith("-start"):
        return given  # its shape has the inputs too
    taken = [hlo.shape_bytes(_shape(shapes, o), only_main=True) for o in i.operands]
    if i.op == "dynamic-update-slice":
        return taken[1] + min(given, hlo.shape_bytes(_shape(shapes, i.operands[1])))
    if i.op in ("dynamic-slice", "gather", "slice"):
        return min(taken[0], hlo.shape_bytes(i.shape)) + given
    if i.op == "fusion" and (body := computations.get(next(iter(hlo.called_computations(i)), ""))):
        taken = [
            min(t, _read(body, _parameter(body, n), computations)) for n, t in enumerate(taken)
        ]
        given = min(given, _written(body, given))
    return sum(taken) + given


def _shape(shapes: dict[str, str], name: str) -> str:
    if name not in shapes:
        raise ValueError(
            f"the compiled program reads %{name}, which it does not define: plans do not know the "
            "form of this compiler's text; use a tested version of jax"
        )
    return shapes[name]


def _body_bytes(name: str, computations: hlo.Computations) -> float:
    """Return the bytes that an asynchronous computation reads and writes."""
    body = computations.get(name, [])
    shapes = instruction_shapes(body)
    return sum(
        moved_bytes(i, shapes, computations)
        + sum(_body_bytes(inner, computations) for inner in _plain_calls(i))
        for i in body
    )


def _plain_calls(i: hlo.Instruction) -> list[str]:
    return hlo.called_computations(i) if i.op == "call" else []


def _parameter(body: list[hlo.Instruction], number: int) -> str:
    return next(i.name for i in body if i.op == "parameter" and i.rest.startswith(f"{number})"))


def _read(body: list[hlo.Instruction], name: str, computations: hlo.Computations) -> float:
    """Return the bytes that a fusion reads of a value.

    Of a value that is only sliced, only the slices count; a value that is only written into counts
    0.
    """
    total = 0.0
    for i in body:
        for at in (n for n, operand in enumerate(i.operands) if operand == name):
            if i.op in ("dynamic-slice", "slice", "gather") and at == 0:
                total += hlo.shape_bytes(i.shape)
            elif i.op == "fusion" and (
                inner := computations.get(next(iter(hlo.called_computations(i)), ""))
            ):
                total += _read(inner, _parameter(inner, at), computations)
            elif i.op in ("bitcast", "reshape"):
                total += _read(body, i.name, computations)
            elif not (i.op == "dynamic-update-slice" and at == 0):
                return math.inf
    return total


def _written(body: list[hlo.Instruction], given: float) -> float:
    """Return the bytes that a fusion writes; an update in place counts only the update."""
    shapes, updates = instruction_shapes(body), [i for i in body if i.op == "dynamic-update-slice"]
    root = next((i for i in body if i.root), None)
    in_place = root is not None and (
        root in updates or {u.name for u in updates} & set(root.operands)
    )
    return (
        sum(hlo.shape_bytes(_shape(shapes, u.operands[1])) for u in updates) if in_place else given
    )
