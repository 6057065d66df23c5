"""Describe NVIDIA GPUs to the compiler, so that it compiles for them on a machine without a GPU.

The package `jax[cuda12]` contains the compiler. It takes the figures of a device from the driver,
or from a text such as this module writes. On a GPU it times several kernels for a product and takes
the fastest; here all products are those of cuBLAS.
"""

import dataclasses
import os
import re
from typing import Any

from cptjax.common import chips


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a GPU's driver reports, beside the figures of `chips.CHIPS`."""

    description: str
    compute_capability: int  # the major version
    cores: int  # streaming multiprocessors
    fpus: int  # of a core
    clock: float  # GHz
    l2_cache: int  # bytes, as are the next two
    shared_memory: int  # of a core
    block_shared_memory: int  # that a block can ask for


H100 = Gpu(
    description="NVIDIA H100 80GB HBM3",
    compute_capability=9,
    cores=132,
    fpus=128,
    clock=1.98,
    l2_cache=52_428_800,
    shared_memory=233_472,
    block_shared_memory=232_448,
)
GPUS = {
    "a100": Gpu(
        description="NVIDIA A100-SXM4-80GB",
        compute_capability=8,
        cores=108,
        fpus=64,
        clock=1.41,
        l2_cache=41_943_040,
        shared_memory=167_936,
        block_shared_memory=166_912,
    ),
    "h100": H100,
    "h200": dataclasses.replace(H100, description="NVIDIA H200"),
    "b200": dataclasses.replace(
        H100,
        description="NVIDIA B200",
        compute_capability=10,
        cores=148,
        clock=1.965,
        l2_cache=132_644_864,
    ),
}

MACHINE = 8  # GPUs that NVLink connects; more are several machines

# Load the compiler although there is no driver. It still prints that it found none.
GPU_COMPILER_ENV = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

# A kernel of the compiler's own exists for some shapes only, and nothing can be timed here.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def is_gpu_topology(topology: str | None) -> bool:
    return bool(topology) and topology.split(":")[0].lower() in GPUS


def gpu_devices(topology: str, hosts: int = 1) -> list[Any]:
    """Return the devices of `hosts` machines with the GPUs of a topology each, such as h100:8."""
    from jax.experimental import topologies

    name, _, count = topology.partition(":")
    if not re.fullmatch(r"[1-9]\d{0,2}", count):
        raise ValueError(f"topology {topology!r}: expected a name and a number of GPUs, as h100:8")
    if int(count) > MACHINE:
        raise ValueError(
            f"topology {topology!r}: expected at most {MACHINE} GPUs, those of one machine; for N "
            f"machines give --topology={name}:{MACHINE} --slices=N"
        )
    os.environ.update(GPU_COMPILER_ENV)
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology,
            topology=f"{hosts} x 1 x {count}",
            target_config=target_text(name.lower()),
        )
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"topology {topology!r}: {str(error).splitlines()[0]}; expected the package "
            "jax[cuda12], which contains the compiler"
        ) from None
    return list(description.devices)


def target_text(name: str) -> str:
    """Return the figures of a GPU as the text of a GpuTargetConfigProto."""
    gpu, chip = GPUS[name], chips.CHIPS[name]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": gpu.shared_memory,
        "shared_memory_per_block_optin": gpu.block_shared_memory,
        "threads_per_core_limit": 2048,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": int(chip.memory),
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": gpu.l2_cache,
        "driver_version": '"13.0.0"',
        "runtime_version": '"12.9.0"',
        "compile_time_toolkit_version": '"12.9.0"',
        "dnn_version": '"9.10.0"',
    }
    lines = [f"  {key}: {value}" for key, value in device.items()]
    return "\n".join(
        (
            "gpu_device_info {",
            *lines,
            f"  cuda_compute_capability {{ major: {gpu.compute_capability} }}",
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            "runtime_version { major: 12 minor: 9 }",
            f'device_description_str: "{gpu.description}"',
        )
    )
