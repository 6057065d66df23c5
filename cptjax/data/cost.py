"""The cost of work: generated tokens, trained tokens, and FLOPs by formula."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cptjax.data.collate import EncodedConversation
from cptjax.models import flops
from cptjax.models.config import ModelConfig
from cptjax.models.flops import PassCosts


@dataclasses.dataclass(frozen=True)
class WorkCost:
    """The cost of a step, other than its seconds."""

    tokens: int = 0  # generated
    rollouts: int = 0  # generated responses
    flops: float = 0.0
    seen: int = 0  # tokens read or generated
    # Tokens of prompts and responses without padding; a prompt counts once for its whole group.
    trained: int = 0

    def __add__(self, other: "WorkCost") -> "WorkCost":
        return WorkCost(
            *(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self))
        )

    def logged(self) -> dict[str, float]:
        """Return the fields that metrics.jsonl records."""
        return {
            "tokens": self.tokens,
            "trained": self.trained,
            "rollouts": self.rollouts,
            "flops": self.flops,
        }


def conversation_flops(cfg: ModelConfig, encoded: EncodedConversation, costs: PassCosts) -> float:
    """Return the FLOPs of a conversation's passes through the text model and the tower."""
    targets = int(encoded.loss_mask.sum())
    text = flops.text_forward_flops(cfg, 1, len(encoded), targets)
    return costs.text * text + costs.vision * image_flops(cfg, encoded)


def image_flops(cfg: ModelConfig, encoded: EncodedConversation) -> float:
    """Return the FLOPs of the vision tower for a conversation's images and videos."""
    return sum(
        flops.vision_forward_flops(cfg, len(m.patches), len(m.patches) // m.grid[0])
        for m in encoded.media
    )


def sampling_cost(
    cfg: ModelConfig, encoded: Sequence[EncodedConversation], lengths: np.ndarray
) -> WorkCost:
    """Return the cost of generating responses of these lengths [Q G] to these prompts."""
    q, group = lengths.shape
    mean = sum(map(len, encoded)) / q
    work = (
        sum(image_flops(cfg, e) for e in encoded)
        + flops.text_forward_flops(cfg, q, mean, 1)
        + flops.decode_flops(cfg, q, mean, group, lengths.mean())
    )
    generated = int(lengths.sum())
    return WorkCost(generated, lengths.size, work, seen=sum(map(len, encoded)) + generated)
