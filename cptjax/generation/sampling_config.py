"""The settings of sampling: number and length of responses, token filters, slots, dtype."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.models.load import MODEL_DTYPES

SAMPLING_DTYPES = ("", *MODEL_DTYPES, "int8")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled: the fields of `config.rollout`.

    A field that has a default is off or left to the program by default.
    """

    group: int  # responses to each prompt
    max_new_tokens: int
    temperature: float  # 0 = greedy
    check_every: int  # decode steps between two checks for finished groups
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    slots: int = 0  # groups decoded at a time; 0 = the whole batch
    slot_rows: int = 0  # the most responses of a group decoded at a time; 0 = all
    # Copy the weights to every device of the fsdp axis while sampling; None = where they fit.
    gather: bool | None = None
    model: int = 0  # devices on the mesh axis `model`; 0 = as in training
    mlp: int = 0  # devices that share the MLP and the vocabulary; 0 = those of `model`
    ahead: int = 0  # 1 = before the update of the training step before
    dtype: str = ""  # "" = the model's; int8 = int8 weights, arithmetic in the model's dtype

    def __post_init__(self) -> None:
        types = ", ".join(map(repr, SAMPLING_DTYPES))
        checks = {
            "group": (self.group >= 1, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "check_every": (self.check_every >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= 1e4, "0 (greedy) or more, at most 10000"),
            "top_k": (
                0 <= self.top_k < 2**31 and int(self.top_k) == self.top_k,
                "0 (off) or a number of tokens",
            ),
            "top_p": (0 < self.top_p <= 1, "a share in (0, 1]; 1 is off"),
            "min_p": (0 <= self.min_p <= 1, "a share in [0, 1]; 0 is off"),
            "slots": (self.slots >= 0, "0 (the whole batch) or a number of groups"),
            "slot_rows": (
                self.slot_rows == 0 or (self.slots and self.slot_rows > 0),
                "0 (all), or a number of responses together with rollout.slots",
            ),
            "model": (self.model >= 0, "0 (as in training) or a number of devices"),
            "mlp": (
                self.mlp == 0 or (self.model and self.mlp > 0 and self.mlp % self.model == 0),
                "0 (as rollout.model) or a multiple of rollout.model, which must be set",
            ),
            "ahead": (self.ahead in (0, 1), "0 or 1"),
            "dtype": (self.dtype in SAMPLING_DTYPES, f"one of {types}; '' is model.compute_dtype"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise ValueError(f"rollout.{name}={getattr(self, name)!r}: expected {expected}")

    def mesh(self, mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
        """Return the mesh of the programs that sample, for a mesh of training."""
        return sharding.sampling_mesh(mesh, self.model, self.mlp) if self.model else mesh

    @property
    def rows(self) -> int:
        """The responses of a group that are decoded at a time."""
        return min(self.slot_rows or self.group, self.group)

    def slots_for(self, prompts: int) -> int:
        """Return the slots for a batch; 0 = it is decoded as a whole."""
        return 0 if self.slots >= prompts and self.rows == self.group else min(self.slots, prompts)

    def check_batch_shards(self, shards: int) -> None:
        """Refuse a number of slots that the batch shards do not divide."""
        if self.slots % shards:
            raise ValueError(
                f"rollout.slots={self.slots}: expected a multiple of the {shards} batch shards, "
                "or 0 for the whole batch"
            )

    def greedy(self) -> "SamplingConfig":
        """Return the sampling of one greedy response to each prompt."""
        return dataclasses.replace(self, group=1, temperature=0.0)

    def compute_dtype(self, model_dtype: Any) -> jnp.dtype:
        """Return the compute dtype of sampling for a model that computes in `model_dtype`."""
        return jnp.dtype(MODEL_DTYPES.get(self.dtype, model_dtype))


def rollout_sampling(config: ConfigDict) -> SamplingConfig:
    """Return the settings for sampling training rollouts."""
    return SamplingConfig(**config.rollout)


def eval_sampling(config: ConfigDict) -> SamplingConfig:
    """Return the settings for evaluations."""
    e, r = config.eval, config.rollout
    return SamplingConfig(
        group=e.samples,
        max_new_tokens=e.max_new_tokens,
        temperature=e.temperature,
        top_p=e.top_p,
        check_every=r.check_every,
        gather=r.gather,
        model=r.model,
        mlp=r.mlp,
    )
