"""The least seconds of a program, in the order in which the compiler schedules its instructions.

A device runs one instruction after the other. Each takes the longest of its arithmetic, its memory
traffic and, if it transfers data, its transfer. Copies and transfers that have a start and an end
run beside the instructions between them; only the rest of their time is waited for. So a transfer
that the next product needs adds to the time of the products, and one that overlaps does not. A
transfer of a sparse core has no operand at its start, which only loads its code: it begins at the
update that hands the data over.
"""

import collections
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import Mesh

from cptjax.common import chips
from cptjax.common.chips import Chip
from cptjax.planning import hlo, hlo_costs

MEMORY = "memory"


class Timeline:
    """The time of one computation, with queues of work that is done beside its instructions.

    Each queue works off its entries in order while instructions leave its resource free.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.queued: dict[str, float] = collections.defaultdict(float)
        self.done: dict[str, float] = collections.defaultdict(float)

    def run(self, **needs: float) -> None:
        """Run an instruction that needs each resource for so many seconds."""
        self.advance(max(needs.values(), default=0.0), needs)

    def advance(self, seconds: float, busy: Mapping[str, float] = MappingProxyType({})) -> None:
        self.seconds += seconds
        for queue, total in self.queued.items():
            free = seconds - busy.get(queue, 0.0)
            self.done[queue] = min(total, self.done[queue] + free)

    def start(self, queue: str, seconds: float) -> tuple[str, float]:
        """Queue work; return what `wait` takes."""
        self.queued[queue] += seconds
        return queue, self.queued[queue]

    def wait(self, queue: str, until: float) -> None:
        """Wait for queued work."""
        self.advance(max(0.0, until - self.done[queue]))

    def wait_for_all(self, queue: str) -> None:
        self.wait(queue, self.queued[queue])


@dataclasses.dataclass(frozen=True)
class ScheduledProgram:
    """A compiled program, and what decides how long its instructions take."""

    computations: hlo.Computations
    mesh: Mesh
    chip: Chip
    slices: int

    def seconds_of(self, name: str, dynamic: float) -> float:
        """Return the seconds of a computation; loops without known end run `dynamic` times."""
        time, started, waiting = Timeline(), {}, {}
        instructions = self.computations[name]
        shapes = hlo_costs.instruction_shapes(instructions)
        chains: set[str] = set()
        for i in instructions:
            if i.op in ("while", "conditional", "call"):
                time.advance(self._inner_seconds(i, dynamic))
            elif i.op.endswith("-start") or i.op in ("send", "recv"):
                parts = self._parts(i, shapes, name)
                if i.op == "async-start" and not i.operands:
                    waiting[i.name] = parts
                else:
                    started[i.name] = [time.start(*part) for part in parts]
            elif i.op.endswith("-done"):
                for part in started.get(i.operands[0], ()):
                    time.wait(*part)
            elif i.op.endswith("-update"):
                parts = waiting.pop(i.operands[0], [])
                begun = [time.start(*part) for part in parts]
                started[i.name] = [*started.get(i.operands[0], []), *begun]
            else:
                self._run_instruction(i, shapes, name, time, chains)
        for queue in list(time.queued):
            time.wait_for_all(queue)
        return time.seconds

    def _inner_seconds(self, i: hlo.Instruction, dynamic: float) -> float:
        """Return the seconds of a loop, a conditional or a call, weighted as in `run_counts`."""
        called, times, inside = hlo.called_computations(i), 1.0, dynamic
        if i.op == "conditional":
            times = 1 / len(called)
        elif i.op == "while":
            trips = hlo.loop_trips(i, self.computations)
            times, inside = (dynamic, 1.0) if trips is None else (trips, dynamic)
        return times * sum(self.seconds_of(name, inside) for name in called)

    def _parts(
        self, i: hlo.Instruction, shapes: dict[str, str], name: str
    ) -> list[tuple[str, float]]:
        """Return the queues that an asynchronous instruction uses, and for how long."""
        transfers = self._transfers(i, name)
        if not transfers:
            moved = hlo_costs.moved_bytes(i, shapes, self.computations)
            return [(MEMORY, moved / self.chip.bandwidth)]
        return [(_queue(t), self._transfer_seconds(t)) for t in transfers]

    def _run_instruction(
        self,
        i: hlo.Instruction,
        shapes: dict[str, str],
        name: str,
        time: Timeline,
        chains: set[str],
    ) -> None:
        needs = {
            "compute": hlo_costs.fused_flops(i, shapes, self.computations) / self.chip.flops,
            MEMORY: hlo_costs.moved_bytes(i, shapes, self.computations) / self.chip.bandwidth,
        }
        for t in self._transfers(i, name):
            if t.chain:  # it runs beside the products of its chain
                if t.chain not in chains:
                    time.start(_queue(t), self._transfer_seconds(t))
                chains.add(t.chain)
            else:
                time.wait_for_all(_queue(t))
                needs[_queue(t)] = needs.get(_queue(t), 0.0) + self._transfer_seconds(t)
        time.run(**needs)

    def _transfers(self, i: hlo.Instruction, name: str) -> list[hlo.Transfer]:
        """Return the transfers of an instruction and of what is fused into it."""
        own = hlo.find_transfer(i, name, self.mesh, self.slices)
        inner = [
            t
            for called in hlo.called_computations(i)
            for j in self.computations.get(called, ())
            for t in self._transfers(j, called)
        ]
        return [*([own] if own else []), *inner]

    def _transfer_seconds(self, t: hlo.Transfer) -> float:
        return chips.transfer_seconds(t.kind, t.members, t.bytes, self.chip, t.slices, t.links)


def _queue(t: hlo.Transfer) -> str:
    """Return the links that a transfer uses.

    Permutations in both directions use different ones, and so do transfers between slices.
    """
    between = " between slices" if t.slices > 1 else ""
    return f"{t.axis}{between} backwards" if t.backwards else f"{t.axis}{between}"


def scheduled_seconds(
    text: str,
    mesh: Mesh,
    chip: Chip,
    slices: int = 1,
    dynamic: float = 1.0,
) -> float:
    """Return the least seconds of a program; see the module's description."""
    computations, entry = hlo.parse_hlo(text)
    program = ScheduledProgram(computations, mesh, chip, slices)
    return program.seconds_of(entry, dynamic)
