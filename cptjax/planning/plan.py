"""Every program of a run compiled for a slice that need not be here: what it needs of memory, arithmetic and the network.

A program's peak is  arguments + outputs - donated + temporaries  + what lives beside it (the optimiser's state during rollouts, the
reference during the update). Seconds are a lower bound: the slowest of compute, memory and interconnect, all overlapping perfectly.
"""

import dataclasses
import json
import math
import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax

from cptjax.common import console
from cptjax.config import config_to_dict, expand_runs, resolve_stages
from cptjax.planning import aot_compile, chips, hlo, hlo_costs, programs
from cptjax.planning.aot_compile import SubprocessCompiler
from cptjax.planning.chips import Chip
from cptjax.planning.programs import Program
from cptjax.planning.stage_shapes import StageShapes


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """One program on one device."""

    name: str
    calls: float  # in one step
    compile_seconds: float
    arguments: float
    outputs: float
    donated: float
    temporaries: float
    beside: float
    arithmetic: float  # floating-point operations of one call, recomputation included
    useful: float  # of the model by hand count, all devices together
    traffic: float  # bytes from and to memory
    collectives: list[hlo.Collective]
    seconds: dict[str, float]  # compute, memory, network
    buffers: list[tuple[float, str]]  # the largest temporaries
    over: str = ""  # the compiler's own words where it refused for lack of memory

    @property
    def peak(self) -> float:
        return self.arguments + self.outputs - self.donated + self.temporaries + self.beside

    @property
    def bound(self) -> float:
        return max(self.seconds.values(), default=0.0)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """All programs of a config on one slice."""

    name: str
    devices: int
    mesh: dict[str, int]
    chip: Chip | None
    resident: dict[str, float]  # bytes a device
    costs: list[ProgramCost]

    @property
    def memory(self) -> float:
        """Bytes a device at the worst moment."""
        return max(c.peak for c in self.costs)

    def refused(self) -> list[ProgramCost]:
        """Programs that do not fit."""
        return [c for c in self.costs if c.over or (self.chip and c.peak > self.chip.usable)]

    def step_seconds(self) -> float:
        return sum(c.bound * c.calls for c in self.costs)

    def mfu(self) -> float | None:
        """The largest possible share of the chips' arithmetic that goes into the model, over one step."""
        if self.chip is None or not self.step_seconds():
            return None
        return sum(c.useful * c.calls for c in self.costs) / (
            self.devices * self.chip.flops * self.step_seconds()
        )


def make_plans(
    config: Any, topology: str | None = None, slices: int = 1, thorough: bool = False
) -> list[StagePlan]:
    """A plan for every different run that a config describes (arms that differ in their programs); `thorough`: machine code too."""
    devices, plans, seen = aot_compile.topology_devices(topology, slices), [], set()
    for arm, single in expand_runs(config):
        for stage in resolve_stages(single):
            key = json.dumps(
                {
                    k: v
                    for k, v in config_to_dict(stage.config).items()
                    if k in programs.PROGRAM_SECTIONS
                },
                sort_keys=True,
            )
            if key not in seen:
                seen.add(key)
                name = f"{arm or single.name}" + (
                    f" stage {stage.number}" if stage.number > 1 else ""
                )
                plans.append(plan_stage(name, stage.config, devices, topology, slices, thorough))
    return plans


def plan_stage(
    name: str,
    config: Any,
    devices: Sequence[Any],
    topology: str | None,
    slices: int = 1,
    thorough: bool = False,
) -> StagePlan:
    """The programs of one stage's settings, compiled one after the other."""
    site = aot_compile.shapes_on_devices(config, devices, slices)
    kind = devices[0].device_kind
    chip = chips.chip_of_devices(devices)
    short = SubprocessCompiler(config, topology, slices) if topology and not thorough else None
    costs: list[ProgramCost] = []
    made: dict[str, Any] = {}
    for program in programs.stage_programs(site):
        with console.show_waiting(f"{name}: compile {program.name} for {len(devices)} x {kind}"):
            costs.append(program_cost(program, site, chip, made, short, costs))
        if costs[-1].over:
            break  # later programs may need what it returns
    return StagePlan(
        name,
        len(devices),
        dict(site.mesh.shape),
        chip,
        {k: bytes_per_device(v) for k, v in site.pieces.items()},
        costs,
    )


def peak_bytes(config: Any, topology: str | None = None, slices: int = 1) -> float:
    """Bytes that a device needs at the worst moment of a run; compiles every program."""
    return max(plan.memory for plan in make_plans(config, topology, slices))


def resident_bytes(config: Any, devices: Sequence[Any] | None = None) -> dict[str, float]:
    """Bytes a device of what stays: trained weights, frozen weights, optimiser, reference; compiles nothing."""
    stage = resolve_stages(config)[0]
    return {
        k: bytes_per_device(v)
        for k, v in aot_compile.shapes_on_devices(
            stage.config, devices or jax.devices(), 1
        ).pieces.items()
    }


def bytes_per_device(tree: Any) -> float:
    """Bytes of a tree's share on one device."""
    part = lambda x: x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return float(sum(math.prod(part(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def program_cost(
    program: Program,
    site: StageShapes,
    chip: Chip | None,
    made: dict[str, Any],
    short: SubprocessCompiler | None,
    before: Sequence[ProgramCost] = (),
) -> ProgramCost:
    """The cost of a program, after the costs of those before it; what it returns is added to `made` where it is compiled to the end."""
    beside = sum(
        bytes_per_device(tree) for name, tree in site.pieces.items() if name not in program.holds
    )
    beside += sum(c.outputs for name in program.keeps for c in before if c.name == name)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            sizes = (
                short.compile(program, folder)
                if short
                else aot_compile.compile_program(program, site, made, folder)
            )
        except jax.errors.JaxRuntimeError as error:
            return _refused_cost(program, beside, time.monotonic() - started, str(error))
        text, report = hlo.read_compiler_dump(folder)
    text, seconds = sizes.pop("text", text), time.monotonic() - started
    found = hlo.find_collectives(text, site.mesh, program.turns)
    arithmetic, traffic = (
        hlo_costs.count_flops(text, program.turns),
        hlo_costs.count_memory_traffic(text, program.turns),
    )
    times = roofline_seconds(arithmetic, traffic, found, chip, site.slices)
    return ProgramCost(
        program.name,
        program.calls,
        seconds,
        **sizes,
        beside=beside,
        arithmetic=arithmetic,
        useful=program.useful,
        traffic=traffic,
        collectives=found,
        seconds=times,
        buffers=hlo.largest_buffers(report),
    )


def _refused_cost(program: Program, beside: float, seconds: float, error: str) -> ProgramCost:
    """The compiler's own refusal for lack of memory, as a cost; any other failure goes on."""
    said = re.search(
        r"Used ([\d.]+)([KMG]) of|required for HLO temporaries \(([\d.]+)([KMG])\)", error
    )
    if "RESOURCE_EXHAUSTED" not in error or not said:
        raise jax.errors.JaxRuntimeError(error)
    amount, unit = [part for part in said.groups() if part]
    used = float(amount) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit]
    return ProgramCost(
        program.name,
        program.calls,
        seconds,
        0,
        0,
        0,
        used,
        beside,
        0,
        program.useful,
        0,
        [],
        {},
        [],
        said[0],
    )


def roofline_seconds(
    arithmetic: float,
    traffic: float,
    found: Sequence[hlo.Collective],
    chip: Chip | None,
    slices: int,
) -> dict[str, float]:
    """Seconds that each resource needs by itself; empty for a device without public figures."""
    if chip is None:
        return {}
    crossing = lambda c: slices > 1 and "data" in c.axis
    network = sum(chips.transfer_seconds(c.kind, c.size, c.bytes, chip, crossing(c)) for c in found)
    return {
        "compute": arithmetic / chip.flops,
        "memory": traffic / chip.bandwidth,
        "network": network,
    }


# ---- what a person reads -------------------------------------------------------------------------------------------------


def show_plan(plan: StagePlan) -> None:
    gib = lambda n: f"{n / 2**30:.2f}"
    ctx = (
        f"a {plan.chip.name} has {gib(plan.chip.usable)}"
        if plan.chip
        else "no figures for this device"
    )
    mesh = " ".join(f"{k}={v}" for k, v in plan.mesh.items())
    console.print_table(
        f"{plan.name} on {plan.devices} devices ({mesh}), GiB a device; {ctx}",
        ("program", "takes", "returns", "donated", "inside", "beside", "peak", "compiled in s"),
        [(c.name, *map(gib, _sizes(c)), f"{c.compile_seconds:.0f}") for c in plan.costs],
    )
    console.print_table(
        "stays in memory, GiB a device",
        ("what", "size"),
        [(k, gib(v)) for k, v in plan.resident.items()],
    )
    console.print_table(
        "at the largest shapes, one call on one device; seconds are lower bounds",
        ("program", "calls a step", "TFLOP", "GB moved", "compute s", "memory s", "network s"),
        [_speed(c) for c in plan.costs],
    )
    moved = [
        (f"{p.name}: {c.kind}", c.axis, f"{c.bytes / 1e9:.3f}", f"{c.calls:.0f}")
        for p in plan.costs
        for c in p.collectives[:4]
    ]
    console.print_table("largest transfers of a call", ("what", "axis", "GB", "times"), moved)
    if (mfu := plan.mfu()) is not None:
        console.print_message(
            f"a step takes at least {plan.step_seconds():.1f} s; model FLOPs utilisation can not exceed {mfu:.0%}"
        )


def _sizes(c: ProgramCost) -> tuple[float, ...]:
    return c.arguments, c.outputs, c.donated, c.temporaries, c.beside, c.peak


def _speed(c: ProgramCost) -> tuple[str, ...]:
    seconds = [f"{c.seconds[k]:.3f}" if c.seconds else "" for k in ("compute", "memory", "network")]
    return (
        c.name,
        f"{c.calls:.0f}",
        f"{c.arithmetic / 1e12:.2f}",
        f"{c.traffic / 1e9:.1f}",
        *seconds,
    )


def plan_verdict(plan: StagePlan) -> str:
    """ "" where everything fits; else which program lacks how much, and what to change."""
    lines = []
    for c in plan.refused():
        lack = c.peak - plan.chip.usable if plan.chip else 0
        words = f"{plan.name}: {c.name} needs {c.peak / 2**30:.2f} GiB a device"
        words += (
            f", {lack / 2**30:.2f} GiB more than {plan.chip.name} offers"
            if lack > 0
            else f" ({c.over})"
        )
        lines.append(f"{words}; {programs.memory_advice(c.name, plan.resident, plan.mesh)}")
    return "\n".join(lines)


def plan_as_json(plan: StagePlan) -> dict[str, Any]:
    costs = [dataclasses.asdict(c) | {"peak": c.peak, "bound_seconds": c.bound} for c in plan.costs]
    chip = dataclasses.asdict(plan.chip) | {"usable": plan.chip.usable} if plan.chip else None
    return {
        "name": plan.name,
        "devices": plan.devices,
        "mesh": plan.mesh,
        "chip": chip,
        "resident": plan.resident,
        "programs": costs,
        "peak": plan.memory,
        "step_seconds": plan.step_seconds(),
        "mfu_bound": plan.mfu(),
        "fits": not plan.refused(),
    }
