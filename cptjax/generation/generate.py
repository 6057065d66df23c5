"""Sample responses to encoded prompts: settings, prepared weights, and responses decoded on the host."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cptjax import sharding
from cptjax.data.collate import EncodedConversation
from cptjax.data.model_context import ModelContext
from cptjax.generation import rollout_weights, sampler
from cptjax.models.load import MODEL_DTYPES
from cptjax.types import Params, Rollouts


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn."""

    group: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 64
    slots: int = 0
    check_every: int = 16
    gather: bool = False  # weights copied over fsdp while decoding
    dtype: str = ""  # of the arithmetic while decoding; "" = the runtime's, int8 = the runtime's with eight-bit weights


@dataclasses.dataclass(frozen=True)
class Samples:
    """Answers on the host, this process's rows; row q * G + g answers prompt q."""

    texts: list[str]
    tokens: np.ndarray  # [B R]
    mask: np.ndarray  # [B R]
    logps: np.ndarray  # [B R]
    policy_logps: np.ndarray  # [B R]
    finished: np.ndarray  # [B]


def prepare_sampling(
    runtime: ModelContext, params: Params, sampling: SamplingConfig
) -> tuple[Params, SamplingConfig]:
    """Weights as this sampling wants them, and the sampling that takes them as they are: once for several batches."""
    int8, dtype = sampling.dtype == "int8", sampling_dtype(sampling.dtype, runtime.dtype)
    if sampling.gather or int8:
        with jax.set_mesh(runtime.mesh):
            params = rollout_weights.prepare_rollout_weights(
                params, runtime.cfg, dtype=dtype, gather=sampling.gather, int8=int8
            )
    return params, dataclasses.replace(sampling, gather=False, dtype="" if int8 else sampling.dtype)


def sampling_dtype(name: str, own: Any) -> Any:
    """The type in which answers are drawn where `rollout.dtype` says `name`."""
    return own if name in ("", "int8") else MODEL_DTYPES[name]


def sample_responses(
    runtime: ModelContext,
    params: Params,
    encoded: Sequence[EncodedConversation],
    key: jax.Array,
    rows: np.ndarray,
    sampling: SamplingConfig,
    **more: Any,
) -> Samples:
    """Answers to encoded prompts; `rows` are the prompts' numbers in the whole run, on which their randomness depends."""
    with jax.set_mesh(runtime.mesh):
        params, sampling = prepare_sampling(runtime, params, sampling)
        out = sampler.generate_rollouts(
            params,
            runtime.prompts(encoded),
            key,
            runtime.cfg,
            rows=rows,
            group=sampling.group,
            max_new=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            slots=sampling.slots,
            check_every=sampling.check_every,
            dtype=sampling_dtype(sampling.dtype, runtime.dtype),
            **more,
        )
    return read_samples(runtime, out)


def read_samples(runtime: ModelContext, out: Rollouts) -> Samples:
    local = {f.name: sharding.local_rows(getattr(out, f.name)) for f in dataclasses.fields(out)}
    return Samples(decode_responses(runtime, local["tokens"], local["mask"]), **local)


def decode_responses(runtime: ModelContext, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Decoded answers without their stop token."""
    stops = set(runtime.cfg.eos)
    ids = [
        [int(t) for t in row[keep] if int(t) not in stops]
        for row, keep in zip(tokens, mask.astype(bool), strict=True)
    ]
    return runtime.processor.decode(ids)
