"""Check what this platform computes against float32: attention, packed groups, sampling.

    attention    each back end, and its gradients, against `reference_attention`; of packed groups,
                 also where they go back to the padded form
    groups       log-probabilities of packed groups, and of the same responses in rows of their own
    sampling     log-probabilities that the sampler returns: layers in a loop or not, slots, int8;
                 `trainer` compares them with the trainer's in the same dtype

The limits are those of the warning about sampler and trainer; int8 weights have another one.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptjax import sharding
from cptjax.benchmark.grpo_steps import with_other_layers
from cptjax.benchmark.phase_times import BenchModel
from cptjax.benchmark.workload import Workload, check_size
from cptjax.data import packing
from cptjax.generation import decode_loop, rollout_weights
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import attention, causal_lm, logprobs, trainable
from cptjax.training.train_loop import MAX_MISMATCH
from cptjax.types import Array, Batch, Params, Rollouts

# Of the largest value. A back end in bfloat16 rounds its inputs and its result.
MAX_ATTENTION_ERROR = {"float32": 1e-5, "bfloat16": 0.03}
MAX_INT8_ERROR = 0.1  # in nats per token on average; 0.03 with bfloat16 arithmetic on a CPU

Attend = Callable[[Array, Array, Array], Array]  # of queries, keys and values


@dataclasses.dataclass(frozen=True)
class Check:
    """The difference of a path from its reference."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


def run_checks(size: str) -> list[Check]:
    """Run every check with a model of a size of the benchmark."""
    check_size(size)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    shards = sharding.batch_shards(sharding.make_mesh())
    work = Workload(size, image=84, prompts=4 * shards, group=2, text=16, new=24, dtype=dtype)
    model = BenchModel(work, training=False)
    with jax.set_mesh(model.mesh):
        checks = [*check_attention(model), *check_group_attention(model)]
        return [*checks, *check_groups(model), *check_sampling(model)]


def check_attention(model: BenchModel) -> Iterator[Check]:
    """Compare the back end of the platform with the definition of attention."""
    rows = 2 * sharding.batch_shards(model.mesh)
    segments = jnp.repeat(jnp.array([[1, 1, 2, 2, 2, 2, 2, 0]]), 32, 1).repeat(rows, 0)

    def attend(backend: str) -> Attend:
        return functools.partial(
            attention.attend,
            q_segments=segments,
            kv_segments=segments,
            causal=True,
            backend=backend,
        )

    yield from compare_backends(model, "attention", attend, segments > 0)


def check_group_attention(model: BenchModel) -> Iterator[Check]:
    """Compare attention of packed groups with prompts and responses of random lengths."""
    shards, rng = sharding.batch_shards(model.mesh), np.random.default_rng(4)
    shapes = (2 * shards, 300), (6 * shards, 200)
    masks = [np.arange(n) < rng.integers(1, n + 1, (count, 1)) for count, n in shapes]
    segments = masks[0][:, ::-1].astype(np.int32)
    _, plan = packing.plan_packing(segments > 0, masks[1], shards)

    def attend(backend: str) -> Attend:
        return causal_lm.packed_attention(jnp.asarray(segments), shapes[1], plan, backend)

    own = model.cfg.compute.attention
    padded = ["cudnn_padded"] if own == "cudnn" else []
    yield from compare_backends(model, "attention of groups", attend, plan.source >= 0, padded)


def compare_backends(
    model: BenchModel,
    name: str,
    attend: Callable[[str], Attend],
    real: Array,
    more: Sequence[str] = (),
) -> Iterator[Check]:
    """Compare the back end of the platform, "xla" and `more` with "xla" in float32.

    The error is the largest of the values and the gradients of the `real` tokens [rows tokens].

    attend: returns the attention of a back end, a function of queries, keys and values
    """
    heads, kv_heads, width = model.cfg.text.heads, model.cfg.text.kv_heads, model.cfg.text.head_dim
    keys = jax.random.split(jax.random.key(3), 4)
    shapes = [(*real.shape, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, weight = (
        jax.random.normal(k, s, model.dtype) for k, s in zip(keys, shapes, strict=True)
    )

    def numbers(backend: str, *args: Array) -> list[Array]:
        def value(*args: Array) -> tuple[Array, Array]:
            out = jnp.where(real[..., None, None], attend(backend)(*args), 0)
            return jnp.sum(out * weight.astype(out.dtype), dtype=jnp.float32), out

        gradients, out = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))(*args)
        return [out, *gradients]

    with jax.default_matmul_precision("float32"):
        expected = numbers("xla", *(x.astype(jnp.float32) for x in inputs))
    for backend in dict.fromkeys(("xla", model.cfg.compute.attention, *more)):
        error = max(
            float(jnp.max(jnp.abs(x.astype(jnp.float32) - y)) / jnp.max(jnp.abs(y)))
            for x, y in zip(numbers(backend, *inputs), expected, strict=True)
        )
        yield Check(f"{name} {backend}", error, MAX_ATTENTION_ERROR[model.work.dtype])


def check_groups(model: BenchModel) -> Iterator[Check]:
    """Compare packed groups and unrelated rows with the unrelated rows in float32."""
    rows = model.micro_batches[0]
    groups = model.group_batch(jnp.asarray(rows.targets))
    expected = np.asarray(reference_logps(model, rows))
    for name, batch in (("unrelated rows", rows), ("packed groups", groups)):
        error = np.abs(np.asarray(model.score(model.params, batch)) - expected).mean()
        yield Check(f"log-probabilities of {name}", float(error), MAX_MISMATCH[model.work.dtype])


def check_sampling(model: BenchModel) -> Iterator[Check]:
    """Compare what the sampler returns with float32, and with the trainer."""
    limit, work = MAX_MISMATCH[model.work.dtype], model.work
    plain = SamplingConfig(work.group, work.new, temperature=1.0, check_every=8)
    slots = dataclasses.replace(plain, slots=work.prompts // 2)
    rows = dataclasses.replace(slots, slot_rows=work.group // 2)
    other = with_other_layers(model.cfg)
    cases = [
        ("sampling", plain, model.cfg, limit),
        ("sampling with slots", slots, model.cfg, limit),
        ("sampling with slots of fewer rows", rows, model.cfg, limit),
        (
            f"sampling with layers {'unrolled' if other.compute.unroll else 'in a loop'}",
            plain,
            other,
            limit,
        ),
        (
            "sampling with int8 weights",
            dataclasses.replace(plain, dtype="int8"),
            model.cfg,
            MAX_INT8_ERROR,
        ),
    ]
    for name, sampling, cfg, most in cases:
        rollouts = sample(model, sampling, cfg)
        batch = model.group_batch(rollouts.tokens)
        logps = np.asarray(rollouts.policy_logps)
        error = np.abs(logps - np.asarray(reference_logps(model, batch))).mean()
        yield Check(name, float(error), most)
        if sampling is plain and cfg is model.cfg:
            gap = np.abs(logps - np.asarray(model.score(model.params, batch))).mean()
            yield Check("trainer against sampler", float(gap), limit)


def sample(model: BenchModel, sampling: SamplingConfig, cfg: Any) -> Rollouts:
    """Sample responses of full length."""
    weights = rollout_weights.prepare_rollout_weights(model.params, cfg, sampling, model.dtype)
    return decode_loop.generate_rollouts(
        weights, model.prompts, model.key, cfg, sampling, dtype=model.dtype, stop=(-1,)
    )


def reference_logps(model: BenchModel, batch: Batch) -> Array:
    """Compute log-probabilities in float32 with the attention of every platform."""
    params: Params = trainable.cast_params(model.params, jnp.float32)
    cfg = model.cfg.with_compute(attention="xla")
    score = logprobs.make_scoring_program(cfg, jnp.float32, model.work.chunk, 1.0)
    with jax.default_matmul_precision("float32"):
        return score(params, batch)
