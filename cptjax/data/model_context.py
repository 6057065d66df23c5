"""The context of a model that stages and evaluations share: config, processor, mesh, buckets."""

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
from cptjax.models.flops import PassCosts, training_pass_costs
from cptjax.models.load import MODEL_DTYPES, find_model_config, fit_config
from cptjax.sharding import check_batch_shards, place_prompts
from cptjax.types import Prompts


@dataclasses.dataclass(frozen=True)
class ModelContext:
    """Everything about a model except its parameters, which are passed separately."""

    cfg: ModelConfig
    processor: Processor
    mesh: Mesh
    dtype: Any  # of the arithmetic
    buckets: tuple[int, ...]  # token lengths that prompts are padded to
    pass_costs: PassCosts = PassCosts()  # of training

    @property
    def shards(self) -> int:
        """The batch shards of this process."""
        return sharding.batch_shards(self.mesh) // jax.process_count()

    def with_longer_rows(self, added: int) -> "ModelContext":
        """Return a context for rows that may be `added` tokens longer than prompts."""
        return dataclasses.replace(self, buckets=collate.extend_buckets(self.buckets, added))

    def place_prompts(self, encoded: Sequence[EncodedConversation]) -> Prompts:
        """Collate this process's prompts, padded on the left, and place them on the mesh."""
        return self.place_prompt_batches([encoded])[0]

    def place_prompt_batches(
        self, batches: Sequence[Sequence[EncodedConversation]]
    ) -> list[Prompts]:
        """Do what `place_prompts` does for each micro-batch; all get one shape."""
        collated = collate.collate_prompts(
            batches, buckets=self.buckets, shards=self.shards, agree=gather_batch_shape
        )
        return [place_prompts(prompts, self.mesh) for prompts in collated]


def load_model_context(settings: Any, mesh_settings: Any, buckets: Sequence[int]) -> ModelContext:
    """Build the context of the model of `config.model` on the mesh of `config.mesh`."""
    for name in ("param_dtype", "compute_dtype"):
        if settings[name] not in MODEL_DTYPES:
            raise ValueError(
                f"model.{name}={settings[name]!r}; expected one of {', '.join(MODEL_DTYPES)}"
            )
    mesh = sharding.make_mesh(**mesh_settings)
    check_batch_shards(sharding.batch_shards(mesh), jax.process_count())
    cfg = fit_config(find_model_config(settings), settings, mesh)
    processor = load_processor(settings.path or None, cfg, settings.min_pixels, settings.max_pixels)
    lora = settings.lora
    return ModelContext(
        processor.cfg,
        processor,
        mesh,
        MODEL_DTYPES[settings.compute_dtype],
        tuple(buckets),
        training_pass_costs(settings.freeze, lora.rank, lora.vision),
    )


def gather_batch_shape(shape: BatchShape) -> BatchShape:
    """Return a shape that holds every process's part of a batch."""
    return widest_shape(distributed.gather_objects(shape))


def describe_pixel_limits(model_ctx: ModelContext) -> str:
    pixels = model_ctx.processor.pixels
    return "none" if pixels is None else f"{pixels.min_pixels}-{pixels.max_pixels}"
