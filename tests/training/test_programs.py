"""The planner's programs and abstract arguments are those of a real training step."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
import stage_fixtures
from jax._src import pjit
from stage_fixtures import method_config

from cptjax.continual import stage_end, stage_memory
from cptjax.data import collate, device_batches, model_context, packing
from cptjax.training import build, programs, train_loop
from cptjax.training.algorithms.continual_learning.ewc import EWC
from cptjax.training.algorithms.continual_learning.gpm import GPM
from cptjax.training.algorithms.continual_learning.memory import empty_memory
from cptjax.training.programs import abstract_stage, abstract_update_batch, training_programs
from cptjax.training.stage_context import StageProgress

pytestmark = pytest.mark.slow
TWO_UPDATES = {"updates_per_batch": 2, "passes": 2, "tis_cap": 2.0}


def kinds(tree):
    """Return the type and number of axes of every array."""
    return jax.tree.map(lambda x: (x.dtype, x.ndim), tree)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize(
    ("method", "changes"),
    [("grpo", {}), ("dapo", TWO_UPDATES), ("sdft", {}), ("sft", {"kl_coef": 0.1})],
    ids=str,
)
def test_a_planned_stage_has_the_models_and_batches_of_a_real_one(tmp_path, method, changes):
    c = method_config(method, method=changes)
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        ctx = prepared.ctx
        with ctx.open_stream(0) as stream:
            step = train_loop.next_step_batch(ctx, prepared.params, stream, StageProgress())
            batch = next(iter(step.updates))[0]
        stage = abstract_stage(ctx.config, ctx.builder.model_ctx.cfg, prepared.run.model_ctx.mesh)
        planned = abstract_update_batch(stage, len(batch.prompts.tokens))
        assert kinds(planned.extra) == kinds(batch.extra)
        names = ("targets", "mask", "where", "packing")
        assert [kinds(getattr(planned, n)) for n in names] == [
            kinds(getattr(batch, n)) for n in names
        ]
        assert len(planned.targets) == len(batch.targets)
        assert shapes(stage.state) == shapes(prepared.state)
        assert shapes(stage.params) == shapes(prepared.params)
        assert (stage.reference is None) == (ctx.reference is None)
        assert stage.reference is None or shapes(stage.reference) == shapes(ctx.reference)
        assert (stage.teacher is None) == (ctx.teacher is None)


# ---- every program of a step, at the largest shapes ----------------------------------------------


@contextlib.contextmanager
def compiled_programs():
    """Return a set to which the name and argument shapes of each program are added that is lowered,
    or called for the first time after a lowering of the same program.
    """
    compiled, lower = set(), pjit._resolve_and_lower

    def record(*args, **settings):
        program = lower(*args, **settings)
        arguments = program.compile_args["global_in_avals"]
        shapes = tuple((x.shape, str(x.dtype)) for x in arguments)
        compiled.add((program._name, shapes))
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pjit, "_resolve_and_lower", record)
        yield compiled


def planned_programs(stage, listed):
    """Return the name and argument shapes of planned programs.

    What JAX traced and compiled before is forgotten, so that a run compiles its programs again.
    """
    jax.clear_caches()
    with compiled_programs() as planned, jax.set_mesh(stage.mesh):
        for program in listed:
            program.lower({})
    return planned


def check_programs(run, planned):
    """Every planned program is run, and every program that takes a model's weights is planned.

    `begin` is left out of a plan: it is `add` without the sum. So is `join_shard`, which copies the
    prompts of micro-batches.
    """
    assert planned and planned <= run
    unplanned = {(name, arguments) for name, arguments in run - planned if len(arguments) > 3}
    assert {name for name, _ in unplanned} <= {"jit(begin)", "jit(join_shard)"}
    update = [arguments for name, arguments in planned if name in ("jit(add)", "jit(step)")]
    assert all(set(arguments) <= set(update[0]) for _, arguments in unplanned)


def use_largest_shapes(monkeypatch, stage, longest_demonstration=0):
    """Build every batch as if another process had the longest rows and the largest images."""

    def largest(shape, length):
        return collate.largest_batch_shape(
            stage.cfg, stage.config.model.max_pixels, shape.rows, stage.shards, length
        )

    def largest_prompts(shape):
        short = shape.length <= stage.longest_prompt
        return largest(shape, stage.longest_prompt if short else longest_demonstration)

    monkeypatch.setattr(model_context, "gather_batch_shape", largest_prompts)
    monkeypatch.setattr(
        device_batches, "gather_batch_shape", lambda shape: largest(shape, stage.longest_row)
    )
    monkeypatch.setattr(device_batches, "target_buckets", lambda length: [length])
    monkeypatch.setattr(packing, "row_size", lambda tokens, capacity: capacity)
    monkeypatch.setattr(packing, "target_size", lambda targets, capacity: capacity)


GRPO = {"ratio": "token", "kl_coef": 0.1}
VISION = {"preset": "tiny"}  # with a tower
CASES = {  # method, its changes, changes of other sections
    "KL and several updates": (
        "grpo",
        GRPO | {"updates_per_batch": 2, "passes": 2},
        {"model": VISION},
    ),
    "micro-batches": (
        "grpo",
        GRPO | TWO_UPDATES,
        {"train": {"batch": 8, "micro_batch": 2}, "model": VISION},
    ),
    "frozen tower": (
        "grpo",
        GRPO | {"updates_per_batch": 2},
        {"model": VISION | {"freeze": ("vision",)}},
    ),
    "KL in the reward": (
        "grpo",
        {"advantage": "reinforce", "kl_place": "reward", "kl_estimator": "k1", "kl_coef": 0.1},
        {},
    ),
    "greedy baseline": ("remax", {}, {}),
    "online filter": ("dapo", {"overlong": 0}, {}),
    "distillation": ("sdft", {}, {"train": {"micro_batch": 2}, "model": VISION}),
    "frozen teacher": ("sdft", {"distill": {"teacher": "frozen"}}, {}),
    "cross-entropy with KL": ("sft", {"kl_coef": 0.1}, {}),
    "LwF": ("sft", {"loss": {"name": "lwf", "coef": 1.0}}, {"train": {"micro_batch": 2}}),
    "LwF with a frozen tower": (
        "sft",
        {"loss": {"name": "lwf", "coef": 1.0}},
        {"model": VISION | {"freeze": ("vision", "merger")}},
    ),
    "L2": ("sft", {"penalty": {"name": "l2", "coef": 1.0}}, {}),
    "drift in the reward": ("dr_grpo", {"reward": {"name": "rapo"}}, {}),
    "own responses": ("self_sft", {}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_runs_the_planned_programs_and_no_other(tmp_path, monkeypatch, name):
    method, changes, sections = CASES[name]
    number = 2 if name == "drift in the reward" else 1  # the first stage has none
    c = method_config(method, stages=number, method=changes, **sections)
    with stage_fixtures.prepare_stage(c, tmp_path, number) as prepared:
        ctx = prepared.ctx
        stage = abstract_stage(ctx.config, ctx.builder.model_ctx.cfg, prepared.run.model_ctx.mesh)
        longest = 0
        if stage.needs.demonstrations:
            longest = max(ctx.teacher.model_ctx.buckets)
            template = longest - stage.longest_prompt - c.rollout.max_new_tokens
            monkeypatch.setattr(programs, "DEMONSTRATION_TEMPLATE_TOKENS", template)
        listed = training_programs(stage)
        planned = planned_programs(stage, listed)
        scored = 0

        def score(params, batch, program=ctx.builder.score):
            nonlocal scored
            scored += 1
            return program(params, batch)

        ctx.builder = dataclasses.replace(ctx.builder, score=score)
        use_largest_shapes(monkeypatch, stage, longest)
        state, params = prepared.state, prepared.params
        with (
            compiled_programs() as run,
            jax.set_mesh(stage.mesh),
            ctx.open_stream(0) as stream,
        ):
            step = train_loop.next_step_batch(ctx, params, stream, StageProgress())
            updates = 0
            for batches in step.updates:
                assert len(batches) == stage.layout.micro_batches
                state, _ = prepared.programs.run(
                    state, prepared.frozen, batches, 1e-3, prepared.arrays
                )
                updates += 1
        assert updates == stage.layout.updates
        check_programs(run, planned)
        scores = [p.calls for p in listed if p.name.endswith("log-probs")]
        assert scored == sum(scores)


@pytest.mark.parametrize(
    ("hook", "method"), [("penalty", EWC(1.0, samples=2)), ("gradient", GPM(rank=2, samples=2))]
)
def test_the_end_of_a_stage_runs_the_planned_programs(hook, method, tmp_path, monkeypatch):
    settings = dict(dataclasses.asdict(method), name=method.name)
    c = method_config("sft", method={hook: settings})
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        ctx, model_ctx = prepared.ctx, prepared.run.model_ctx
        stage = abstract_stage(ctx.config, model_ctx.cfg, model_ctx.mesh)
        planned = planned_programs(stage, stage_end.stage_end_programs(stage))
        use_largest_shapes(monkeypatch, stage)
        with compiled_programs() as run:
            a_pass, trained = method.gradient_pass(c.train.chunk), prepared.state.params
            stage_end.run_gradient_pass(
                prepared.run, ctx.stage, trained, prepared.frozen, a_pass, method.name
            )
        check_programs(run, planned)


def test_an_update_with_a_memory_runs_the_planned_programs(tmp_path, monkeypatch):
    memory = dict(name="der", rows=6, tokens=4, batch=8, top_k=4)
    c = method_config("sft", stages=2, method=dict(replay=memory))
    with stage_fixtures.prepare_stage(c, tmp_path, number=2) as prepared:
        ctx, run = prepared.ctx, prepared.run
        kept = empty_memory(build.memory_objective_from_config(c).method.memory)
        kept |= {"seen": np.int32(8), "source": kept["row"], "length": kept["length"] + 2}
        ctx.memory = stage_memory.open_memory(run, ctx.stage, {"der": kept})
        stage = abstract_stage(ctx.config, run.model_ctx.cfg, run.model_ctx.mesh)
        planned = planned_programs(stage, training_programs(stage))
        (likeliest,) = stage_memory.stage_memory_programs(stage)
        ids, logps = likeliest.function.eval_shape(*likeliest.args)
        expected = programs.abstract_memory_batch(stage)
        length, buckets = expected.prompts.tokens.shape[1], device_batches.target_buckets
        use_largest_shapes(monkeypatch, stage)
        # A batch of the memory has eight rows, one of the stage four.
        of_rows = lambda shape: length if shape.rows == 8 else stage.longest_row
        pixels = ctx.config.model.max_pixels
        largest = lambda shape: collate.largest_batch_shape(
            stage.cfg, pixels, shape.rows, stage.shards, of_rows(shape)
        )
        of_length = lambda n: buckets(n) if n == length else [n]
        monkeypatch.setattr(device_batches, "target_buckets", of_length)
        monkeypatch.setattr(device_batches, "gather_batch_shape", largest)
        with (
            compiled_programs() as compiled,
            jax.set_mesh(stage.mesh),
            ctx.open_stream(0) as stream,
        ):
            step = train_loop.next_step_batch(ctx, prepared.params, stream, StageProgress())
            (batches,), (memory_batch,) = step.updates, step.memory
            prepared.programs.run(
                prepared.state, prepared.frozen, batches, 1e-3, prepared.arrays, memory_batch
            )
        check_programs(compiled, planned)
        assert shapes(memory_batch.extra) == shapes(expected.extra)
        assert ids.shape[1:] == expected.extra["memory_ids"].shape[1:]
        assert logps.shape[1:] == expected.extra["memory_logps"].shape[1:]
