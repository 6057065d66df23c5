"""Published figures of accelerators, per device as jax lists them.

Memory, FLOPs and memory bandwidth are from the vendors' data sheets. TPU interconnect is per link
and direction (Google's documentation and "How to scale your model"): a ring along one mesh axis
uses one link in each direction. A tpu7x device is half a chip; a v4 device is a whole chip, or half
a chip if jax lists its two cores as devices. The data-center network (DCN) has 200 Gbit/s for a
host of four TPU devices, and 400 Gbit/s for a GPU.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    memory: float  # bytes
    flops: float  # bfloat16, per second
    bandwidth: float  # bytes of memory per second
    link: float  # bytes per second to a neighbour, one direction
    dcn: float  # bytes per second to another slice or host

    @property
    def usable(self) -> float:
        """The memory that a program can use; the runtime reserves the rest."""
        return self.memory * (0.98 if self.name.startswith(("v", "tpu")) else 0.95)


GIB, TERA, GIGA = 2.0**30, 1e12, 1e9
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275 * TERA, 1228 * GIGA, 45 * GIGA, 6.25 * GIGA),
        Chip("v5e", 16 * GIB, 197 * TERA, 819 * GIGA, 45 * GIGA, 6.25 * GIGA),
        Chip("v5p", 95 * GIB, 459 * TERA, 2765 * GIGA, 90 * GIGA, 6.25 * GIGA),
        Chip("v6e", 32 * GIB, 918 * TERA, 1640 * GIGA, 90 * GIGA, 6.25 * GIGA),
        Chip("tpu7x", 96 * GIB, 1153.5 * TERA, 3690 * GIGA, 90 * GIGA, 6.25 * GIGA),
        Chip("h100", 80e9, 989 * TERA, 3350 * GIGA, 450 * GIGA, 50 * GIGA),
        Chip("h200", 141e9, 989 * TERA, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
    )
}
DEVICE_KINDS = {  # part of a device's name -> chip; the first match is used
    "tpu v4": "v4",
    "tpu v5 lite": "v5e",
    "tpu v5e": "v5e",
    "tpu v5p": "v5p",
    "tpu v5": "v5p",
    "tpu v6 lite": "v6e",
    "tpu v6e": "v6e",
    "tpu7x": "tpu7x",
    "tpu v7": "tpu7x",
    "h200": "h200",
    "h100": "h100",
}


def find_chip(kind: str) -> Chip | None:
    """Return the chip of a `device_kind`; None if the table has no such chip (a CPU)."""
    return next((CHIPS[name] for part, name in DEVICE_KINDS.items() if part in kind.lower()), None)


def chip_of_devices(devices: Sequence[Any]) -> Chip | None:
    """Return the chip of some devices, halved if jax lists its two cores as devices."""
    chip = find_chip(devices[0].device_kind)
    if chip is None or chip.name != "v4" or not any(getattr(d, "core_on_chip", 0) for d in devices):
        return chip
    return dataclasses.replace(
        chip, memory=chip.memory / 2, flops=chip.flops / 2, bandwidth=chip.bandwidth / 2
    )


def transfer_seconds(kind: str, members: int, size: float, chip: Chip, slow: bool) -> float:
    """Return the seconds of a collective on a ring.

    Each member sends (members - 1) / members of the array, twice for an all-reduce. A permutation
    sends its array to one neighbour. `size` is the number of bytes of the whole array; a `slow`
    collective crosses slices.
    """
    if kind == "collective-permute":
        return size / (chip.dcn if slow else chip.link)
    bandwidth = chip.dcn if slow else 2 * chip.link
    times = 1.0
    if kind == "all-reduce":
        times = 2.0
    elif kind == "all-to-all" and not slow:
        times = 0.25
    return size * (members - 1) / members * times / bandwidth
