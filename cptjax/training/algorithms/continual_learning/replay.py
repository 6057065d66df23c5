"""Replay of rows of earlier stages: a fixed share of each batch.

    gold       rows with their gold responses (Chaudhry et al. 2019, 1902.10486)
    prompts    prompts, to which the policy samples new responses (on-policy replay)

All training rows of the earlier stages are replayed; a stage's own rows keep their order.
"""

import dataclasses

from ml_collections import ConfigDict

from cptjax.training.algorithms.continual_learning.hooks import ContinualMethod


@dataclasses.dataclass(frozen=True)
class Replay(ContinualMethod):
    """Replay in a share of each batch."""

    fraction: float  # of a batch

    @property
    def replayed_share(self) -> float:
        return self.fraction

    def check(self, config: ConfigDict) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(
                f"method.replay.fraction={self.fraction}: "
                "expected the share of rows from earlier stages, 0 < fraction < 1"
            )
        source = config.method.source
        if source in ("corpus", "gold+corpus"):
            raise ValueError(
                f"method.replay does not work with source={source!r}: "
                "add the responses to rows of earlier stages to the file"
            )
        expected = "gold" if source == "gold" else "prompts"
        if self.name != expected:
            raise ValueError(
                f"method.replay.name={self.name!r} with source={source!r}: expected {expected!r}"
            )


@dataclasses.dataclass(frozen=True)
class GoldReplay(Replay):
    """Replay of gold responses."""

    name = "gold"


@dataclasses.dataclass(frozen=True)
class PromptReplay(Replay):
    """Replay of prompts with new responses."""

    name = "prompts"
