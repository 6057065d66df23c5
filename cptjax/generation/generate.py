"""Sample responses to encoded prompts: prepare weights, run the decode loop, decode the tokens."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from cptjax import sharding
from cptjax.common import console, device_time
from cptjax.data.collate import EncodedConversation
from cptjax.data.model_context import ModelContext
from cptjax.generation import decode_loop, rollout_weights
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.sharding import constrain
from cptjax.types import Params, Prompts, Rollouts


@dataclasses.dataclass(frozen=True)
class Samples:
    """This process's responses on the host; row q * G + g is response g to prompt q."""

    texts: list[str]
    tokens: np.ndarray  # [B R]
    mask: np.ndarray  # [B R]
    logps: np.ndarray  # [B R]
    policy_logps: np.ndarray  # [B R]
    finished: np.ndarray  # [B]

    def restore_order(self, order: np.ndarray) -> "Samples":
        """Return the responses by prompt; sampled group i responds to prompt `order[i]`."""
        group = len(self.texts) // len(order)
        rows = (np.argsort(order)[:, None] * group + np.arange(group)).ravel()
        arrays = {f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)[1:]}
        return Samples([self.texts[r] for r in rows], **arrays)


def prepare_weights(model_ctx: ModelContext, params: Params, sampling: SamplingConfig) -> Params:
    """Return the weights that `sample_responses` takes: `params`, or a gathered or int8 copy.

    Call this function once for several batches.
    """
    if sampling.gather is None and rollout_weights.fsdp_mesh(params) is not None:
        _tell_once(_describe_gathering(model_ctx, params, sampling))
    with jax.set_mesh(sampling.mesh(model_ctx.mesh)):
        return rollout_weights.prepare_rollout_weights(
            params, model_ctx.cfg, sampling, model_ctx.dtype
        )


def _describe_gathering(model_ctx: ModelContext, params: Params, sampling: SamplingConfig) -> str:
    """Return a sentence about what `rollout.gather=None` decides."""
    args = params, model_ctx.cfg, sampling, model_ctx.dtype
    size = rollout_weights.gathered_bytes(*args) / 2**30
    size = f"{size:.1f} GiB a device with the models of training"
    if rollout_weights.gathers_weights(*args):
        return f"rollouts: every device gets a copy of the weights ({size}); see rollout.gather"
    return (
        f"rollouts: every decode step transfers the weights, because a copy ({size}) does not fit "
        "or the memory of the devices is unknown; see rollout.gather"
    )


@functools.lru_cache(maxsize=32)
def _tell_once(text: str) -> None:
    console.print_message(text)


def sample_responses(
    model_ctx: ModelContext,
    weights: Params,
    encoded: Sequence[EncodedConversation],
    key: jax.Array,
    rows: np.ndarray,
    sampling: SamplingConfig,
    limits: np.ndarray | None = None,
) -> Samples:
    """Sample responses to encoded prompts with the weights of `prepare_weights`.

    rows: the number of each prompt in the run, from which its random keys are derived.
    limits: the most tokens of a response, by prompt.
    """
    prompts = model_ctx.place_prompts(encoded)
    return sample_from_prompts(model_ctx, weights, prompts, key, rows, sampling, limits)


def sample_from_prompts(
    model_ctx: ModelContext,
    weights: Params,
    prompts: Prompts,
    key: jax.Array,
    rows: np.ndarray,
    sampling: SamplingConfig,
    limits: np.ndarray | None = None,
    on_texts: Callable[[list[int], list[list[str]]], None] | None = None,
) -> Samples:
    """Do what `sample_responses` does, for left-padded prompts that are already on the mesh.

    on_texts: is called with indices of this process's prompts and the texts of their groups, each
        group once; with `sampling.slots`, while the device decodes other groups.
    """
    own = {number: q for q, number in enumerate(sharding.local_row_numbers(prompts.tokens))}
    texts: dict[int, list[str]] = {}  # of the group of each prompt of this process

    def take(numbers: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> None:
        chosen = [i for i, number in enumerate(numbers) if number in own]
        indices = [own[numbers[i]] for i in chosen]
        groups = [decode_responses(model_ctx, tokens[i], lengths[i]) for i in chosen]
        texts.update(zip(indices, groups, strict=True))
        if on_texts is not None and indices:
            on_texts(indices, groups)

    began = time.perf_counter()
    with jax.set_mesh(sampling.mesh(model_ctx.mesh)):
        out = decode_loop.generate_rollouts(
            weights,
            prompts,
            key,
            model_ctx.cfg,
            sampling,
            dtype=model_ctx.dtype,
            limits=limits,
            rows=rows,
            on_finished=take,
        )
    device_time.watch("rollout", began, out)
    if sampling.model:
        with jax.set_mesh(model_ctx.mesh):
            out = _shard_rows(out)
    local = {f.name: sharding.local_rows(getattr(out, f.name)) for f in dataclasses.fields(out)}
    groups = local["tokens"].reshape(len(own), sampling.group, -1)
    lengths = local["mask"].sum(1).reshape(len(own), sampling.group)
    rest = [q for q in range(len(own)) if q not in texts]
    take(np.array(list(own))[rest], groups[rest], lengths[rest])
    return Samples([text for q in range(len(own)) for text in texts[q]], **local)


@jax.jit
def _shard_rows(out: Rollouts) -> Rollouts:
    """Return the rows to the processes that have their prompts."""
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), out)


def decode_responses(model_ctx: ModelContext, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Return the texts of responses [n R] with so many tokens, without the stop tokens."""
    stops = set(model_ctx.cfg.eos)
    return model_ctx.processor.decode(
        [
            [t for t in row[:length].tolist() if t not in stops]
            for row, length in zip(tokens, lengths, strict=True)
        ]
    )
