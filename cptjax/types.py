"""The data types that flow through cptjax, with the shapes of their fields.

Letters of every shape and einsum:

    B rows           T tokens of a row    R tokens of a response     A targets of a row
    Q prompts        G responses of a prompt (its group)
    D model width    N query heads        K key/value heads          H head width
    F MLP width      V vocabulary         L layers
    S batch shards   W vision rows        P patches of a vision row  C values of a patch
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax


class Mean(NamedTuple):
    """A mean as its sum and count: micro-batches, padding and devices cannot change it."""

    sum: Any
    count: Any

    def __add__(self, other: "Mean") -> "Mean":
        if isinstance(other, int):
            return self
        return Mean(self.sum + other.sum, self.count + other.count)

    __radd__ = __add__  # lets the built-in sum() start at 0

    @property
    def value(self) -> float:
        """The mean; NaN of no values."""
        return float(self.sum) / float(self.count) if float(self.count) else math.nan


def add_means(parts: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Add the means of several micro-batches by name."""
    total: dict[str, Mean] = {}
    for part in parts:
        for name, mean in part.items():
            total[name] = mean + total.get(name, 0)
    return total


Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of a task; `messages` are in the Hugging Face chat form, and end with the user's."""

    id: str
    messages: list[dict[str, Any]]
    answer: Any  # the gold answer, which reward and scorer compare with
    target: str = ""  # the gold completion that SFT learns; "" where a task has none
    task: str = ""
    # The other columns of the row, for a user's reward.
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


@flax.struct.dataclass
class Vision:
    """Images and video frames as patches in window order, packed into rows.

    The windows of a frame are blocks of slots; an edge window leaves the rest of its block empty:

        slot     0 1 2 3 | 4 5 6 7 | 8 9 10 11      (window = 4 slots)
        frames   1 1 1 1 | 1 1 0 0 | 2 2  2  2      the second window of frame 1 is partial
    """

    patches: Array  # [S W P C]
    positions: Array  # [S W P 2] row and column, for the rotary embedding
    frames: Array  # [S W P] 0 = empty slot; full attention stays within one number of one row


@flax.struct.dataclass
class Prompts:
    """Token rows ready for the device.

    segments: 0 = padding; packed conversations of one row carry 1, 2, ...
    slots: -1 for text; else the number of the vision feature [W * P / 4] within the batch shard.
    """

    tokens: Array  # [B T]
    positions: Array  # [3 B T] time, height, width (M-RoPE)
    segments: Array  # [B T]
    slots: Array  # [B T]
    vision: Vision | None = None


@flax.struct.dataclass
class Rollouts:
    """Sampled responses; row q * G + g is response g of prompt q."""

    tokens: Array  # [B R]
    mask: Array  # [B R] True up to and including the stop token
    logps: Array  # [B R] under the distribution sampled from (temperature, top-k, top-p applied)
    policy_logps: Array  # [B R] under the policy itself (temperature 1, no truncation)
    finished: Array  # [B] True when a stop token ended the row, False when the length limit did


@flax.struct.dataclass
class Batch:
    """Target tokens, each with the state that predicts it.

    Rows of single or packed conversations name these states in `where`. Groups (`where` is None)
    are B = Q * G responses to Q left-padded prompts.
    """

    prompts: Prompts
    targets: Array  # [B A] the tokens (A = R for groups)
    mask: Array  # [B A]
    where: Array | None = None  # [B A] index into the row of the state that predicts each target
    # By row or token: advantages, old_logps, ref_logps, ...
    extra: dict[str, Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class TrainState:
    """All that a training step changes."""

    step: Array  # [] optimiser steps taken in this stage
    params: Params  # the trained leaves (None elsewhere)
    opt_state: Any
    skipped: Array  # [] non-finite steps in a row
