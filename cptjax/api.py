"""The Python interface: load, generate, score, logits, save.

Conversations are in the Hugging Face chat format; images are PIL images, paths or bytes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.common import buckets
from cptjax.continual.stage_model import check_folder_kind, folder_kind, load_stage_model
from cptjax.data.collate import EncodedConversation, collate_rows, length_buckets, round_up_size
from cptjax.data.processor import Processor, load_processor
from cptjax.generation import decode_loop
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import causal_lm, decoder, hf_checkpoint, logprobs, trainable
from cptjax.models.config import ModelConfig
from cptjax.models.families import PRESETS
from cptjax.models.hf_config import read_model_config
from cptjax.models.load import MODEL_DTYPES, fit_for_inference
from cptjax.sharding import place_prompts
from cptjax.types import Array, Params, Prompts

Conversation = Sequence[dict[str, Any]]
MAX_SAMPLES = 4096  # responses to one conversation, which are decoded at a time
CHECK_EVERY = 16  # decode steps between two checks of whether all responses are done


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model, ready to generate and score."""

    config: ModelConfig
    params: Params
    processor: Processor
    mesh: Mesh
    dtype: str


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
    *,
    stage: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    seed: int = 0,
) -> Model:
    """Load a model.

    path: a Hugging Face folder or hub id; the workdir of a run, for the model of its last finished
        stage or of `stage` (0 = base); or the name of a preset, for random weights.
    mesh: the mesh that the weights are placed on; None = a mesh that shards them over all devices.
    min_pixels, max_pixels: of an image of a folder, hub id or preset; a workdir has its run's.
    seed: of the random weights of a preset.
    """
    if not str(path):
        raise ValueError("the path of the model is empty; is a shell variable not set?")
    if dtype not in MODEL_DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(MODEL_DTYPES)}")
    mesh = sharding.make_mesh() if mesh is None else mesh
    path = buckets.fetch(path) if buckets.is_address(path) else path
    kind = folder_kind(Path(path))
    if kind == "run":
        if min_pixels is not None or max_pixels is not None:
            raise ValueError(
                f"min_pixels={min_pixels}, max_pixels={max_pixels}: expected None for a workdir, "
                "whose images have the pixel limits of its run; leave them out"
            )
        model_ctx, params, _ = load_stage_model(path, mesh, stage, dtype)
        params = trainable.cast_params(params, MODEL_DTYPES[dtype])
        return Model(model_ctx.cfg, params, model_ctx.processor, mesh, dtype)
    if stage is not None:
        raise ValueError(f"stage={stage}: expected the workdir of a run, got {path} without stages")
    if kind in ("runs", "orbax"):
        check_folder_kind("path", path, "hf")
    source = None if str(path) in PRESETS and not Path(path).is_dir() else path
    cfg = read_model_config(source) if source else PRESETS[str(path)]
    cfg = fit_for_inference(cfg, mesh, dtype)
    processor = load_processor(source, cfg, min_pixels, max_pixels)
    if source:
        params = hf_checkpoint.load_hf_checkpoint(source, cfg, mesh, MODEL_DTYPES[dtype])
    else:
        rules = sharding.rules_for(cfg.text.kv_heads, mesh)
        declared = causal_lm.declare_params(cfg)
        key = jax.random.key(seed)
        params = sharding.init_params(declared, key, MODEL_DTYPES[dtype], mesh, rules)
    return Model(processor.cfg, params, processor, mesh, dtype)


def generate(
    model: Model,
    conversations: Sequence[Conversation],
    n: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: Sequence[str] | str = (),
    seed: int = 0,
    batch: int = 64,
) -> list[list[str]]:
    """Return `n` responses to each conversation, without their end tokens.

    temperature: 0 is greedy, so all responses to a conversation are equal.
    stop: strings; a response ends before the first of them.
    batch: conversations that are decoded at a time; the responses do not depend on it.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop={stop!r}: expected strings with at least one character")
    if not 1 <= n <= MAX_SAMPLES or not 0 <= seed < 2**32:
        raise ValueError(
            f"n={n}, seed={seed}: expected 1 to {MAX_SAMPLES} responses, and a seed from 0 to "
            "2**32 - 1"
        )
    if max_new_tokens > model.config.text.max_positions:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: expected at most the "
            f"{model.config.text.max_positions} positions of the model"
        )
    if temperature == 0 and (top_p, top_k, min_p) != (1.0, 0, 0.0):
        raise ValueError(
            f"top_p={top_p}, top_k={top_k}, min_p={min_p}: expected a temperature above 0 with "
            "them, got 0, which is greedy; set the temperature, or leave them out"
        )
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1 conversation")
    # A stop string of one token ends its row on the device. A longer one has several tokenizations,
    # so it is searched for in the text.
    single = [ids[0] for ids in map(model.processor.ids, stops) if len(ids) == 1]
    sampling = SamplingConfig(
        group=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        check_every=CHECK_EVERY,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
    )
    encoded = _encode(model, conversations)
    responses: list[list[str]] = []
    for start in range(0, len(encoded), batch):
        part = encoded[start : start + batch]
        with jax.set_mesh(model.mesh):
            rollouts = decode_loop.generate_rollouts(
                model.params,
                _prompts(model, part),
                jax.random.key(seed),
                model.config,
                sampling,
                stop=(*model.config.eos, *single),
                rows=start + np.arange(len(part)),
                dtype=MODEL_DTYPES[model.dtype],
            )
        tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
        rows = [
            [t for t in row[keep] if t not in model.config.eos]
            for row, keep in zip(tokens, mask, strict=True)
        ]
        texts = model.processor.decode(rows[: len(part) * n])  # the rest pads the batch
        texts = [_text_before(text, stops) for text in texts]
        responses += [texts[i : i + n] for i in range(0, len(texts), n)]
    return responses


def _text_before(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((i for i in map(text.find, stops) if i >= 0), default=len(text))]


def score(
    model: Model, conversations: Sequence[Conversation], completions: Sequence[str | Sequence[int]]
) -> list[np.ndarray]:
    """Return the log-probability of each token of each completion.

    A completion is a text (without an end token) or token ids.
    """
    if len(conversations) != len(completions):
        raise ValueError(
            f"got {len(completions)} completions for {len(conversations)} conversations; "
            "give one for each"
        )
    encoded = _encode(model, conversations)
    tokens = [np.asarray(model.processor.ids(c) if isinstance(c, str) else c) for c in completions]
    vocab = model.config.text.vocab
    for i, t in enumerate(tokens):
        if not t.size:
            raise ValueError(f"completion {i}: expected at least one token, got none")
        if t.ndim != 1 or t.dtype.kind not in "iu" or not 0 <= t.min() <= t.max() < vocab:
            raise ValueError(
                f"completion {i}: expected a text or a list of token ids from 0 to {vocab - 1}, "
                f"got {str(t.tolist())[:80]}"
            )
    prompts = _prompts(model, encoded)
    length = round_up_size(max(map(len, tokens)))
    responses = np.zeros((prompts.tokens.shape[0], 1, length), np.int32)
    for row, t in zip(responses, tokens, strict=False):
        row[0, : len(t)] = t
    with jax.set_mesh(model.mesh):
        placed = sharding.place_rows(responses, model.mesh)
        logps = _score(model.params, prompts, placed, model.config, MODEL_DTYPES[model.dtype])
    return [row[: len(t)] for row, t in zip(np.asarray(logps), tokens, strict=False)]


def logits(model: Model, conversations: Sequence[Conversation]) -> list[np.ndarray]:
    """Return the float32 logits [T V] of each conversation; all of them are in memory at once."""
    encoded = _encode(model, conversations)
    prompts = _prompts(model, encoded)
    with jax.set_mesh(model.mesh):
        rows = np.asarray(_logits(model.params, prompts, model.config, MODEL_DTYPES[model.dtype]))
    return [row[-len(e) :] for row, e in zip(rows, encoded, strict=False)]


def save(model: Model, folder: str | Path, dtype: str | None = None) -> None:
    """Write a folder that transformers, vLLM and `load` read; `dtype` None keeps the model's."""
    hf_checkpoint.save_hf_checkpoint(
        model.params, model.config, folder, model.processor.save, dtype or model.dtype
    )


def _encode(model: Model, conversations: Sequence[Conversation]) -> list[EncodedConversation]:
    if not len(conversations) or isinstance(conversations[0], dict):
        raise ValueError(
            "expected a list of conversations, each a list of messages with role and content"
        )
    return [model.processor.encode(c, limit=model.config.text.max_positions) for c in conversations]


def _prompts(model: Model, encoded: Sequence[EncodedConversation]) -> Prompts:
    lengths = length_buckets(model.config.text.max_positions)
    prompts, _ = collate_rows(
        encoded, buckets=lengths, side="left", shards=sharding.batch_shards(model.mesh)
    )
    return place_prompts(prompts, model.mesh)


@jax.jit(static_argnames=("cfg", "dtype"))
def _score(
    params: Params, prompts: Prompts, responses: Array, cfg: ModelConfig, dtype: Any
) -> Array:
    params = trainable.cast_params(params, dtype)
    hidden = causal_lm.forward_group(params, prompts, responses, cfg, dtype)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    unembed = decoder.unembedding(params["text"])
    logps, _ = logprobs.token_logps(hidden, unembed, responses.reshape(-1))
    return logps.reshape(responses.shape[0], -1)


@jax.jit(static_argnames=("cfg", "dtype"))
def _logits(params: Params, prompts: Prompts, cfg: ModelConfig, dtype: Any) -> Array:
    params = trainable.cast_params(params, dtype)
    hidden = causal_lm.forward(params, prompts, cfg, dtype)
    unembed = decoder.unembedding(params["text"])
    return jnp.dot(hidden, unembed, preferred_element_type=jnp.float32)
