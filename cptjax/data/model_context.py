"""The model and what surrounds it on this machine: mesh, processor, sampling. What every stage and every evaluation shares."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.common import distributed
from cptjax.data import collate
from cptjax.data.collate import BatchShape, EncodedConversation, widest_shape
from cptjax.data.processor import Processor, load_processor
from cptjax.models import hf_checkpoint, trainable
from cptjax.models.config import ModelConfig, read_model_config
from cptjax.models.load import MODEL_DTYPES, declare_model_params, find_preset, fit_config
from cptjax.sharding import check_batch_shards, place_prompts
from cptjax.types import Params


@dataclasses.dataclass(frozen=True)
class ModelContext:
    """A model's shape and surroundings; parameters are passed beside it."""

    cfg: ModelConfig
    processor: Processor
    mesh: Mesh
    dtype: Any  # of the arithmetic
    ladder: tuple[int, ...]  # lengths that prompts are padded to

    @property
    def shards(self) -> int:
        """Batch shards of this process."""
        return sharding.batch_shards(self.mesh) // jax.process_count()

    def longer(self, more: int) -> "ModelContext":
        """The same for rows that may be `more` tokens longer than prompts."""
        top = max(self.ladder)
        return (
            dataclasses.replace(
                self, ladder=(*self.ladder, *collate.length_buckets(top + more, 2 * top))
            )
            if more
            else self
        )

    def prompts(self, encoded: Sequence[EncodedConversation]):
        """Left-padded prompts on the mesh; the row count is this process's part of the batch."""
        prompts, _ = collate.collate_rows(
            list(encoded),
            buckets=self.ladder,
            side="left",
            shards=self.shards,
            agree=gather_batch_shape,
        )
        return place_prompts(prompts, self.mesh)


def load_model(
    settings: Any, mesh_settings: Any, seed: int, ladder: Sequence[int]
) -> tuple[ModelContext, Params]:
    """The model that `config.model` names, on the mesh that `config.mesh` describes; adapters are added where asked for."""
    for name in ("param_dtype", "compute_dtype"):
        if settings[name] not in MODEL_DTYPES:
            raise ValueError(
                f"model.{name}={settings[name]!r}; expected one of {', '.join(MODEL_DTYPES)}"
            )
    mesh = sharding.make_mesh(**mesh_settings)
    check_batch_shards(sharding.batch_shards(mesh), jax.process_count())
    cfg = read_model_config(settings.path) if settings.path else find_preset(settings.preset)
    cfg = fit_config(cfg, settings, mesh)
    processor = load_processor(settings.path or None, cfg, settings.min_pixels, settings.max_pixels)
    runtime = ModelContext(
        cfg, processor, mesh, MODEL_DTYPES[settings.compute_dtype], tuple(ladder)
    )
    return runtime, create_params(settings, runtime, seed)


def gather_batch_shape(shape: BatchShape) -> BatchShape:
    """The shape that holds every process's part of a batch."""
    return widest_shape(distributed.gather_objects(shape))


def create_params(settings: Any, runtime: ModelContext, seed: int) -> Params:
    """Parameters on the mesh: trained leaves in param_dtype, frozen leaves in compute_dtype."""
    cfg, mesh = runtime.cfg, runtime.mesh
    rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    declared = declare_model_params(settings, cfg)
    if not settings.path:
        params = sharding.init_params(declared, jax.random.key(seed), jnp.float32, mesh, rules)
    else:
        params = hf_checkpoint.load_hf_checkpoint(settings.path, cfg, mesh, None, rules)
        extra = {
            k: v
            for k, v in trainable.flatten_params(declared).items()
            if k[-1] in trainable.ADAPTER_LEAVES
        }
        if extra:
            adapters = sharding.init_params(
                trainable.unflatten_params(extra), jax.random.key(seed), jnp.float32, mesh, rules
            )
            params = trainable.join_params(adapters, params)
    chosen = trainable.is_trained(settings.freeze, settings.lora.rank)
    trained, frozen = trainable.split_params(params, chosen)
    return trainable.join_params(
        _cast_params(trained, MODEL_DTYPES[settings.param_dtype]),
        _cast_params(frozen, runtime.dtype),
    )


def _cast_params(tree: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), tree)


def describe_pixel_limits(runtime: ModelContext) -> str:
    return f"{runtime.processor.min_pixels}-{runtime.processor.max_pixels}"
