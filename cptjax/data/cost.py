"""What work costs: generated tokens, tokens trained on, and floating-point operations counted by hand."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cptjax.data.collate import EncodedConversation
from cptjax.models import flops
from cptjax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class WorkCost:
    """What a step cost beside its seconds: generated tokens, answers, arithmetic; tokens it went through in all, and learned from."""

    tokens: int = 0
    rollouts: int = 0
    flops: float = 0.0
    seen: int = 0
    trained: int = 0  # of prompts and answers, without padding; a prompt counts once however many answers it has

    def __add__(self, other: "WorkCost") -> "WorkCost":
        return WorkCost(
            *(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self))
        )

    def logged(self) -> dict[str, float]:
        """What of it goes into metrics.jsonl."""
        return {
            "tokens": self.tokens,
            "trained": self.trained,
            "rollouts": self.rollouts,
            "flops": self.flops,
        }


def conversation_flops(cfg: ModelConfig, encoded: EncodedConversation) -> float:
    """Arithmetic of one conversation's forward pass; its gradient costs twice as much again."""
    learned = int(encoded.loss_mask.sum())
    return flops.text_forward_flops(cfg, 1, len(encoded), learned) + image_flops(cfg, encoded)


def image_flops(cfg: ModelConfig, encoded: EncodedConversation) -> float:
    """Arithmetic of a conversation's pictures."""
    return sum(
        flops.vision_forward_flops(cfg, len(m.patches), len(m.patches) // m.grid[0])
        for m in encoded.media
    )


def sampling_cost(
    cfg: ModelConfig, encoded: Sequence[EncodedConversation], lengths: np.ndarray
) -> WorkCost:
    """What answers of these lengths [Q G] to these prompts cost."""
    q, group = lengths.shape
    mean = sum(map(len, encoded)) / q
    work = (
        sum(image_flops(cfg, e) for e in encoded)
        + flops.text_forward_flops(cfg, q, mean, 1)
        + flops.decode_flops(cfg, q, mean, group, lengths.mean())
    )
    return WorkCost(
        int(lengths.sum()), lengths.size, work, sum(map(len, encoded)) + int(lengths.sum())
    )
