"""cptjax in a notebook: load, generate, score, logits, save. Conversations are the Hugging Face chat form."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.continual.checkpoint import Checkpoints
from cptjax.continual.model_state import restore_stage_params
from cptjax.continual.workdir import read_run_config
from cptjax.data import processor
from cptjax.data.collate import EncodedConversation, collate_rows, length_buckets, round_up_size
from cptjax.data.model_context import ModelContext
from cptjax.data.processor import Processor
from cptjax.generation import sampler
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import attention, decoder, hf_checkpoint, logprobs, qwen2_5_vl, trainable
from cptjax.models.config import PRESETS, ModelConfig, read_model_config
from cptjax.models.load import MODEL_DTYPES, find_model_config
from cptjax.sharding import place_prompts
from cptjax.types import Array, Params, Prompts

Conversation = Sequence[dict[str, Any]]
CHECK_EVERY = 16  # decode steps between two checks whether all responses are done


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything that is needed to ask it something."""

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
    """The model of a Hugging Face folder or hub id, of a run's workdir (its last finished stage, or `stage`), or a random one of a preset.

    Without a mesh, the weights are cut over all devices.
    """
    if dtype not in MODEL_DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(MODEL_DTYPES)}")
    mesh = sharding.make_mesh() if mesh is None else mesh
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        return _of_workdir(folder, mesh, dtype, stage)
    source = None if str(path) in PRESETS and not folder.is_dir() else path
    cfg = _for_inference(read_model_config(source) if source else PRESETS[str(path)], mesh, dtype)
    words = processor.load_processor(source, cfg, min_pixels, max_pixels)
    if source:
        params = hf_checkpoint.load_hf_checkpoint(source, cfg, mesh, MODEL_DTYPES[dtype])
    else:
        rules = sharding.rules_for(cfg.text.kv_heads, mesh)
        params = sharding.init_params(
            qwen2_5_vl.declare_params(cfg), jax.random.key(seed), MODEL_DTYPES[dtype], mesh, rules
        )
    return Model(cfg, params, words, mesh, dtype)


def _of_workdir(folder: Path, mesh: Mesh, dtype: str, stage: int | None) -> Model:
    """The model that a run's stage left; 0 = the one it started from."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has checkpoints but no config.json; expected a workdir of launch/train.py"
        )
    config = read_run_config(folder)
    settings = config.model
    cfg = _for_inference(find_model_config(settings), mesh, dtype)
    cfg = dataclasses.replace(cfg, lora_scale=settings.lora.alpha / max(settings.lora.rank, 1))
    words = processor.load_processor(
        settings.path or None, cfg, settings.min_pixels, settings.max_pixels
    )
    model_ctx = ModelContext(cfg, words, mesh, MODEL_DTYPES[dtype], ())
    with contextlib.closing(Checkpoints(folder / "checkpoints", async_save=False)) as checkpoints:
        stage = checkpoints.newest_stage() if stage is None else stage
        params = restore_stage_params(config, model_ctx, checkpoints, stage)
    return Model(cfg, trainable.cast_params(params, MODEL_DTYPES[dtype]), words, mesh, dtype)


def _for_inference(cfg: ModelConfig, mesh: Mesh, dtype: str) -> ModelConfig:
    platform, kernel = mesh.devices.flat[0].platform, attention.choose_backend(mesh, cfg, dtype)
    return dataclasses.replace(cfg, remat="none", attention=kernel, unroll=platform != "tpu")


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
    """`n` answers to each conversation, without their end token; `batch` conversations are decoded at a time.

    stop: strings; an answer ends before the first of them. A conversation's answers do not depend on those beside it.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop={stop!r}: expected strings with at least one character")
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1 conversation")
    # A stop string that is one token ends its row on the device; a longer one may be written in several ways and is found in the text.
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
    encoded, out = _encode(model, conversations), []
    for start in range(0, len(encoded), batch):
        some = encoded[start : start + batch]
        with jax.set_mesh(model.mesh):
            rollouts = sampler.generate_rollouts(
                model.params,
                _prompts(model, some),
                jax.random.key(seed),
                model.config,
                sampling,
                stop=(*model.config.eos, *single),
                rows=start + np.arange(len(some)),
                dtype=MODEL_DTYPES[model.dtype],
            )
        tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
        rows = [
            [t for t in row[keep] if t not in model.config.eos]
            for row, keep in zip(tokens, mask, strict=True)
        ]
        texts = [
            _until_stop(answer, stops) for answer in model.processor.decode(rows[: len(some) * n])
        ]
        out += [texts[i : i + n] for i in range(0, len(texts), n)]
    return out


def _until_stop(answer: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    return answer[: min((at for at in map(answer.find, stops) if at >= 0), default=len(answer))]


def score(
    model: Model, conversations: Sequence[Conversation], completions: Sequence[str | Sequence[int]]
) -> list[np.ndarray]:
    """The log-probability of each token of each completion: a text (its own tokens, no end token) or token ids."""
    if len(conversations) != len(completions):
        raise ValueError(
            f"{len(completions)} completions came for {len(conversations)} conversations; give one for each"
        )
    encoded = _encode(model, conversations)
    tokens = [
        np.asarray(model.processor.ids(c) if isinstance(c, str) else c, np.int32)
        for c in completions
    ]
    if empty := [i for i, t in enumerate(tokens) if not len(t)]:
        raise ValueError(f"completion {empty[0]} has no tokens")
    prompts = _prompts(model, encoded)
    responses = np.zeros(
        (prompts.tokens.shape[0], 1, round_up_size(max(map(len, tokens)))), np.int32
    )
    for row, t in zip(responses, tokens, strict=False):
        row[0, : len(t)] = t
    with jax.set_mesh(model.mesh):
        found = _score(
            model.params,
            prompts,
            sharding.place_rows(responses, model.mesh),
            model.config,
            MODEL_DTYPES[model.dtype],
        )
    return [row[: len(t)] for row, t in zip(np.asarray(found), tokens, strict=False)]


def logits(model: Model, conversations: Sequence[Conversation]) -> list[np.ndarray]:
    """[T V] float32 of each conversation; everything is in memory at once, so this is for small inputs."""
    encoded = _encode(model, conversations)
    prompts = _prompts(model, encoded)
    with jax.set_mesh(model.mesh):
        found = np.asarray(_logits(model.params, prompts, model.config, MODEL_DTYPES[model.dtype]))
    return [row[-len(e) :] for row, e in zip(found, encoded, strict=False)]


def save(model: Model, folder: str | Path, dtype: str | None = None) -> None:
    """A folder that transformers, vLLM and `load` read; `dtype` None keeps the model's."""
    hf_checkpoint.save_hf_checkpoint(
        model.params, model.config, folder, model.processor, dtype or model.dtype
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
    hidden = qwen2_5_vl.forward_group(
        trainable.cast_params(params, dtype), prompts, responses, cfg, dtype
    )
    found, _ = logprobs.token_logps(
        hidden.reshape(-1, hidden.shape[-1]),
        decoder.unembedding(params["text"]),
        responses.reshape(-1),
    )
    return found.reshape(responses.shape[0], -1)


@jax.jit(static_argnames=("cfg", "dtype"))
def _logits(params: Params, prompts: Prompts, cfg: ModelConfig, dtype: Any) -> Array:
    hidden = qwen2_5_vl.forward(trainable.cast_params(params, dtype), prompts, cfg, dtype)
    return jnp.dot(
        hidden,
        decoder.unembedding(params["text"]).astype(dtype),
        preferred_element_type=jnp.float32,
    )
