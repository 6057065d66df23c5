"""Published figures of accelerators, per device as jax lists them.

FLOPs, memory bandwidth and the memory of TPUs are from the vendors' data sheets; the memory of GPUs
is what their drivers report, of which JAX allocates a share. TPU interconnect is per link and
direction (Google's documentation and "How to scale your model"). A tpu7x device is half a chip; a
v4 device is a whole chip, or half a chip if jax lists its two cores as devices. The interconnect of
a GPU is its NVLink to the switch, in one direction. The share of a device in the data-center
network (DCN) is 25 Gbit/s for v5e, 50 for v4, v5p and tpu7x, 100 for v6e, 200 for an A100 and 400
for other GPUs.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax

# The share of a GPU's memory that JAX allocates. The rest is for CUDA, cuBLAS and NCCL.
GPU_MEMORY_SHARE = 0.92
# Where a user gives another share. JAX refuses both together; the second is the older name.
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


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
        is_tpu = self.name.startswith(("v", "tpu"))
        return self.memory * (0.98 if is_tpu else gpu_memory_share())


GIB, TERA, GIGA = 2.0**30, 1e12, 1e9
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275 * TERA, 1228 * GIGA, 45 * GIGA, 6.25 * GIGA),
        Chip("v5e", 16 * GIB, 197 * TERA, 819 * GIGA, 45 * GIGA, 3.125 * GIGA),
        Chip("v5p", 95 * GIB, 459 * TERA, 2765 * GIGA, 90 * GIGA, 6.25 * GIGA),
        Chip("v6e", 32 * GIB, 918 * TERA, 1640 * GIGA, 90 * GIGA, 12.5 * GIGA),
        Chip("tpu7x", 96 * GIB, 1153.5 * TERA, 3690 * GIGA, 90 * GIGA, 6.25 * GIGA),
        Chip("a100", 85.1e9, 312 * TERA, 2039 * GIGA, 300 * GIGA, 25 * GIGA),
        Chip("h100", 84.9e9, 989 * TERA, 3350 * GIGA, 450 * GIGA, 50 * GIGA),
        Chip("h200", 150.1e9, 989 * TERA, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
        Chip("b200", 191.5e9, 2250 * TERA, 7700 * GIGA, 900 * GIGA, 50 * GIGA),
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
}
# The whole name -> chip. Those of other boards and of parts of a GPU (MIG) contain the same words.
GPU_KINDS = {
    "nvidia b200": "b200",
    "nvidia h200": "h200",
    "nvidia h100 80gb hbm3": "h100",
    "nvidia a100-sxm4-80gb": "a100",
}


def find_chip(kind: str) -> Chip | None:
    """Return the chip of a `device_kind`; None if the table has no such chip (a CPU)."""
    if name := GPU_KINDS.get(kind.lower()):
        return CHIPS[name]
    return next((CHIPS[name] for part, name in DEVICE_KINDS.items() if part in kind.lower()), None)


def chip_of_devices(devices: Sequence[Any]) -> Chip | None:
    """Return the chip of some devices, halved if jax lists its two cores as devices."""
    chip = find_chip(devices[0].device_kind)
    if chip is None or chip.name != "v4" or not any(getattr(d, "core_on_chip", 0) for d in devices):
        return chip
    return dataclasses.replace(
        chip, memory=chip.memory / 2, flops=chip.flops / 2, bandwidth=chip.bandwidth / 2
    )


def gpu_memory_share() -> float:
    """Return the share of a GPU's memory that JAX allocates in a command."""
    name = _given_share()
    if name is None:
        return GPU_MEMORY_SHARE
    try:
        return float(os.environ[name])
    except ValueError:
        raise ValueError(f"{name}={os.environ[name]}: expected a number such as 0.9") from None


def _given_share() -> str | None:
    """Return the variable in which the user gives a share."""
    return next((name for name in SHARE_VARIABLES if os.environ.get(name)), None)


def reserve_gpu_memory() -> None:
    """Let JAX allocate the share of a GPU that plans count with; by itself it takes 75 %."""
    if _given_share() is None:
        os.environ[SHARE_VARIABLES[-1]] = str(GPU_MEMORY_SHARE)


def usable_memory(devices: Sequence[Any]) -> float | None:
    """Return the bytes that a program can use on each of the devices, from the table if it can.

    A plan then finds what a run finds. None if unknown, as on a CPU.
    """
    if chip := chip_of_devices(devices):
        return chip.usable
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def sent_bytes(kind: str, members: int, size: float) -> float:
    """Return the bytes that each member of a collective sends; `size` is that of the whole array.

    On a ring this is (members - 1) / members of the array, twice for an all-reduce. A permutation
    sends its array to one neighbour. The size of an all-to-all is that of a member's own part.
    """
    if kind == "collective-permute":
        return size
    return size * (members - 1) / members * (2.0 if kind == "all-reduce" else 1.0)


def transfer_seconds(
    kind: str, members: int, size: float, chip: Chip, slices: int = 1, links: int = 2
) -> float:
    """Return the seconds of a collective on rings that use `links` links of a device.

    A permutation uses one link. Of members on several `slices`, those of a slice share what it
    exchanges with the others through the data-center network, beside the transfers within it.
    """
    if slices > 1:
        across, within = sent_bytes(kind, slices, size), members // slices
        if kind in ("all-gather", "all-reduce", "reduce-scatter"):
            across /= within
        return max(across / chip.dcn, transfer_seconds(kind, within, size, chip, links=links))
    sent = sent_bytes(kind, members, size)
    return sent / (chip.link * (1 if kind == "collective-permute" else links))
