"""The programs of a training stage with abstract arguments at its largest shapes, for planning.

The largest shapes are: prompts of the longest bucket of `data` with one image of `model.max_pixels`
each (sides up to 4 : 1), responses of `rollout.max_new_tokens` (SFT: responses as long as the row),
`train.micro_batch` rows in a device pass.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.common.compiler_options import PlatformJit
from cptjax.common.program import Program
from cptjax.config import merge_config
from cptjax.data import balance, collate, device_batches
from cptjax.data.collate import max_image_slots
from cptjax.data.data_config import DataConfig
from cptjax.data.packing import packing_shapes
from cptjax.generation import decode_loop
from cptjax.generation.sampling_config import SamplingConfig, rollout_sampling
from cptjax.models import flops, load, trainable
from cptjax.models.config import ModelConfig
from cptjax.sharding import abstract_array
from cptjax.training import build, step_batch, tower_states, train_step
from cptjax.training.algorithms import distillation
from cptjax.training.algorithms.continual_learning.hooks import (
    HookArrays,
    KeptLayout,
    Methods,
    overrides_hook,
)
from cptjax.training.algorithms.continual_learning.memory import memory_shapes
from cptjax.training.algorithms.continual_learning.table import continual_methods
from cptjax.training.algorithms.objective import MemoryObjective
from cptjax.training.method_needs import MethodNeeds, method_needs
from cptjax.training.step_batch import StepLayout
from cptjax.training.tower_states import for_other_tower
from cptjax.types import Batch, Params, Prompts, TrainState

TEACHER_STATES = "teacher states"
MEMORY_GRADIENT = "memory gradient"
DEMONSTRATION_TEMPLATE_TOKENS = (
    24  # around a demonstration; the exact number depends on the tokenizer
)


@dataclasses.dataclass(frozen=True)
class AbstractStage:
    """A stage on a mesh: its config, and the shapes of all models that stay in memory."""

    config: ConfigDict
    cfg: ModelConfig
    mesh: Mesh
    dtype: Any  # of the arithmetic
    declared: Params
    state: TrainState
    frozen: Params
    start: Params | None  # the model at the stage's start
    reference: Params | None  # of the KL term
    reference_cfg: ModelConfig
    teacher: Params | None
    teacher_cfg: ModelConfig
    methods: Methods  # continual-learning methods that act in the update
    arrays: HookArrays  # of the methods, after an earlier stage with them
    memory: MemoryObjective | None

    @property
    def needs(self) -> MethodNeeds:
        return method_needs(self.config.method, self.config.rollout.ahead)

    @property
    def shards(self) -> int:
        return sharding.batch_shards(self.mesh)

    @property
    def layout(self) -> StepLayout:
        """How the rows of a step are cut."""
        train = self.config.train
        return step_batch.step_layout(
            self.config.method, train.batch, train.micro_batch, self.shards
        )

    @property
    def shares_tower(self) -> bool:
        """Whether the models of a step share the states of a frozen vision tower."""
        return tower_states.shares_tower(self.config, self.cfg)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return DataConfig.from_config(self.config.data).longest_row

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that is trained on."""
        c = self.config
        added = step_batch.extra_response_tokens(c.method, c.rollout.max_new_tokens)
        return max(collate.extend_buckets((self.longest_prompt,), added))

    @property
    def params(self) -> Params:
        return trainable.join_params(self.state.params, self.frozen)

    @property
    def resident(self) -> dict[str, Any]:
        """What stays in memory during the stage, by name.

        Models share arrays; an array counts under the first name that has it.
        """
        state = self.state
        trees = {
            "trained weights": state.params,
            "frozen weights": self.frozen,
            "optimiser": (state.opt_state, state.step, state.skipped),
            "reference": self.reference,
            "teacher": self.teacher,
            "continual learning": self.arrays if jax.tree.leaves(self.arrays) else None,
            "stage's start": self.start,
        }
        return {name: tree for name, tree in trees.items() if tree is not None}


def abstract_stage(config: ConfigDict, cfg: ModelConfig, mesh: Mesh) -> AbstractStage:
    """Return the shapes of a stage's models on a mesh.

    `cfg` is the model config of `config.model`, fitted to the mesh.
    """
    model, method = config.model, config.method
    rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    declared = load.declare_model_params(model, cfg)
    dtype, param_dtype = (
        load.MODEL_DTYPES[name] for name in (model.compute_dtype, model.param_dtype)
    )
    is_trained = trainable.is_trained(model.freeze, model.lora.rank)
    trained_params, frozen_params = trainable.split_params(declared, is_trained)

    def abstract(params: Params, dtype: Any) -> Params:
        return sharding.abstract_params(params, dtype, mesh, rules)

    frozen = abstract(frozen_params, dtype)
    optimizer = build.optimizer_from_config(config, declared)
    methods = build.step_methods_from_config(config)
    trained = abstract(trained_params, param_dtype)
    state = train_step.abstract_state(optimizer, trained, mesh, methods)

    def earlier_model(dtype: Any) -> Params:
        """Return the shapes of the model at an earlier time, which shares its frozen weights."""
        if any(overrides_hook(m, "frozen_weights") for m in continual_methods(method)):
            return abstract(declared, dtype)
        return trainable.join_params(abstract(trained_params, dtype), frozen)

    def other_model(folder: str) -> tuple[ModelConfig, Params]:
        settings = other_model_settings(config, folder)
        other_cfg = load.fit_config(load.find_model_config(settings), settings, mesh)
        return other_cfg, abstract(load.declare_model_params(settings, other_cfg), dtype)

    needs = method_needs(method)
    start = reference = teacher = None
    reference_cfg = teacher_cfg = cfg
    if needs.start:
        start = earlier_model(param_dtype if needs.start == "exact" else dtype)
    if needs.reference == "stage":
        reference = start
    elif needs.reference == "base":
        reference = earlier_model(dtype)
    elif needs.reference:
        reference_cfg, reference = other_model(needs.reference)
    if needs.teacher == "model":
        teacher_cfg, teacher = other_model(method.distill.teacher)
    elif needs.teacher == "follower":
        teacher = trainable.join_params(abstract(trained_params, jnp.float32), frozen)
    elif needs.teacher:
        teacher = start
    layout = KeptLayout(trained, mesh, max(len(config.stages) - 1, 1))
    on_devices = [m for m in continual_methods(method) if m.memory is None]
    kept = {m.name: m.kept_shapes(layout) for m in on_devices}
    trained_start = None
    if any(m.needs_start for m in methods):
        trained_start = trainable.split_params(start, is_trained)[0]
    kept = {name: tree for name, tree in kept.items() if tree is not None}
    arrays = HookArrays(trained_start, kept)
    return AbstractStage(
        config,
        cfg,
        mesh,
        dtype,
        declared,
        state,
        frozen,
        start,
        reference,
        reference_cfg,
        teacher,
        teacher_cfg,
        methods,
        arrays,
        build.memory_objective_from_config(config),
    )


def other_model_settings(config: ConfigDict, folder: str) -> ConfigDict:
    """Return `config.model` for another model, which is not trained."""
    changes = {"path": folder, "preset": "", "freeze": (), "lora": {"rank": 0}}
    return merge_config(config, {"model": changes}).model


# ---- batches -------------------------------------------------------------------------------------


def abstract_prompts(
    stage: AbstractStage, rows: int, length: int, micro_batches: int = 1
) -> Prompts:
    """Return `rows` prompts of `length` tokens with an image each, joined from micro-batches."""
    part = collate.largest_batch_shape(
        stage.cfg, stage.config.model.max_pixels, rows // micro_batches, stage.shards, length
    )
    shape = dataclasses.replace(part, rows=rows, vision_rows=part.vision_rows * micro_batches)
    prompts = collate.prompt_arrays(shape, stage.shards, stage.cfg)
    return sharding.place_prompts(prompts, stage.mesh)


def share_tower(stage: AbstractStage, prompts: Prompts) -> Prompts:
    """Return the prompts as the models of a step take them."""
    if not stage.shares_tower:
        return prompts
    program = tower_states.make_tower_program(stage.cfg, stage.dtype)
    states = program.eval_shape(tower_states.tower_params(stage.params), prompts.vision)
    axes = ("batch",), (None, "batch")  # of the states after the last block, and of the others
    states = tuple(
        abstract_array(x.shape, x.dtype, stage.mesh, names)
        for x, names in zip(states, axes, strict=False)
    )
    return tower_states.replace_images(prompts, states, stage.needs)


def abstract_conversations(
    stage: AbstractStage, rows: int, length: int, response: int = 0, packed: bool = False
) -> Batch:
    """Return `rows` conversations of `length` tokens.

    response: the most tokens of a response; 0 = it may fill the whole row
    packed: a row may have several conversations
    """
    prompts = abstract_prompts(stage, rows, length).replace(right_padded=not packed)
    buckets = device_batches.target_buckets(length)
    width = collate.smallest_bucket(min(response or length, length), buckets)
    return sharding.place_batch(device_batches.conversation_arrays(prompts, width), stage.mesh)


def abstract_groups(stage: AbstractStage, rows: int, length: int, balanced: bool = False) -> Batch:
    """Return `rows` prompts of `length` tokens with their groups of responses.

    balanced: responses have moved between shards (`data.balance`), to rows as long as those can be
    """
    r, longest = stage.config.rollout, None
    prompts = abstract_prompts(stage, rows, length)
    if balanced:
        longest = stage_balanced_row(stage, rows)
        prompts = balance.abstract_moved_prompts(stage.cfg, stage.mesh, prompts)
        rows = len(prompts.tokens)
    shape = (rows * r.group, r.max_new_tokens)
    where, packing = packing_shapes((rows, length), shape, stage.shards, longest)
    rest = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool), where
    return Batch(prompts, *sharding.place_rows((*rest, {}, packing), stage.mesh))


def stage_balanced_row(stage: AbstractStage, rows: int) -> int:
    """Return the most tokens of a shard after responses to `rows` prompts have moved; 0 = never."""
    r = stage.config.rollout
    if stage.config.method.source != "rollouts":
        return 0
    shape = rows // stage.shards, stage.longest_prompt, r.group, r.max_new_tokens
    return balance.longest_balanced_row(stage.cfg, stage.mesh, *shape)


def abstract_scoring_batch(stage: AbstractStage, rows: int, balanced: bool = False) -> Batch:
    """Return one device pass of the programs of log-probabilities; see `abstract_groups`."""
    if stage.config.method.source == "rollouts":
        batch = abstract_groups(stage, rows, stage.longest_prompt, balanced)
    else:
        packed = build.packs_conversations(stage.config)
        batch = abstract_conversations(stage, rows, stage.longest_row, packed=packed)
    return batch.replace(prompts=share_tower(stage, batch.prompts))


def abstract_memory_batch(stage: AbstractStage) -> Batch:
    """Return the batch of the memory of an update."""
    settings = stage.memory.method.memory
    rows = device_batches.pad_to_shards(settings.batch, stage.shards)
    batch = abstract_memory_rows(stage, rows)
    extra = {
        f"memory_{name}": abstract_array(
            (*batch.targets.shape, array.shape[2]), array.dtype, stage.mesh, ("batch",)
        )
        for name, array in memory_shapes(settings).items()
        if name in ("ids", "logps")
    }
    return batch.replace(extra=batch.extra | extra)


def abstract_memory_rows(stage: AbstractStage, rows: int) -> Batch:
    """Return `rows` conversations with responses of the memory."""
    tokens = stage.memory.method.memory.tokens
    length = max(collate.extend_buckets((stage.longest_prompt,), tokens))
    return abstract_conversations(stage, rows, length, tokens)


def abstract_update_batch(stage: AbstractStage, rows: int, balanced: bool = False) -> Batch:
    """Return one device pass of the update, with advantages and the outputs of other models."""
    batch, text = abstract_scoring_batch(stage, rows, balanced), stage.teacher_cfg.text
    shapes = {
        "B": batch.targets.shape[:1],
        "B A": batch.targets.shape,
        "B A D": (*batch.where.shape, text.width),
        "D V": (text.width, text.vocab),
    }
    axes = {"B": ("batch",), "B A": ("batch",), "B A D": ("batch",), "D V": ("embed", "vocab")}
    extra = {
        name: abstract_array(
            shapes[letters],
            stage.dtype if name.startswith("teacher_") else jnp.float32,
            stage.mesh,
            axes[letters],
        )
        for name, letters in stage.needs.arrays.items()
    }
    return batch.replace(extra=batch.extra | extra)


# ---- FLOPs of the model, by formula --------------------------------------------------------------


def vision_forward(stage: AbstractStage, rows: int) -> float:
    """Count the FLOPs of the vision tower for one image of the largest size in each row."""
    slots = max_image_slots(stage.cfg, stage.config.model.max_pixels)
    return flops.vision_forward_flops(stage.cfg, rows * slots, slots)


def text_forward(stage: AbstractStage, rows: int) -> float:
    """Count the FLOPs of the text model in one device pass."""
    r, length = stage.config.rollout, stage.longest_row
    if stage.config.method.source == "rollouts":
        return flops.group_forward_flops(stage.cfg, rows, length, r.group, r.max_new_tokens)
    return flops.text_forward_flops(stage.cfg, rows, length, length)


def forward_flops(stage: AbstractStage, layout: StepLayout, own_tower: bool = False) -> float:
    """Count the FLOPs of a device pass, without the empty rows that fill it up.

    own_tower: the model does not share the policy's
    """
    rows = layout.filled_rows
    vision = 0.0 if stage.shares_tower and not own_tower else vision_forward(stage, rows)
    return text_forward(stage, rows) + vision


def update_flops(stage: AbstractStage, rows: int) -> float:
    """Count the FLOPs of a forward and backward pass.

    Frozen weights need no gradient, and a frozen vision tower needs no backward pass.
    """
    vision = 0.0 if stage.shares_tower else vision_forward(stage, rows)
    return backward_flops(stage, text_forward(stage, rows), vision)


def backward_flops(stage: AbstractStage, text: float, vision: float) -> float:
    """Count the FLOPs of forward and backward passes from those of the forward passes."""
    m = stage.config.model
    costs = flops.training_pass_costs(m.freeze, m.lora.rank, m.lora.vision)
    return costs.text * text + costs.vision * vision


# ---- programs ------------------------------------------------------------------------------------


def training_programs(stage: AbstractStage) -> list[Program]:
    """Return the programs of a stage in the order of their calls."""
    layout = stage.layout
    return [
        *tower_programs(stage, layout),
        *rollout_programs(stage),
        *scoring_programs(stage, layout),
        *teacher_programs(stage, layout),
        *memory_programs(stage, layout.updates),
        *update_programs(stage, layout),
    ]


def waiting_batches(stage: AbstractStage, in_use: int) -> tuple[Batch, ...]:
    """Return the micro-batches that are on the device during a program that uses `in_use` of them.

    These are all of a step, and those of the next step where no weights are needed to build them,
    or those before the update are enough.
    """
    source, ahead = stage.config.method.source, stage.config.rollout.ahead
    steps = 1 if source == "self" or (source == "rollouts" and not ahead) else 2
    count = stage.layout.total_micro_batches * steps
    return (abstract_scoring_batch(stage, stage.layout.rows),) * (count - in_use)


def tower_programs(stage: AbstractStage, layout: StepLayout) -> list[Program]:
    """Return the program of the states of the frozen vision tower that the models share."""
    if not stage.shares_tower:
        return []
    longest = stage.longest_prompt if stage.config.method.source == "rollouts" else 0
    vision = abstract_prompts(stage, layout.rows, longest or stage.longest_row).vision
    program = tower_states.make_tower_program(stage.cfg, stage.dtype)
    args = tower_states.tower_params(stage.params), vision
    useful, calls = vision_forward(stage, layout.filled_rows), layout.total_micro_batches
    return [Program("vision tower", program, args, calls, useful, others=waiting_batches(stage, 1))]


def rollout_programs(stage: AbstractStage) -> list[Program]:
    """Return the sampling programs: those of the offline filter, then those of the stage."""
    c, needs = stage.config, stage.needs
    sampling = rollout_sampling(c)
    rows = device_batches.pad_to_shards(c.train.batch, stage.shards)
    programs = []
    if needs.filter_sampling:
        several = dataclasses.replace(sampling, **needs.filter_sampling)
        loaded = ["trained weights", "frozen weights", "stage's start"]
        loaded += [] if c.train.reset_optimizer else ["optimiser"]
        not_loaded = tuple(name for name in stage.resident if name not in loaded)
        programs += [
            dataclasses.replace(program, not_loaded=not_loaded)
            for program in response_programs(stage, "filter", rows, [several], 0.0)
        ]
    if needs.self_samples:
        several = dataclasses.replace(sampling, group=needs.self_samples)
        programs += response_programs(stage, "rollouts", rows, [several], 0.0)
    if c.method.source == "rollouts":
        samplings = [sampling, sampling.greedy()] if needs.greedy_samples else [sampling]
        cuts = stage.layout.total_micro_batches
        sampled = response_programs(stage, "rollouts", c.train.batch, samplings, 1.0, cuts, True)
        # The prompts of micro-batches wait for the update; one alone is itself the joined batch.
        part = abstract_prompts(stage, stage.layout.rows, stage.longest_prompt)
        parts = (share_tower(stage, part),) * cuts
        others = parts if cuts > 1 else ()
        programs += [dataclasses.replace(program, others=others) for program in sampled]
    return programs


def response_programs(
    stage: AbstractStage,
    name: str,
    rows: int,
    samplings: list[SamplingConfig],
    calls: float,
    micro_batches: int = 1,
    of_step: bool = False,
) -> list[Program]:
    """Return the programs that sample responses to `rows` prompts, joined from micro-batches.

    The program that joins them only copies them, and is left out. A second entry of `samplings` is
    greedy sampling.

    of_step: the prompts are those of a step, whose models may share a vision tower
    """
    if rows % stage.shards:
        raise ValueError(
            f"{name}: {rows} prompts; config.mesh cuts a batch into {stage.shards} shards "
            "(data x fsdp): expected a multiple"
        )
    programs, weights = decode_loop.weights_programs(
        name, stage.params, samplings[0], stage.cfg, stage.dtype, calls
    )
    kept = tuple(program.name for program in programs)
    prompts = abstract_prompts(stage, rows, stage.longest_prompt, micro_batches)
    vision_flops = vision_forward(stage, rows)
    if of_step and stage.shares_tower:
        prompts, vision_flops = share_tower(stage, prompts), 0.0
    for label, sampling in zip((name, "greedy responses"), samplings, strict=False):
        programs += decode_loop.sampling_programs(
            label,
            weights,
            prompts,
            sampling,
            stage.cfg,
            stage.dtype,
            stage.mesh,
            calls=calls,
            vision_flops=vision_flops,
            kept=kept,
        )
    return programs


def scoring_programs(stage: AbstractStage, layout: StepLayout) -> list[Program]:
    """Return the programs of log-probabilities under the reference, and under the policy.

    The policy before the updates is scored only for the updates that need its log-probabilities.
    """
    models, needs = {}, stage.needs
    if stage.reference is not None:
        models["reference log-probs"] = stage.reference
    if needs.drift and stage.start is not stage.reference:
        models["start log-probs"] = stage.start
    if needs.policy_logps:
        models["own log-probs"] = stage.params
    batch, calls = abstract_scoring_batch(stage, layout.rows), layout.total_micro_batches
    others, programs = waiting_batches(stage, 1), []
    for name, params in models.items():
        own_tower = name == "reference log-probs" and needs.other_reference
        seen = for_other_tower(batch) if own_tower else batch
        cfg = stage.reference_cfg if own_tower else stage.cfg
        score = build.scoring_program_from_config(cfg, stage.dtype, stage.config)
        useful = forward_flops(stage, layout, own_tower)
        is_later = name == "own log-probs" and not needs.first_policy_logps
        count = calls - layout.micro_batches if is_later else calls
        programs.append(Program(name, score, (params, seen), count, useful, others=others))
    return programs


def teacher_programs(stage: AbstractStage, layout: StepLayout) -> list[Program]:
    """Return the program of the teacher's states on each device pass of the updates."""
    if stage.teacher is None:
        return []
    c = stage.config
    batch, others = abstract_scoring_batch(stage, layout.rows), waiting_batches(stage, 1)
    own_tower = stage.needs.demonstrations or stage.needs.teacher == "model"
    if own_tower:
        batch = for_other_tower(batch)
    if stage.needs.demonstrations:
        demonstration = c.rollout.max_new_tokens + DEMONSTRATION_TEMPLATE_TOKENS
        longest = max(collate.extend_buckets((stage.longest_prompt,), demonstration))
        batch = abstract_groups(stage, layout.rows, longest)
        others = waiting_batches(stage, 0)
    program = distillation.make_teacher_program(stage.teacher_cfg, stage.dtype)
    args, calls = (stage.teacher, batch), layout.micro_batches * layout.updates
    useful = forward_flops(stage, layout, own_tower)
    return [Program(TEACHER_STATES, program, args, calls, useful, others=others)]


def memory_programs(stage: AbstractStage, updates: int) -> list[Program]:
    """Return the program of the gradient of the memory's loss."""
    if stage.memory is None:
        return []
    batch = abstract_memory_batch(stage)
    rows, length = batch.prompts.tokens.shape
    text = flops.text_forward_flops(stage.cfg, rows, length, batch.targets.shape[1])
    useful = backward_flops(stage, text, vision_forward(stage, rows))
    args, gradient = (stage.state.params, stage.frozen, batch), step_programs(stage).memory_gradient
    others = waiting_batches(stage, 0)
    return [Program(MEMORY_GRADIENT, gradient, args, updates, useful, others=others)]


def update_programs(stage: AbstractStage, layout: StepLayout) -> list[Program]:
    """Return one fused step, or programs that sum gradients over micro-batches and apply them.

    The program of balanced shards takes the place of another one in some steps, so it has no calls
    of its own.
    """
    state, frozen, steps = stage.state, stage.frozen, step_programs(stage)
    batch, passes, updates = (
        abstract_update_batch(stage, layout.rows),
        layout.micro_batches,
        layout.updates,
    )
    lr, of_memory = abstract_array((), jnp.float32, stage.mesh), None
    if steps.memory_gradient is not None:
        memory_batch = abstract_memory_batch(stage)
        of_memory = abstract_gradient_sum(steps.memory_gradient, stage, memory_batch)
    useful, others = update_flops(stage, layout.filled_rows), waiting_batches(stage, 1)
    batches = [("", batch, passes * updates)]
    if stage_balanced_row(stage, layout.rows):
        balanced = abstract_update_batch(stage, layout.rows, balanced=True)
        batches.append((", balanced shards", balanced, 0.0))
    if passes == 1:
        return [
            Program(
                f"train step{name}",
                steps.step,
                (state, frozen, batch, lr, stage.arrays, of_memory),
                calls,
                useful,
                others=others,
            )
            for name, batch, calls in batches
        ]
    # The teacher's states of all micro-batches of an update are computed before its first gradient.
    kept = (TEACHER_STATES,) * passes if stage.teacher is not None else ()
    total = abstract_gradient_sum(steps.begin, stage, batch)
    apply_args = (state, total, lr, stage.arrays, of_memory)
    waiting = (MEMORY_GRADIENT,) if stage.memory is not None else ()
    add = [
        Program(
            f"add gradients{name}",
            steps.add,
            (total, state.params, frozen, batch),
            calls,
            useful,
            kept[1:] + waiting,
            others=others,
        )
        for name, batch, calls in batches
    ]
    everything = waiting_batches(stage, 0)
    finish = Program(
        "apply gradients", steps.finish, apply_args, updates, 0.0, kept, others=everything
    )
    return [*add, finish]


def step_programs(stage: AbstractStage) -> train_step.StepPrograms:
    """Return the programs of the updates of a stage."""
    return train_step.make_step_programs(
        train_step.StepFunctions(
            stage.cfg,
            build.objective_from_config(stage.config),
            build.optimizer_from_config(stage.config, stage.declared),
            train_step.StateShardings.of(stage.state),
            stage.dtype,
            stage.methods,
            stage.memory,
            stage.config.log.changed_weights,
        )
    )


def abstract_gradient_sum(
    gradient: PlatformJit, stage: AbstractStage, batch: Batch
) -> train_step.GradientSum:
    """Return the shapes of the gradients that a program sums.

    Each gradient is sharded like its parameter; all other arrays are replicated.
    """
    trained = stage.state.params
    total = gradient.eval_shape(trained, stage.frozen, batch)
    gradient = jax.tree.map(
        lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding),
        total.gradient,
        trained,
    )
    rest = jax.tree.map(
        lambda x: abstract_array(x.shape, x.dtype, stage.mesh), total.replace(gradient=None)
    )
    return rest.replace(gradient=gradient)
