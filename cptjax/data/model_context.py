"""The model and what surrounds it on this machine: mesh, processor, sampling. What every stage and every evaluation shares."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.common import distributed
from cptjax.data import collate
from cptjax.data.collate import BatchShape, EncodedConversation, widest_shape
from cptjax.data.processor import Processor, load_processor
from cptjax.models.config import ModelConfig
from cptjax.models.load import MODEL_DTYPES, find_model_config, fit_config
from cptjax.sharding import check_batch_shards, place_prompts


@dataclasses.dataclass(frozen=True)
class ModelContext:
    """A model's shape and surroundings; parameters are passed beside it."""

    cfg: ModelConfig
    processor: Processor
    mesh: Mesh
    dtype: Any  # of the arithmetic
    buckets: tuple[int, ...]  # lengths that prompts are padded to

    @property
    def shards(self) -> int:
        """Batch shards of this process."""
        return sharding.batch_shards(self.mesh) // jax.process_count()

    def longer(self, more: int) -> "ModelContext":
        """The same for rows that may be `more` tokens longer than prompts."""
        top = max(self.buckets)
        return (
            dataclasses.replace(
                self, buckets=(*self.buckets, *collate.length_buckets(top + more, 2 * top))
            )
            if more
            else self
        )

    def prompts(self, encoded: Sequence[EncodedConversation]):
        """Left-padded prompts on the mesh; the row count is this process's part of the batch."""
        prompts, _ = collate.collate_rows(
            list(encoded),
            buckets=self.buckets,
            side="left",
            shards=self.shards,
            agree=gather_batch_shape,
        )
        return place_prompts(prompts, self.mesh)


def load_model_context(settings: Any, mesh_settings: Any, buckets: Sequence[int]) -> ModelContext:
    """Build the context of the model that `config.model` names, on the mesh that `config.mesh` describes; no parameters."""
    for name in ("param_dtype", "compute_dtype"):
        if settings[name] not in MODEL_DTYPES:
            raise ValueError(
                f"model.{name}={settings[name]!r}; expected one of {', '.join(MODEL_DTYPES)}"
            )
    mesh = sharding.make_mesh(**mesh_settings)
    check_batch_shards(sharding.batch_shards(mesh), jax.process_count())
    cfg = fit_config(find_model_config(settings), settings, mesh)
    processor = load_processor(settings.path or None, cfg, settings.min_pixels, settings.max_pixels)
    return ModelContext(cfg, processor, mesh, MODEL_DTYPES[settings.compute_dtype], tuple(buckets))


def gather_batch_shape(shape: BatchShape) -> BatchShape:
    """The shape that holds every process's part of a batch."""
    return widest_shape(distributed.gather_objects(shape))


def describe_pixel_limits(runtime: ModelContext) -> str:
    return f"{runtime.processor.min_pixels}-{runtime.processor.max_pixels}"
