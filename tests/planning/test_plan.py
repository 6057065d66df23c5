"""Plans: sizes against declared parameters, bounds, refusals, and programs for TPU slices."""

import dataclasses
import json
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import run_helpers

from configs.base import METHODS, get_config
from cptjax import sharding
from cptjax.common import chips
from cptjax.common.program import Program
from cptjax.config import resolve_stages
from cptjax.data import collate
from cptjax.generation import rollout_weights
from cptjax.generation.sampling_config import rollout_sampling
from cptjax.models import trainable
from cptjax.models.families import PRESETS
from cptjax.planning import aot_compile, hlo, memory, plan
from cptjax.planning.memory import resident_bytes
from cptjax.planning.programs import memory_advice, planned_stage, stage_programs
from cptjax.training.programs import (
    abstract_conversations,
    abstract_groups,
    abstract_prompts,
    abstract_stage,
)
from cptjax.types import Prompts

GIB = 2.0**30


def small(method="grpo", /, **changes):
    """A run whose programs compile in seconds."""
    c = get_config()
    c.stages = ({"task": "gqa", "steps": 1}, {"task": "vizwiz", "steps": 1})
    c.model.update(min_pixels=16 * 16, max_pixels=64 * 64, remat="block")
    c.data.prompt_limit, c.rollout.max_new_tokens, c.eval.max_new_tokens, c.rollout.group = (
        64,
        8,
        8,
        2,
    )
    c.train.update(batch=16, micro_batch=8, chunk=64)
    c.eval.batch = 8
    c.method.update(METHODS[method])
    for section, values in changes.items():
        c[section].update(values)
    return c


def penalised(name="ewc", method="sft"):
    added = {"penalty": {"name": "ewc", "coef": 1.0, "samples": 4}}
    if name == "lwf":
        added = {"loss": {"name": "lwf", "coef": 1.0}}
    return small(method, method=METHODS[method] | added)


def names(c, mesh):
    """The names of a run's programs, with a model of text: it is traced more quickly."""
    c.model.preset = "tiny_qwen2"
    return [p.name for p in stage_programs(planned_stage(c, mesh))]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, 4, 2)


@pytest.fixture(scope="module")
def local():
    """Every program of a small run for this machine's eight CPU devices.

    Its two stages need the same programs.
    """
    (stage_plan,) = plan.make_plans(
        small(
            mesh={"data": 1, "fsdp": 4, "model": 2},
            model={"compute_dtype": "float32", "param_dtype": "bfloat16"},
        )
    )
    return stage_plan


def batch_bytes():
    """Return the bytes a device of the prompts and of a whole micro-batch of the small run."""
    stage = planned_stage(
        small(mesh={"data": 1, "fsdp": 4, "model": 2}), sharding.make_mesh(1, 4, 2)
    )
    batch = abstract_groups(stage, 8, 64)
    return sharding.bytes_per_device(batch.prompts), sharding.bytes_per_device(batch)


def test_every_program_of_a_run_is_compiled_once(local):
    assert [c.name for c in local.costs] == [
        "rollouts",
        "reference log-probs",
        "add gradients",
        "apply gradients",
        "evaluation",
    ]
    assert [c.calls for c in local.costs] == [1, 2, 2, 1, 0]
    assert all(c.arithmetic > 0 and c.temporaries > 0 for c in local.costs if c.useful)


def test_what_stays_in_memory_is_what_is_declared(local):
    cfg = PRESETS["tiny"]
    tree = planned_stage(
        small(mesh={"data": 1, "fsdp": 4, "model": 2}), sharding.make_mesh(1, 4, 2)
    ).declared
    cut = lambda p: math.prod(
        sharding.named_sharding(p.axes, sharding.make_mesh(1, 4, 2), p.shape).shard_shape(p.shape)
    )
    share = sum(cut(p) for p in trainable.flatten_params(tree).values())
    assert cfg.text.tied and local.resident["trained weights"] == 2 * share
    assert local.resident["reference"] == 4 * share
    assert local.resident["optimiser"] == pytest.approx(
        8 * share, rel=1e-3
    )  # two moments, and a few counters


def test_the_peak_counts_what_stays_in_memory_during_a_program(local):
    rollouts, score, add, apply, _ = local.costs
    kept, prompts, batch = local.resident, *batch_bytes()
    others = kept["optimiser"] + kept["reference"]
    assert rollouts.in_memory == others + 2 * prompts  # those of two micro-batches
    assert score.in_memory == (
        kept["trained weights"] + kept["frozen weights"] + kept["optimiser"] + batch
    )
    assert add.in_memory == others + batch
    assert apply.in_memory == kept["frozen weights"] + kept["reference"] + 2 * batch
    assert (
        apply.donated >= kept["trained weights"] + kept["optimiser"] - 1024
    )  # the new state takes the old one's place
    assert local.peak == max(
        c.arguments + c.outputs - c.donated + c.temporaries + c.in_memory for c in local.costs
    )


def test_a_plan_is_json_and_has_no_bound_without_figures(local):
    metrics = json.loads(json.dumps(plan.plan_as_json(local)))
    assert (
        metrics["fits"]
        and metrics["chip"] is None
        and metrics["mfu_bound"] is None
        and len(metrics["programs"]) == 5
    )


def test_a_program_that_does_not_fit_is_named_with_its_excess_and_a_remedy(local):
    chip = dataclasses.replace(chips.CHIPS["v5e"], memory=1e4)
    tight = dataclasses.replace(local, chip=chip)
    output = plan.plan_verdict(tight)
    assert tight.mfu() is None and plan.plan_as_json(tight)["mfu_bound"] is None
    assert (
        len(output.splitlines()) == 5
        and "train.micro_batch" in output
        and "more than v5e offers" in output
    )
    assert plan.plan_verdict(dataclasses.replace(tight, chip=chips.CHIPS["v5e"])) == ""


def test_the_bound_is_the_slowest_resource():
    """1e12 operations, 1e9 bytes and an all-reduce of 9e9 bytes among 2 on a v5e: the network's 2
    * 9e9 / 2 / 90e9 = 0.1 s.
    """
    chip = chips.CHIPS["v5e"]
    collectives = [hlo.Collective("all-reduce", "model", 2, 9e9, 1)]
    times = plan.roofline_seconds(1e12, 1e9, collectives, chip)
    assert times == pytest.approx({"compute": 1e12 / 197e12, "memory": 1e9 / 819e9, "network": 0.1})
    slow = dataclasses.replace(collectives[0], axis="data", slices=2)
    across = plan.roofline_seconds(0, 0, [slow], chip)
    assert across["network"] == pytest.approx(9e9 / 3.125e9)
    # Two in each of two slices: each sends half of its slice's sum.
    shared = dataclasses.replace(slow, size=4)
    assert plan.roofline_seconds(0, 0, [shared], chip)["network"] == pytest.approx(4.5e9 / 3.125e9)
    # Each of four sends three quarters of its part, on both links.
    exchange = [hlo.Collective("all-to-all", "fsdp", 4, 1.2e9, 1)]
    assert plan.roofline_seconds(0, 0, exchange, chip)["network"] == pytest.approx(0.9e9 / 90e9)
    on_a_line = [dataclasses.replace(collectives[0], links=1)]
    assert plan.roofline_seconds(0, 0, on_a_line, chip)["network"] == pytest.approx(0.2)


def test_empty_rows_that_fill_a_batch_up_are_no_useful_work(mesh):
    """Six conversations on four shards are eight rows."""
    stages = [
        planned_stage(small("sft", train={"batch": n, "micro_batch": 0}), mesh) for n in (6, 8)
    ]
    six, eight = (stage_programs(stage)[0] for stage in stages)
    assert [s.layout.rows for s in stages] == [8, 8]
    assert six.flops == eight.flops * 6 / 8


def test_batches_of_a_step_and_of_the_next_one_are_in_memory(mesh):
    """SFT collates the next step's batches during the update; GRPO samples first."""

    def others(c):
        stage = planned_stage(c, mesh)
        return {p.name: sharding.bytes_per_device(p.others) for p in stage_programs(stage)}, stage

    train = {"batch": 16, "micro_batch": 8}
    sft, stage = others(small("sft", train=train))
    one = sharding.bytes_per_device(abstract_conversations(stage, 8, stage.longest_row))
    assert (sft["add gradients"], sft["apply gradients"]) == (3 * one, 4 * one)
    grpo, stage = others(small(train=train))
    batch = abstract_groups(stage, 8, stage.longest_prompt)
    one, prompts = sharding.bytes_per_device(batch), sharding.bytes_per_device(batch.prompts)
    assert (grpo["add gradients"], grpo["apply gradients"]) == (one, 2 * one)
    assert grpo["reference log-probs"] == one and grpo["rollouts"] == 2 * prompts
    whole, _ = others(small(train={"batch": 16, "micro_batch": 0}))
    assert whole["rollouts"] == whole["train step"] == 0  # its only batch is an argument


@pytest.mark.parametrize(
    "words",
    [
        "RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries (29.18G) exceeds available HBM (15.75G)",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 29.18G of 15.75G hbm.",
    ],
)
def test_the_compilers_own_refusal_is_a_program_that_does_not_fit(local, words):
    program = Program("train step", None, (), 1, 0.0)
    cost = plan.refused_cost(program, 2 * GIB, 1.0, words)
    assert cost.over and cost.peak == pytest.approx(31.18 * GIB)
    output = plan.plan_verdict(dataclasses.replace(local, chip=chips.CHIPS["v5e"], costs=[cost]))
    assert "train step needs 31.18 GiB" in output and "15.50 GiB more than v5e offers" in output
    with pytest.raises(jax.errors.JaxRuntimeError, match="no room for words"):
        plan.refused_cost(program, 0, 0, "INTERNAL: no room for words")


@pytest.mark.parametrize(
    ("changes", "metrics"),
    [
        ({"train": {"batch": 18, "micro_batch": 0}}, "18 prompts.*train.batch.* 4 shards"),
        ({"train": {"batch": 18, "micro_batch": 6}}, "6 prompts.*train.micro_batch.* 4 shards"),
        (
            {"train": {"batch": 16, "micro_batch": 12}},
            "16 rows cannot be cut into micro-batches of 12",
        ),
        ({"rollout": {"slots": 6}}, "rollout.slots=6.* 4 batch shards"),
        (
            {"model": {"path": "no/such-model"}},
            "no/such-model is neither a local folder nor a model that the hub returns",
        ),
    ],
)
def test_a_batch_that_the_mesh_cannot_cut_is_refused_with_the_numbers(mesh, changes, metrics):
    with pytest.raises(ValueError, match=metrics):
        names(small(**changes), mesh)


def test_programs_follow_the_method(mesh):
    assert names(small("sft", train={"batch": 8, "micro_batch": 0}), mesh) == [
        "train step",
        "evaluation",
    ]
    assert names(small("self_sft"), mesh) == [
        "rollouts",
        "add gradients",
        "apply gradients",
        "evaluation",
    ]
    c = small()
    c.method.updates_per_batch = 2
    assert names(c, mesh) == [
        "rollouts",
        "reference log-probs",
        "own log-probs",
        "train step",
        "evaluation",
    ]
    turns = [
        "rollouts: cast",
        "rollouts: queue",
        "rollouts: prefill",
        "rollouts: decode",
        "rollouts: refill",
    ]
    assert names(small(rollout={"slots": 8}), mesh)[:5] == turns
    assert names(small(rollout={"slots": 8, "gather": True}), mesh)[:6] == [
        "rollouts: weights",
        *turns,
    ]
    assert names(small("sdft"), mesh) == [
        "rollouts",
        "teacher states",
        "add gradients",
        "apply gradients",
        "evaluation",
    ]
    assert names(small("remax"), mesh)[:3] == [
        "rollouts",
        "greedy responses",
        "reference log-probs",
    ]
    assert names(small(method={"filter": {"name": "incompetent", "samples": 4}}), mesh)[:2] == [
        "filter",
        "rollouts",
    ]
    assert names(penalised("lwf"), mesh) == [
        "teacher states",
        "add gradients",
        "apply gradients",
        "evaluation",
    ]
    assert names(penalised(), mesh)[-3:] == ["ewc: sum", "ewc: gradient", "evaluation"]


@pytest.mark.parametrize(
    ("c", "name"),
    [
        (small("sdft"), "teacher states"),
        (penalised("lwf"), "teacher states"),
        (small("remax"), "greedy responses"),
        (small(method={"filter": {"name": "incompetent", "samples": 4}}), "filter"),
        (penalised(), "ewc: sum"),
        (penalised(method="grpo"), "ewc: gradient"),
        (small(rollout={"dtype": "bfloat16"}), "rollouts"),
    ],
    ids=["sdft", "lwf", "remax", "filter", "fisher", "gradient", "dtype"],
)
def test_every_further_program_can_be_lowered(mesh, c, name):
    stage = planned_stage(c, mesh)
    with jax.set_mesh(mesh):
        (program,) = [p for p in stage_programs(stage) if p.name == name]
        assert set(program.not_loaded) <= set(stage.resident) and program.lower({}).as_text()


def test_copies_of_the_stages_start_stay_in_memory(mesh):
    """In bytes a device: all weights for an average; the frozen ones are not copied, and a penalty
    holds the trained itself, and a Fisher in float32.
    """
    sizes = lambda c: resident_bytes(planned_stage(c, mesh))
    average, ewc = (
        small("sft", method=METHODS["sft"] | {"stage_end": {"name": "wise_ft", "weight": 0.5}}),
        penalised(),
    )
    ewc.model.freeze = ("vision",)
    plain = sizes(small("sft"))
    assert (
        "stage's start" not in plain and sizes(average)["stage's start"] == plain["trained weights"]
    )
    penalised_sizes = sizes(ewc)
    assert "stage's start" not in penalised_sizes and penalised_sizes["frozen weights"] > 0
    assert penalised_sizes["continual learning"] == pytest.approx(
        2 * penalised_sizes["trained weights"], rel=1e-3
    )


def test_a_reference_of_adapters_shares_the_frozen_weights_unless_a_method_changes_them(mesh):
    def sizes(**method):
        method = METHODS["grpo"] | {"kl_coef": 0.1, "kl_reference": "base"} | method
        lora = dict(lora=dict(rank=4))
        return resident_bytes(planned_stage(small("grpo", method=method, model=lora), mesh))

    shared, merged = sizes(), sizes(parameters=dict(name="merge_lora"))
    adapters = shared["trained weights"] / 2  # in bfloat16 instead of float32
    assert shared["reference"] == adapters > 0
    assert merged["reference"] == adapters + merged["frozen weights"]


def test_adapters_and_directions_of_earlier_stages_stay_in_memory(mesh):
    """In bytes a device: the adapters of all stages but the last, directions of half the inputs."""

    def sizes(**method):
        c = small("sft", method=METHODS["sft"] | method, model=dict(lora=dict(rank=4)))
        c.stages *= 2
        return resident_bytes(planned_stage(c, mesh))

    adapters = sizes(parameters=dict(name="o_lora"))
    assert adapters["continual learning"] == 3 * adapters["trained weights"] > 0
    directions = sizes(gradient=dict(name="gpm", rank=3, layers=("q", "down")))
    text = PRESETS["tiny"].text
    of_a = 3 * (text.width // 4 + text.mlp // 2)  # on fsdp=4, model=2
    numbers = of_a + 2 * (4 * 2)
    assert directions["continual learning"] == 4 * text.depth * numbers


def test_a_memory_of_rows_takes_no_device_memory_but_that_of_its_gradient(mesh):
    changes = dict(replay=dict(name="der", max_bytes=10**9))
    plain, der = (
        planned_stage(small("sft", method=METHODS["sft"] | more), mesh) for more in ({}, changes)
    )
    assert resident_bytes(der) == resident_bytes(plain)
    gradients = [memory.estimate_bytes(s, 64, 0)["gradients"] for s in (plain, der)]
    one = sharding.bytes_per_device(plain.state.params)  # in float32 too
    assert gradients[1] - gradients[0] == one
    names = [{program.name for program in stage_programs(stage)} for stage in (plain, der)]
    assert names[1] - names[0] == {"memory gradient", "der: likeliest tokens"}


def test_the_memory_estimate_follows_rollout_dtype():
    c = small(model={"compute_dtype": "float32"})
    metrics = {}
    for dtype in ("", "float32", "bfloat16", "int8"):
        c.rollout.dtype = dtype
        stage = abstract_stage(c, PRESETS["tiny"], memory.mesh_of_size(c.mesh, 8))
        metrics[dtype] = memory.estimate_bytes(stage, 64, 96)
    assert (
        metrics[""]["cache"]
        == metrics["float32"]["cache"]
        == metrics["int8"]["cache"]
        == 2 * metrics["bfloat16"]["cache"]
    )
    assert metrics["float32"]["rollout weights"] == 2 * metrics["bfloat16"]["rollout weights"]
    sizes = [metrics[dtype]["rollout weights"] for dtype in ("float32", "int8")]
    assert sizes[0] / 4 < sizes[1] < sizes[0]


def test_the_memory_estimate_of_int8_weights_is_that_of_the_program():
    """The linear maps of the decoder are int8; its table and the vision tower are not."""
    pytest.importorskip("qwix")
    c = small(model={"compute_dtype": "bfloat16"}, rollout={"dtype": "int8"})
    stage = abstract_stage(c, PRESETS["tiny"], memory.mesh_of_size(c.mesh, 1))
    sampling = rollout_sampling(c)
    program = rollout_weights.weights_program(stage.params, stage.cfg, sampling, stage.dtype)
    made = trainable.flatten_params(program.eval_shape(stage.params))
    size = {path: math.prod(x.shape) * x.dtype.itemsize for path, x in made.items()}
    scales = sum(n for path, n in size.items() if path[-1] == "scale")
    estimate = memory.estimate_bytes(stage, 64, 96)["rollout weights"]
    assert estimate == sum(size.values()) - scales
    assert 0 < scales < 0.05 * estimate


def test_the_memory_estimate_counts_no_more_slots_than_groups():
    c = small()

    def cache(**changes):
        c.rollout.update({"slots": 0, "slot_rows": 0} | changes)
        stage = abstract_stage(c, PRESETS["tiny"], memory.mesh_of_size(c.mesh, 8))
        return memory.estimate_bytes(stage, 64, 96)["cache"]

    batch = c.train.batch
    assert cache(slots=4 * batch) == cache(slots=batch) == cache()
    assert cache(slots=batch // 2) == cache() / 2
    rows = {"slots": 4 * batch, "slot_rows": 1}
    assert cache(**rows) == cache(**rows | {"slots": batch}) < cache()


def test_the_memory_estimate_counts_the_responses_of_self_sft():
    """They are method.self_samples; rollout.group is not used."""

    def cache(method, samples, group):
        c = small(method, method={"self_samples": samples}, rollout={"group": group})
        stage = abstract_stage(c, PRESETS["tiny"], memory.mesh_of_size(c.mesh, 8))
        return memory.estimate_bytes(stage, 64, 96)["cache"]

    assert cache("self_sft", 6, 2) == cache("grpo", 4, 6) > cache("self_sft", 2, 6)


def test_results_of_earlier_programs_stay_in_memory_during_later_ones(mesh):
    """The queue while responses are decoded.

    The teacher's states of all micro-batches during the first gradient.
    """
    text = jax.jit(lambda x: x + 1).lower(1.0).compile().as_text()

    class FixedSizes:
        def compile(self, program, folder):
            return {
                "arguments": 0.0,
                "outputs": 1000.0,
                "donated": 0.0,
                "temporaries": 0.0,
                "text": text,
            }

    def in_memory(c):
        stage, costs = planned_stage(c, mesh), []
        for program in stage_programs(stage):
            costs.append(plan.program_cost(program, stage, None, {}, FixedSizes(), costs))
        models = {
            p.name: sum(resident_bytes(stage, p.args, p.not_loaded).values())
            + sharding.bytes_per_device(p.others)
            for p in stage_programs(stage)
        }
        return {c.name: c.in_memory - models[c.name] for c in costs}

    pool = in_memory(small(rollout={"slots": 8, "gather": True}))
    assert (
        pool["rollouts: decode"] == 2000
        and pool["rollouts: refill"] == pool["rollouts: queue"] == 1000
        and pool["evaluation"] == 0
    )
    distilled = in_memory(small("sdft", train={"batch": 16, "micro_batch": 4}))
    assert distilled["add gradients"] == 3000 and distilled["apply gradients"] == 4000


@pytest.mark.parametrize("method", ["sft", "sdft", "dapo", "eaft"])
def test_batches_have_what_their_objective_reads(mesh, method):
    """Tracing the gradient's program needs every array that the loss asks for."""
    stage = planned_stage(small(method, model={"preset": "tiny_qwen2"}), mesh)
    with jax.set_mesh(mesh):
        program = next(
            p for p in stage_programs(stage) if p.name in ("train step", "add gradients")
        )
        assert program.lower({}).as_text()


def test_the_largest_image_and_prompt_are_those_of_the_config(mesh):
    stage = planned_stage(small(), mesh)
    assert (
        collate.max_image_slots(stage.cfg, 64 * 64) == 6 * 16
    )  # of 16 merge units 3 x 5 spread over six windows of 2 x 2 units
    prompts = abstract_prompts(stage, 8, stage.config.data.prompt_limit)
    assert (
        isinstance(prompts, Prompts)
        and prompts.tokens.shape == (8, 64)
        and prompts.vision.patches.shape[:2] == (4, 2)
    )
    big = collate.max_image_slots(PRESETS["7b"], 1003520)
    assert 5120 <= big <= 6400


CONFIG = """
from tests.planning.test_plan import small

def get_config():
    c = small("sft", mesh={"data": 1, "fsdp": 2, "model": 2}, train={"batch": 4, "micro_batch": 0})
    c.stages, c.model.preset = c.stages[:1], "tiny_qwen2"
    return c
"""


def run_launcher(tmp_path, *flags):
    """Run launch/plan.py; return its exit code, output and JSON."""
    (tmp_path / "config.py").write_text(CONFIG)
    order = [
        sys.executable,
        "launch/plan.py",
        f"--config={tmp_path / 'config.py'}",
        f"--json={tmp_path / 'plan.json'}",
        *flags,
    ]
    env = run_helpers.environment(
        PYTHONPATH=f"{run_helpers.ROOT}:{run_helpers.ROOT / 'tests'}",
        XLA_FLAGS=os.environ["XLA_FLAGS"],  # libtpu knows these only
    )
    done = subprocess.run(
        order, cwd=run_helpers.ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    return (
        done.returncode,
        done.stdout + done.stderr,
        json.loads((tmp_path / "plan.json").read_text()),
    )


def test_the_command_plans_a_slice_and_ends_with_0_where_all_fits_and_1_where_not(tmp_path):
    """The programs of the tiny model, whose weights fit on each device.

    Then 2,048 conversations of 16,384 tokens at a time, which no v5e holds.
    """
    pytest.importorskip("libtpu")
    used = lambda: sum(
        resource.getrusage(resource.RUSAGE_CHILDREN)[:2]
    )  # seconds of a processor: other work does not count
    began = used()
    code, output, (metrics,) = run_launcher(tmp_path, "--topology=v5e:2x2")
    assert code == 0, output
    assert used() - began < 60
    assert (
        metrics["fits"]
        and metrics["devices"] == 4
        and metrics["mesh"] == {"data": 1, "fsdp": 2, "model": 2}
        and 0 < metrics["mfu_bound"] < 1
    )
    assert [p["name"] for p in metrics["programs"]] == [
        "train step",
        "evaluation: weights",
        "evaluation",
    ] and "GiB a device" in output
    training, _, evaluation = metrics["programs"]  # the copy of the weights computes nothing
    assert all(p["temporaries"] > 0 and p["arithmetic"] > 0 for p in (training, evaluation))
    code, output, (metrics,) = run_launcher(
        tmp_path,
        "--topology=v5e:2x2",
        "--config.train.batch=2048",
        "--config.data.prompt_limit=16384",
    )
    assert code == 1 and not metrics["fits"], output
    assert (
        "train step needs" in output and "train.micro_batch" in output and "Traceback" not in output
    )


def test_a_copy_of_the_weights_does_not_get_smaller_with_fewer_rows():
    advice = memory_advice("rollouts: weights", {}, {"data": 1, "fsdp": 4, "model": 2})
    assert "rollout.gather=False" in advice and "slots" not in advice and "fsdp=4" in advice


def test_a_folder_that_does_not_exist_is_refused_before_anything_is_compiled(tmp_path):
    file = tmp_path / "missing" / "plan.json"
    command = ["launch/plan.py", "--config=configs/demo.py", f"--json={file}"]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
    expected = f"error: --json={file}: its folder does not exist; create it first\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_an_unknown_slice_is_one_line():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="topology 'v7q:2x2'.*v5e:4x4"):
        aot_compile.topology_devices("v7q:2x2")


# ---- TPU slices ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RecordingCompiler(aot_compile.SubprocessCompiler):
    """Record the name and shape of every buffer that the compiler assigned."""

    buffers: list

    def compile(self, program, folder):
        sizes = super().compile(program, folder)
        (report,) = Path(folder).glob("module_*.after_optimizations-buffer-assignment.txt")
        values = re.findall(
            r"^ *value: <\d+ (\S+) @\d+> .*?\w+\[([\d,]+)\]", report.read_text(), re.M
        )
        self.buffers.extend((name, tuple(map(int, dims.split(",")))) for name, dims in values)
        return sizes


def tpu(c, topology, name, slices=1, buffers=None):
    """Return the cost of one program of a config on a TPU slice, and the stage.

    The shapes of its buffers are added to `buffers`.
    """
    pytest.importorskip("libtpu")
    (stage,) = {s.config.to_json(): s for s in resolve_stages(c)}.values()
    devices = aot_compile.topology_devices(topology, slices)
    planned = planned_stage(stage.config, aot_compile.planned_mesh(stage.config, devices, slices))
    program = next(p for p in stage_programs(planned) if p.name == name)
    short = RecordingCompiler(stage.config, topology, slices, [] if buffers is None else buffers)
    chip = chips.chip_of_devices(devices)
    return plan.program_cost(program, planned, chip, {}, short, (), slices), planned


def whole(planned):
    """Return the unsharded shapes of all parameters that the mesh cuts, except those that are also
    the shape of a part.
    """
    params = {"/".join(path): x for path, x in trainable.flatten_params(planned.params).items()}
    parts = {axes(x.sharding.shard_shape(x.shape)) for x in params.values()}
    return {axes(x.shape): name for name, x in params.items() if axes(x.shape) not in parts}


def axes(shape):
    return tuple(sorted(n for n in shape if n > 1))


def test_update_of_full_width_holds_no_logits_and_no_whole_table():
    """7B's widths, two layers, on v5e:4x4: the largest buffers are far below [B, T, V] and below
    the unembedding [D, V].
    """
    c = small(
        mesh={"data": 1, "fsdp": -1, "model": 4},
        data={"prompt_limit": 512},
        train={"batch": 8, "micro_batch": 4, "chunk": 256},
    )
    c.rollout.max_new_tokens = 256
    c.model.path, c.stages = "Qwen/Qwen2.5-VL-7B-Instruct", c.stages[:1]
    c.model.max_pixels = 28 * 28 * 64
    buffers = []
    cost, planned = tpu(c, "v5e:4x4", "add gradients", buffers=buffers)
    unsharded = whole(planned)
    assert len(buffers) > 500 and len(unsharded) > 10
    gathered = {unsharded[axes(shape)] for _, shape in buffers if axes(shape) in unsharded}
    assert gathered <= {
        "vision/patch/w"
    }  # it has no layers and is cut by fsdp alone: whole for its one product
    text, vocab = planned.cfg.text, planned.cfg.text.vocab
    assert cost.buffers and all(size < 2 * text.width * vocab / 2 for size, _ in cost.buffers)
    assert not [name for name, shape in buffers if vocab in shape]  # cut by words always
    assert cost.peak < 16 * GIB and not cost.over
    kinds = {(x.kind, x.axis) for x in cost.collectives}
    assert ("all-gather", "fsdp") in kinds and ("all-reduce", "model") in kinds
    assert (
        1.0 < cost.arithmetic * 16 / cost.useful < 1.6
    )  # recomputation of each layer adds a third; the rest is padding


def test_two_slices_share_the_batch_and_sum_gradients_across():
    c = small(mesh={"data": 2, "fsdp": 2, "model": 2}, model={"preset": "tiny_qwen2"})
    c.stages = c.stages[:1]
    cost, planned = tpu(c, "v5e:2x2", "add gradients", slices=2)
    assert (
        planned.mesh.devices[0, 0, 0].slice_index == 0
        and planned.mesh.devices[1, 0, 0].slice_index == 1
    )
    assert any("data" in x.axis for x in cost.collectives) and cost.seconds["network"] > 0


def test_programs_that_need_results_of_earlier_ones_are_planned():
    """Slots with int8 weights: the queue needs the weights, which are compiled first."""
    c = small(
        mesh={"data": 1, "fsdp": 2, "model": 2},
        rollout={"slots": 8, "gather": True, "dtype": "int8"},
    )
    cost, _ = tpu(c, "v5e:2x2", "rollouts: queue")
    assert cost.temporaries > 0 and cost.bound >= cost.seconds["memory"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_cache")
def test_sizes_of_a_short_compile_are_those_of_the_whole_one(tmp_path):
    pytest.importorskip("libtpu")
    c = small(mesh={"data": 1, "fsdp": 2, "model": 2})
    stage = resolve_stages(c)[0]
    mesh = aot_compile.planned_mesh(stage.config, aot_compile.topology_devices("v5e:2x2"))
    planned = planned_stage(stage.config, mesh)
    program = next(p for p in stage_programs(planned) if p.name == "apply gradients")
    short = aot_compile.SubprocessCompiler(stage.config, "v5e:2x2", 1).compile(
        program, str(tmp_path)
    )
    whole = aot_compile.compile_program(program, mesh, {}, str(tmp_path / "whole"))
    assert {k: short[k] for k in whole} == pytest.approx(
        whole, rel=0.01
    )  # the runtime pads small buffers


def test_resident_memory_of_7b_is_known_without_compiling():
    """8.3 billion weights in float32 with two moments are far more than four v5e hold."""
    pytest.importorskip("libtpu")
    c = small(mesh={"data": 1, "fsdp": 2, "model": 2}, train={"batch": 2, "micro_batch": 0})
    c.model.path = "Qwen/Qwen2.5-VL-7B-Instruct"
    stage = resolve_stages(c)[0].config
    mesh = aot_compile.planned_mesh(stage, aot_compile.topology_devices("v5e:2x2"))
    sizes = resident_bytes(planned_stage(stage, mesh))
    assert sum(sizes.values()) > chips.CHIPS["v5e"].usable
    assert sizes["optimiser"] == pytest.approx(2 * sizes["trained weights"], rel=1e-3)
