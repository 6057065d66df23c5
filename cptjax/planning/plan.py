"""Plan a run on a slice: memory, FLOPs and transfers of every program.

A program's peak is

    arguments + outputs - donated + temporaries + other arrays that stay in memory

where the others are for example the optimizer's state during rollouts, the reference model during
the update, or the micro-batches that wait for their turn. Seconds are a lower bound: instructions
run one after the other as the compiler has scheduled them, each as fast as its slowest resource
allows (see timeline.py).
"""

import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.common import chips, console
from cptjax.common.chips import Chip
from cptjax.common.config_checks import check_config
from cptjax.common.program import Program
from cptjax.common.runs import expand_runs
from cptjax.config import config_to_dict, resolve_stages
from cptjax.planning import aot_compile, hlo, hlo_costs, memory, programs, timeline
from cptjax.planning.aot_compile import SubprocessCompiler
from cptjax.training.programs import AbstractStage


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """The cost of one program on one device."""

    name: str
    calls: float  # in one step
    compile_seconds: float
    arguments: float  # bytes, as are the next four
    outputs: float
    donated: float
    temporaries: float
    in_memory: float  # other arrays that stay in memory
    arithmetic: float  # floating-point operations of one call, including recomputation
    useful: float  # floating-point operations of the model by formula, all devices together
    traffic: float  # bytes from and to memory
    collectives: list[hlo.Collective]
    seconds: dict[str, float]  # compute, memory, network by themselves, and in all; {} if unknown
    buffers: list[tuple[float, str]]  # the largest temporaries
    over: str = ""  # the compiler's message if the program needs more memory than there is

    @property
    def peak(self) -> float:
        return self.arguments + self.outputs - self.donated + self.temporaries + self.in_memory

    @property
    def bound(self) -> float:
        """A lower bound of the seconds of a call."""
        return self.seconds.get("in all", 0.0)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a call."""
        return sum(chips.sent_bytes(c.kind, c.size, c.bytes) for c in self.collectives)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """All programs of a stage on one slice."""

    name: str
    devices: int
    mesh: dict[str, int]
    chip: Chip | None
    resident: dict[str, float]  # bytes a device
    costs: list[ProgramCost]

    @property
    def peak(self) -> float:
        """The most bytes that a device needs at any time."""
        return max(c.peak for c in self.costs)

    def refused(self) -> list[ProgramCost]:
        """Return the programs that do not fit."""
        return [c for c in self.costs if c.over or (self.chip and c.peak > self.chip.usable)]

    def step_seconds(self) -> float:
        return sum(c.bound * c.calls for c in self.costs)

    def mfu(self) -> float | None:
        """Return an upper bound of the model FLOPs utilisation of a step that can run."""
        if self.chip is None or not self.step_seconds() or self.refused():
            return None
        useful = sum(c.useful * c.calls for c in self.costs)
        return useful / (self.devices * self.chip.flops * self.step_seconds())


def make_plans(
    config: ConfigDict, topology: str | None = None, slices: int = 1, thorough: bool = False
) -> list[StagePlan]:
    """Return the plans of the stages of all arms; stages with equal programs are planned once.

    `thorough` compiles to machine code.
    """
    check_config(config)
    devices = aot_compile.topology_devices(topology, slices)
    plans, planned = [], set()
    for arm, single in expand_runs(config):
        for stage in resolve_stages(single):
            settings = config_to_dict(stage.config)
            key = json.dumps(
                {name: settings[name] for name in programs.PROGRAM_SECTIONS}, sort_keys=True
            )
            if key in planned:
                continue
            planned.add(key)
            name = arm or single.name
            name += f" stage {stage.number}" if stage.number > 1 else ""
            try:
                plans.append(plan_stage(name, stage.config, devices, topology, slices, thorough))
            except RuntimeError as error:  # attention asks cuDNN for its version
                if not str(error).startswith("cuDNN"):
                    raise
                raise ValueError(
                    f"{error} Expected all packages of jax[cuda12], which contain cuDNN; install "
                    "them, or set model.attention='xla'"
                ) from None
    return plans


def plan_stage(
    name: str,
    config: ConfigDict,
    devices: Sequence[Any],
    topology: str | None,
    slices: int = 1,
    thorough: bool = False,
) -> StagePlan:
    """Compile the programs of one stage, one after the other."""
    mesh = aot_compile.planned_mesh(config, devices, slices)
    stage = programs.planned_stage(config, mesh)
    chip, kind = chips.chip_of_devices(devices), devices[0].device_kind
    # Machine code for a GPU takes less than a minute.
    short = topology and not thorough and devices[0].platform == "tpu"
    compiler = SubprocessCompiler(config, topology, slices) if short else None
    costs: list[ProgramCost] = []
    outputs: dict[str, Any] = {}
    slices = max(slices, config.mesh.slices)
    for program in programs.stage_programs(stage):
        with console.show_waiting(f"{name}: compile {program.name} for {len(devices)} x {kind}"):
            costs.append(program_cost(program, stage, chip, outputs, compiler, costs, slices))
        if costs[-1].over:
            break  # later programs may need its results
    return StagePlan(
        name, len(devices), dict(mesh.shape), chip, memory.resident_bytes(stage), costs
    )


def program_cost(
    program: Program,
    stage: AbstractStage,
    chip: Chip | None,
    outputs: dict[str, Any],
    compiler: SubprocessCompiler | None,
    earlier: Sequence[ProgramCost] = (),
    slices: int = 1,
) -> ProgramCost:
    """Return the cost of a program that runs after the `earlier` ones.

    Without a `compiler`, it is compiled to machine code, and its abstract results are added to
    `outputs`.
    """
    resident = memory.resident_bytes(stage, program.args, program.not_loaded)
    in_memory = sum(resident.values())
    in_memory += sum(c.outputs for name in program.kept for c in earlier if c.name == name)
    in_memory += sharding.bytes_per_device(program.others)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if compiler:
                sizes = compiler.compile(program, folder)
            else:
                sizes = aot_compile.compile_program(program, stage.mesh, outputs, folder)
        except jax.errors.JaxRuntimeError as error:
            return refused_cost(program, in_memory, time.monotonic() - started, str(error))
        text, report = hlo.read_compiler_dump(folder)
    text, seconds = sizes.pop("text", text), time.monotonic() - started
    mesh = program.mesh or stage.mesh
    collectives = hlo.find_collectives(text, mesh, program.loop_trips, slices)
    arithmetic = hlo_costs.count_flops(text, program.loop_trips)
    traffic = hlo_costs.count_memory_traffic(text, program.loop_trips)
    bounds = roofline_seconds(arithmetic, traffic, collectives, chip)
    if chip is not None:
        bounds["in all"] = timeline.scheduled_seconds(text, mesh, chip, slices, program.loop_trips)
    return ProgramCost(
        program.name,
        program.calls,
        seconds,
        **sizes,
        in_memory=in_memory,
        arithmetic=arithmetic,
        useful=program.flops,
        traffic=traffic,
        collectives=collectives,
        seconds=bounds,
        buffers=hlo.largest_buffers(report),
    )


def refused_cost(program: Program, in_memory: float, seconds: float, error: str) -> ProgramCost:
    """Return the cost of a program that the compiler refused for lack of memory.

    Any other error is raised again.
    """
    refusal = re.search(
        r"Used ([\d.]+)([KMG]) of|required for HLO temporaries \(([\d.]+)([KMG])\)", error
    )
    if "RESOURCE_EXHAUSTED" not in error or not refusal:
        raise jax.errors.JaxRuntimeError(error)
    amount, unit = [part for part in refusal.groups() if part]
    return ProgramCost(
        program.name,
        program.calls,
        seconds,
        arguments=0,
        outputs=0,
        donated=0,
        temporaries=float(amount) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit],
        in_memory=in_memory,
        arithmetic=0,
        useful=program.flops,
        traffic=0,
        collectives=[],
        seconds={},
        buffers=[],
        over=refusal[0],
    )


def roofline_seconds(
    arithmetic: float,
    traffic: float,
    collectives: Sequence[hlo.Collective],
    chip: Chip | None,
) -> dict[str, float]:
    """Return the seconds that each resource takes by itself; {} for a chip without figures."""
    if chip is None:
        return {}
    network = sum(
        chips.transfer_seconds(c.kind, c.size, c.bytes, chip, c.slices, c.links)
        for c in collectives
    )
    return {
        "compute": arithmetic / chip.flops,
        "memory": traffic / chip.bandwidth,
        "network": network,
    }


# ---- tables, verdict, JSON -----------------------------------------------------------------------


RESOURCES = ("compute", "memory", "network", "in all")


def show_plan(plan: StagePlan) -> None:
    """Print the tables of a plan."""
    limit = (
        f"a {plan.chip.name} has {_gib(plan.chip.usable)}"
        if plan.chip
        else "no figures for this device"
    )
    mesh = " ".join(f"{k}={v}" for k, v in plan.mesh.items())
    console.print_table(
        f"{plan.name} on {plan.devices} devices ({mesh}), GiB a device; {limit}",
        ("program", "takes", "returns", "donated", "inside", "in memory", "peak", "compiled in s"),
        [_memory_row(c) for c in plan.costs],
    )
    console.print_table(
        "stays in memory, GiB a device",
        ("what", "size"),
        [(name, _gib(size)) for name, size in plan.resident.items()],
    )
    console.print_table(
        "at the largest shapes, one call on one device; seconds are lower bounds",
        ("program", "calls a step", "TFLOP", "GB moved", *(f"{name} s" for name in RESOURCES)),
        [_speed_row(c) for c in plan.costs],
    )
    transfers = [
        (f"{p.name}: {c.kind}", c.axis, f"{c.bytes / 1e9:.3f}", f"{c.calls:.0f}")
        for p in plan.costs
        for c in p.collectives[:4]
    ]
    console.print_table("largest transfers of a call", ("what", "axis", "GB", "times"), transfers)
    if (mfu := plan.mfu()) is not None:
        console.print_message(
            f"at the largest shapes a step takes at least {plan.step_seconds():.2f} s, and model "
            f"FLOPs utilisation cannot exceed {mfu:.0%}"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _memory_row(c: ProgramCost) -> tuple[str, ...]:
    sizes = (c.arguments, c.outputs, c.donated, c.temporaries, c.in_memory, c.peak)
    return (c.name, *map(_gib, sizes), f"{c.compile_seconds:.0f}")


def _speed_row(c: ProgramCost) -> tuple[str, ...]:
    seconds = [f"{c.seconds[k]:.3f}" if c.seconds else "" for k in RESOURCES]
    return (
        c.name,
        f"{c.calls:.0f}",
        f"{c.arithmetic / 1e12:.2f}",
        f"{c.traffic / 1e9:.1f}",
        *seconds,
    )


def plan_verdict(plan: StagePlan) -> str:
    """Return "" if everything fits; else what each program lacks, and what to change."""
    lines = []
    for c in plan.refused():
        lack = c.peak - plan.chip.usable if plan.chip else 0
        reason = (
            f", {_gib(lack)} GiB more than {plan.chip.name} offers" if lack > 0 else f" ({c.over})"
        )
        advice = programs.memory_advice(c.name, plan.resident, plan.mesh)
        lines.append(f"{plan.name}: {c.name} needs {_gib(c.peak)} GiB a device{reason}; {advice}")
    return "\n".join(lines)


def extra_values(c: ProgramCost) -> dict[str, float]:
    return {"peak": c.peak, "bound_seconds": c.bound, "sent_bytes": c.sent}


def plan_as_json(plan: StagePlan) -> dict[str, Any]:
    """Return a plan as JSON values."""
    costs = [dataclasses.asdict(c) | extra_values(c) for c in plan.costs]
    chip = dataclasses.asdict(plan.chip) | {"usable": plan.chip.usable} if plan.chip else None
    return {
        "name": plan.name,
        "devices": plan.devices,
        "mesh": plan.mesh,
        "chip": chip,
        "resident": plan.resident,
        "programs": costs,
        "peak": plan.peak,
        "step_seconds": plan.step_seconds(),
        "mfu_bound": plan.mfu(),
        "fits": not plan.refused(),
    }
