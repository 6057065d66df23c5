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

from cptjax import ahead, chips, console, hlo, hlo_costs, programs, settings
from cptjax.ahead import Short
from cptjax.chips import Chip
from cptjax.programs import Program
from cptjax.sites import Site


@dataclasses.dataclass(frozen=True)
class Cost:
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
class Plan:
    """All programs of a config on one slice."""

    name: str
    devices: int
    mesh: dict[str, int]
    chip: Chip | None
    resident: dict[str, float]  # bytes a device
    costs: list[Cost]

    @property
    def memory(self) -> float:
        """Bytes a device at the worst moment."""
        return max(c.peak for c in self.costs)

    def refused(self) -> list[Cost]:
        """Programs that do not fit."""
        return [c for c in self.costs if c.over or (self.chip and c.peak > self.chip.usable)]

    def step_seconds(self) -> float:
        return sum(c.bound * c.calls for c in self.costs)

    def mfu(self) -> float | None:
        """The largest possible share of the chips' arithmetic that goes into the model, over one step."""
        if self.chip is None or not self.step_seconds():
            return None
        return sum(c.useful * c.calls for c in self.costs) / (self.devices * self.chip.flops * self.step_seconds())


def make(config: Any, topology: str | None = None, slices: int = 1, thorough: bool = False) -> list[Plan]:
    """A plan for every different run that a config describes (arms that differ in their programs); `thorough`: machine code too."""
    devices, plans, seen = ahead.devices_of(topology, slices), [], set()
    for arm, single in settings.variants(config):
        for stage in settings.stages(single):
            key = json.dumps({k: v for k, v in settings.plain(stage.config).items() if k in programs.SECTIONS}, sort_keys=True)
            if key not in seen:
                seen.add(key)
                name = f"{arm or single.name}" + (f" stage {stage.number}" if stage.number > 1 else "")
                plans.append(of_stage(name, stage.config, devices, topology, slices, thorough))
    return plans


def of_stage(name: str, config: Any, devices: Sequence[Any], topology: str | None, slices: int = 1, thorough: bool = False) -> Plan:
    """The programs of one stage's settings, compiled one after the other."""
    site = ahead.site_of(config, devices, slices)
    kind = devices[0].device_kind
    chip = chips.of(devices)
    short = Short(config, topology, slices) if topology and not thorough else None
    costs: list[Cost] = []
    made: dict[str, Any] = {}
    for program in programs.of(site):
        with console.waiting(f"{name}: compile {program.name} for {len(devices)} x {kind}"):
            costs.append(measured(program, site, chip, made, short, costs))
        if costs[-1].over:
            break  # later programs may need what it returns
    return Plan(name, len(devices), dict(site.mesh.shape), chip, {k: per_device(v) for k, v in site.pieces.items()}, costs)


def memory(config: Any, topology: str | None = None, slices: int = 1) -> float:
    """Bytes that a device needs at the worst moment of a run; compiles every program."""
    return max(plan.memory for plan in make(config, topology, slices))


def resident(config: Any, devices: Sequence[Any] | None = None) -> dict[str, float]:
    """Bytes a device of what stays: trained weights, frozen weights, optimiser, reference; compiles nothing."""
    stage = settings.stages(config)[0]
    return {k: per_device(v) for k, v in ahead.site_of(stage.config, devices or jax.devices(), 1).pieces.items()}


def per_device(tree: Any) -> float:
    """Bytes of a tree's share on one device."""
    part = lambda x: x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return float(sum(math.prod(part(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def measured(
    program: Program, site: Site, chip: Chip | None, made: dict[str, Any], short: Short | None, before: Sequence[Cost] = ()
) -> Cost:  # fmt: skip
    """The cost of a program, after the costs of those before it; what it returns is added to `made` where it is compiled to the end."""
    beside = sum(per_device(tree) for name, tree in site.pieces.items() if name not in program.holds)
    beside += sum(c.outputs for name in program.keeps for c in before if c.name == name)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            sizes = short.compile(program, folder) if short else ahead.finish(program, site, made, folder)
        except jax.errors.JaxRuntimeError as error:
            return _refused(program, beside, time.monotonic() - started, str(error))
        text, report = hlo.written(folder)
    text, seconds = sizes.pop("text", text), time.monotonic() - started
    found = hlo.collectives(text, site.mesh, program.turns)
    arithmetic, traffic = hlo_costs.arithmetic(text, program.turns), hlo_costs.traffic(text, program.turns)
    times = roofline(arithmetic, traffic, found, chip, site.slices)
    return Cost(
        program.name, program.calls, seconds, **sizes, beside=beside, arithmetic=arithmetic, useful=program.useful, traffic=traffic,
        collectives=found, seconds=times, buffers=hlo.largest(report),
    )  # fmt: skip


def _refused(program: Program, beside: float, seconds: float, error: str) -> Cost:
    """The compiler's own refusal for lack of memory, as a cost; any other failure goes on."""
    said = re.search(r"Used ([\d.]+)([KMG]) of|required for HLO temporaries \(([\d.]+)([KMG])\)", error)
    if "RESOURCE_EXHAUSTED" not in error or not said:
        raise jax.errors.JaxRuntimeError(error)
    amount, unit = [part for part in said.groups() if part]
    used = float(amount) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit]
    return Cost(program.name, program.calls, seconds, 0, 0, 0, used, beside, 0, program.useful, 0, [], {}, [], said[0])


def roofline(arithmetic: float, traffic: float, found: Sequence[hlo.Collective], chip: Chip | None, slices: int) -> dict[str, float]:
    """Seconds that each resource needs by itself; empty for a device without public figures."""
    if chip is None:
        return {}
    crossing = lambda c: slices > 1 and "data" in c.axis
    network = sum(chips.transfer_seconds(c.kind, c.size, c.bytes, chip, crossing(c)) for c in found)
    return {"compute": arithmetic / chip.flops, "memory": traffic / chip.bandwidth, "network": network}


# ---- what a person reads -------------------------------------------------------------------------------------------------


def show(plan: Plan) -> None:
    gib = lambda n: f"{n / 2**30:.2f}"
    room = f"a {plan.chip.name} has {gib(plan.chip.usable)}" if plan.chip else "no figures for this device"
    mesh = " ".join(f"{k}={v}" for k, v in plan.mesh.items())
    console.table(
        f"{plan.name} on {plan.devices} devices ({mesh}), GiB a device; {room}",
        ("program", "takes", "returns", "donated", "inside", "beside", "peak", "compiled in s"),
        [(c.name, *map(gib, _sizes(c)), f"{c.compile_seconds:.0f}") for c in plan.costs],
    )
    console.table("stays in memory, GiB a device", ("what", "size"), [(k, gib(v)) for k, v in plan.resident.items()])
    console.table(
        "at the largest shapes, one call on one device; seconds are lower bounds",
        ("program", "calls a step", "TFLOP", "GB moved", "compute s", "memory s", "network s"),
        [_speed(c) for c in plan.costs],
    )
    moved = [(f"{p.name}: {c.kind}", c.axis, f"{c.bytes / 1e9:.3f}", f"{c.calls:.0f}") for p in plan.costs for c in p.collectives[:4]]
    console.table("largest transfers of a call", ("what", "axis", "GB", "times"), moved)
    if (mfu := plan.mfu()) is not None:
        console.say(f"a step takes at least {plan.step_seconds():.1f} s; model FLOPs utilisation can not exceed {mfu:.0%}")


def _sizes(c: Cost) -> tuple[float, ...]:
    return c.arguments, c.outputs, c.donated, c.temporaries, c.beside, c.peak


def _speed(c: Cost) -> tuple[str, ...]:
    seconds = [f"{c.seconds[k]:.3f}" if c.seconds else "" for k in ("compute", "memory", "network")]
    return (c.name, f"{c.calls:.0f}", f"{c.arithmetic / 1e12:.2f}", f"{c.traffic / 1e9:.1f}", *seconds)


def verdict(plan: Plan) -> str:
    """ "" where everything fits; else which program lacks how much, and what to change."""
    lines = []
    for c in plan.refused():
        lack = c.peak - plan.chip.usable if plan.chip else 0
        words = f"{plan.name}: {c.name} needs {c.peak / 2**30:.2f} GiB a device"
        words += f", {lack / 2**30:.2f} GiB more than {plan.chip.name} offers" if lack > 0 else f" ({c.over})"
        lines.append(f"{words}; {programs.advice(c.name, plan.resident, plan.mesh)}")
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    costs = [dataclasses.asdict(c) | {"peak": c.peak, "bound_seconds": c.bound} for c in plan.costs]
    chip = dataclasses.asdict(plan.chip) | {"usable": plan.chip.usable} if plan.chip else None
    return {
        "name": plan.name, "devices": plan.devices, "mesh": plan.mesh, "chip": chip, "resident": plan.resident, "programs": costs,
        "peak": plan.memory, "step_seconds": plan.step_seconds(), "mfu_bound": plan.mfu(), "fits": not plan.refused(),
    }  # fmt: skip
