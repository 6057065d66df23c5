"""Compiling ahead of time: for devices that need not be here, to the end or only until buffers are assigned."""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.config import config_to_dict
from cptjax.planning import hlo, programs, stage_shapes
from cptjax.planning.programs import Program
from cptjax.planning.stage_shapes import StageShapes

TPU_COMPILER_ENV = {  # the TPU compiler without a TPU: no look for one, several processes at once, no log of what is missing
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
    """The devices of a TPU slice by name (v5p:4x4x4), or those of this machine."""
    if not topology:
        if slices > 1:
            raise ValueError(f"--slices={slices} needs --topology")
        return list(jax.devices())
    from jax.experimental import topologies

    os.environ.update(TPU_COMPILER_ENV)
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:  # jaxlib raises several kinds, each with its reason
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"topology {topology!r}: {reason}; expected the package libtpu and a name like v5e:4x4 or v5p:4x4x4"
        ) from None
    return list(found.devices)


def shapes_on_devices(config: Any, devices: Sequence[Any], slices: int) -> StageShapes:
    slices = max(slices, config.mesh.slices)
    return stage_shapes.make_stage_shapes(
        config,
        sharding.make_mesh(**(dict(config.mesh) | {"devices": list(devices), "slices": slices})),
        slices,
    )


def compile_program(
    program: Program, site: StageShapes, made: dict[str, Any], folder: str
) -> dict[str, Any]:
    """Compile to the end: sizes from the runtime, and the shapes and places of the results for later programs."""
    tpu = site.mesh.devices.flat[0].platform == "tpu"
    with jax.set_mesh(site.mesh):
        lowered = program.lower(made)
        # On TPU the compiler writes the text: jax cannot read back programs that use the sparse core.
        done = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if tpu else {})
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    made[program.name] = jax.tree.map(place, lowered.out_info, done.output_shardings)
    m = done.memory_analysis()
    sizes = {
        "arguments": m.argument_size_in_bytes,
        "outputs": m.output_size_in_bytes,
        "donated": m.alias_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
    }
    return sizes if tpu else sizes | {"text": done.as_text()}


@dataclasses.dataclass(frozen=True)
class SubprocessCompiler:
    """Compiles in a process of its own, which ends as soon as buffers are assigned.

    Memory, transfers and arithmetic are settled then; the machine code, which nobody runs here, takes ten times as long.
    """

    config: Any
    topology: str
    slices: int

    def compile(self, program: Program, folder: str) -> dict[str, float]:
        context = multiprocessing.get_context("spawn")
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
            said = Path(folder, "error")
            raise jax.errors.JaxRuntimeError(
                said.read_text()
                if said.is_file()
                else f"the compiler ended without a word on {program.name}"
            )
        for path in Path(folder, "last").iterdir():
            path.rename(Path(folder) / path.name)
        return sizes


def _compile_in_child(
    config: dict[str, Any], topology: str, slices: int, name: str, folder: str
) -> None:
    """The other process: lower a program again, after the programs whose results it takes, and compile it."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    devices = topology_devices(topology, slices)
    place = shapes_on_devices(ConfigDict(config), devices, slices)
    all_of = {p.name: p for p in programs.stage_programs(place)}
    made: dict[str, Any] = {}
    try:
        for before in all_of[name].needs:
            compile_program(all_of[before], place, made, f"{folder}/before")
        compile_program(all_of[name], place, made, f"{folder}/last")
    except Exception as error:  # the parent raises it: there is no other way out of a process that is watched by its files
        Path(folder, "error").write_text(f"{type(error).__name__}: {error}")
