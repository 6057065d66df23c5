"""Programs compiled for NVIDIA GPUs on a machine without one; see gpu_topology.py.

The compiler is in a folder of its own beside the packages (launch/test.sh): inside the environment,
every start of JAX would look for a GPU.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.base import get_config
from cptjax.planning import aot_compile, gpu_topology, plan

COMPILER = Path(sys.prefix) / "gpu_compiler"
CHILD = """
import json
import shutil
import sys

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo

from configs.base import METHODS, get_config
from cptjax import sharding
from cptjax.models import attention, attention_packed
from cptjax.planning import aot_compile, gpu_topology, plan

# Lowering asks cuDNN, which is not installed, for nothing but its version.
fused_attention_stablehlo.check_cudnn_version = lambda: 91000
c = get_config()
c.stages = ({"task": "gqa", "steps": 1},)
c.model.update(preset="tiny_qwen2", compute_dtype="bfloat16", remat="none")
c.mesh.update(data=2, fsdp=-1)
c.data.prompt_limit, c.rollout.max_new_tokens, c.eval.max_new_tokens = 2048, 32, 32
c.rollout.group, c.rollout.top_p, c.rollout.gather = 2, 0.9, True
c.train.update(batch=16, chunk=64)
c.method.update(METHODS["grpo"])
read_dump = plan.hlo.read_compiler_dump


def keep_dump(folder):
    shutil.copytree(folder, sys.argv[1], dirs_exist_ok=True)
    return read_dump(folder)


plan.hlo.read_compiler_dump = keep_dump
(made,) = plan.make_plans(c, "h100:2", 2)
with open(sys.argv[1] + "/plan.json", "w") as file:
    json.dump(plan.plan_as_json(made), file)


def loss(q, k, v, source):
    reads = attention_packed.find_packed_reads(source, (1, 512), (2, 256), 128)
    return jnp.sum(attention.attend_packed_rows(q, k, v, reads, "cudnn"), dtype=jnp.float32)


mesh = sharding.make_mesh(1, 1, 1, devices=aot_compile.topology_devices("a100:1"))
place = jax.NamedSharding(mesh, jax.P())
shapes = [(1, 1024, 2, 128), (1, 1024, 1, 128), (1, 1024, 1, 128)]
arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=place) for x in shapes]
arrays.append(jax.ShapeDtypeStruct((1, 1024), jnp.int32, sharding=place))
options = gpu_topology.COMPILER_OPTIONS | {"xla_dump_to": sys.argv[1] + "/a100"}
with jax.set_mesh(mesh):
    jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile(options)
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan of GRPO for two machines with two H100 each, and the folder of what was compiled."""
    if not COMPILER.is_dir():
        pytest.skip("the compiler for GPUs is not installed")
    folder = tmp_path_factory.mktemp("compiled")
    root = str(Path(__file__).parents[2])
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{COMPILER}:{root}"}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # jax cannot load programs for absent devices
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)], env=environ, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    made = json.loads((folder / "plan.json").read_text())
    return made, {p["name"]: p for p in made["programs"]}, folder


def test_every_program_compiles_and_fits(planned):
    made, programs, _ = planned
    assert made["fits"] and made["devices"] == 4 and made["chip"]["name"] == "h100"
    assert {"rollouts", "reference log-probs", "train step", "evaluation"} <= set(programs)
    assert all(p["bound_seconds"] > 0 for p in programs.values())


def test_the_products_of_cublas_are_counted(planned):
    """With those that the attention kernel states they are those of the model's formula, which does
    not count scores without effect.
    """
    made, programs, _ = planned
    program = programs["reference log-probs"]
    assert 1.0 <= program["arithmetic"] * made["devices"] / program["useful"] < 1.1


def test_machines_exchange_gradients_over_the_data_axis(planned):
    """Weights are gathered within a machine."""
    _, programs, _ = planned
    axes = {(c["kind"], c["axis"]) for c in programs["train step"]["collectives"]}
    assert ("all-gather", "fsdp") in axes and any("data" in axis for _, axis in axes)
    assert all(c["links"] == 1 for c in programs["train step"]["collectives"])


def test_decode_steps_run_without_the_host(planned):
    """The loop over the steps between two checks whether all have ended is one command buffer."""
    _, _, folder = planned
    sampling = "*jit_sample_whole_batch.thunk_sequence_after_thunk_passes.txt"
    found = []
    for path in folder.glob(sampling):
        loops = [parents for kind, parents in nested_kinds(path) if kind == "kWhile"]
        inner = [parents for parents in loops if "kWhile" in parents]
        assert all("kCommandBuffer" in parents for parents in inner)
        found.append(len(inner))
    # The steps of the greedy evaluation; those of rollouts, and their search for top-p's threshold.
    assert sorted(found) == [1, 2]


def test_attention_of_packed_groups_fits_into_an_a100(planned):
    """The kernels of Pallas, for heads of 128, become machine code."""
    (listed,) = (planned[2] / "a100").glob("*.thunk_sequence.txt")
    found = re.findall(r"(\w+_kernel) .* shared_memory: (\d+) bytes", listed.read_text())
    names = {name for name, _ in found}
    assert names == {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel"}
    # Other GPUs of that generation have 101,376 bytes for a block of threads.
    assert all(2**16 < int(size) <= 101_376 for _, size in found)


def nested_kinds(path):
    """Return the kind of each instruction of a GPU program, and the kinds of those around it."""
    out, around = [], []
    for line in path.read_text().splitlines():
        if found := re.match(r"( *)\d+: (k\w+)", line):
            depth, kind = len(found[1]), found[2]
            around = [(d, k) for d, k in around if d < depth]
            out.append((kind, [k for _, k in around]))
            around.append((depth, kind))
    return out


def test_missing_cudnn_is_named(monkeypatch):
    def plan_stage(*args):
        raise RuntimeError("cuDNN not found.")  # as jax does

    monkeypatch.setattr(plan, "plan_stage", plan_stage)
    c = get_config()
    c.stages = ({"task": "gqa", "steps": 1},)
    with pytest.raises(ValueError, match=r"^cuDNN not found\. Expected all packages of jax"):
        plan.make_plans(c)


@pytest.mark.parametrize("name", ["h100:0", "h100", "h100:2x2"])
def test_a_wrong_number_of_gpus_is_refused(name):
    with pytest.raises(ValueError, match="expected a name and a number of GPUs, as h100:8"):
        aot_compile.topology_devices(name)


def test_more_gpus_than_a_machine_has_are_refused():
    """Otherwise the plan would have all of them exchange data through NVLink."""
    with pytest.raises(ValueError, match="at most 8 GPUs.*--topology=h100:8 --slices=N"):
        aot_compile.topology_devices("h100:16")


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match=r"topology 'l40s:8'.*GPUs \(a100, h100, h200, b200\)"):
        aot_compile.topology_devices("l40s:8")


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="it is installed"
)
def test_a_missing_compiler_is_named():
    with pytest.raises(ValueError, match=r"expected the package jax\[cuda12\]"):
        gpu_topology.gpu_devices("h100:8")
