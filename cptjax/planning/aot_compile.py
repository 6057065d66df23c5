"""Compile programs ahead of time, for devices that need not exist."""

import dataclasses
import multiprocessing
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.common.program import Program
from cptjax.config import config_to_dict
from cptjax.planning import gpu_topology, hlo, programs

# Run the TPU compiler on a machine without a TPU: do not search for one, allow several processes,
# write no log.
TPU_COMPILER_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def topology_devices(topology: str | None, slices: int = 1) -> list[Any]:
    """Return the devices of a TPU slice (v5p:4x4x4), of GPUs (h100:8), or of this machine.

    With `slices`, there are so many of these slices, or machines with GPUs.
    """
    if not topology:
        if slices > 1:
            raise ValueError(f"--slices={slices} needs --topology")
        return list(jax.devices())
    if gpu_topology.is_gpu_topology(topology):
        return gpu_topology.gpu_devices(topology, slices)
    if not re.fullmatch(r"[\w-]+:[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", topology):  # or libtpu aborts
        raise ValueError(
            f"topology {topology!r}: expected a name like v5e:4x4, v5p:4x4x4 or h100:8"
        )
    from jax.experimental import topologies

    os.environ.update(TPU_COMPILER_ENV)
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except Exception as error:  # jaxlib raises several kinds, each with its reason
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"topology {topology!r}: {reason}; expected the package libtpu and a name like v5e:4x4 "
            f"or v5p:4x4x4, or GPUs ({', '.join(gpu_topology.GPUS)}) like h100:8"
        ) from None
    return list(description.devices)


def planned_mesh(config: ConfigDict, devices: Sequence[Any], slices: int = 1) -> Mesh:
    """Return the mesh of a config over some devices, with at least the slices of the config."""
    settings = dict(config.mesh) | {"slices": max(slices, config.mesh.slices)}
    return sharding.make_mesh(**settings, devices=list(devices))


def compile_program(
    program: Program, mesh: Mesh, outputs: dict[str, Any], folder: str
) -> dict[str, Any]:
    """Compile to machine code, and return the sizes that the runtime reports.

    The abstract results of the program are added to `outputs`.
    """
    platform = mesh.devices.flat[0].platform
    # For other devices than CPUs the compiler writes its text and its list of buffers. jax cannot
    # read programs for TPUs that use the sparse core.
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if platform != "cpu" else {}
    if platform == "gpu":
        options |= gpu_topology.COMPILER_OPTIONS
    with jax.set_mesh(program.mesh or mesh):
        lowered = program.lower(outputs)
        compiled = lowered.compile(options)
    outputs[program.name] = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        lowered.out_info,
        compiled.output_shardings,
    )
    analysis = compiled.memory_analysis()
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "donated": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    return sizes | {"text": compiled.as_text()} if platform == "cpu" else sizes


@dataclasses.dataclass(frozen=True)
class SubprocessCompiler:
    """Compile in another process, and end it as soon as buffers are assigned.

    Memory, transfers and arithmetic are known at that point. Generating the machine code would take
    ten times as long, and nothing runs it.
    """

    config: ConfigDict
    topology: str
    slices: int

    def compile(self, program: Program, folder: str) -> dict[str, float]:
        """Return the sizes of a program's buffers, and leave the compiler's texts in `folder`."""
        # Children are forks of a server that has imported this module, which takes seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        args = (config_to_dict(self.config), self.topology, self.slices, program.name, folder)
        child = context.Process(target=_compile_in_child, args=args, daemon=True)
        child.start()
        try:
            while not (sizes := hlo.read_buffer_sizes(f"{folder}/last")) and child.is_alive():
                time.sleep(0.2)
            sizes = sizes or hlo.read_buffer_sizes(f"{folder}/last")
        finally:
            child.kill()
            child.join()
        if not sizes:
            error = Path(folder, "error")
            raise jax.errors.JaxRuntimeError(
                error.read_text()
                if error.is_file()
                else f"the compiler ended without a message on {program.name}"
            )
        for path in Path(folder, "last").iterdir():
            path.rename(Path(folder) / path.name)
        return sizes


def _compile_in_child(
    config: dict[str, Any], topology: str, slices: int, name: str, folder: str
) -> None:
    """Compile a program in the child process, after the programs whose results it takes."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    settings = ConfigDict(config)
    mesh = planned_mesh(settings, topology_devices(topology, slices), slices)
    by_name = {p.name: p for p in programs.stage_programs(programs.planned_stage(settings, mesh))}
    outputs: dict[str, Any] = {}

    def compile_needs(program: Program) -> None:
        for earlier in program.needs:
            if earlier not in outputs:
                compile_needs(by_name[earlier])
                compile_program(by_name[earlier], mesh, outputs, f"{folder}/before")

    try:
        compile_needs(by_name[name])
        compile_program(by_name[name], mesh, outputs, f"{folder}/last")
    except Exception as error:  # the parent reads this file and raises the error
        Path(folder, "error").write_text(f"{type(error).__name__}: {error}")
