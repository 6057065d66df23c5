"""The nouns that flow through cptjax, shapes in the fields.

Letters used in every shape and einsum:

    B rows          T tokens of a row      R tokens of a response    Q prompts      G responses of a prompt (group)
    D model width   N query heads          K key/value heads         H head width   F mlp width   V vocabulary
    S batch shards  W vision rows          P patches of a vision row C values of a patch          L layers
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax


class Mean(NamedTuple):
    """A mean as its sum and count, so that micro-batches, padding and devices can not change it."""

    sum: Any
    count: Any

    def __add__(self, other: "Mean") -> "Mean":
        return (
            self if isinstance(other, int) else Mean(self.sum + other.sum, self.count + other.count)
        )

    __radd__ = __add__  # lets the built-in sum() start at 0

    @property
    def value(self) -> float:
        return float(self.sum) / float(self.count) if float(self.count) else math.nan


def add_means(parts: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Adds up the means of several micro-batches by name."""
    total: dict[str, Mean] = {}
    for part in parts:
        for name, mean in part.items():
            total[name] = mean + total.get(name, 0)
    return total


Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Example:
    """One question as a task states it; `messages` is the Hugging Face chat form and ends with the user's turn."""

    id: str
    messages: list[dict[str, Any]]
    answer: Any  # what reward and scorer compare with
    target: str = ""  # the gold completion that SFT learns; "" where a task has none
    task: str = ""
    meta: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # the row's other columns; a user's reward sees them


@flax.struct.dataclass
class Vision:
    """Images and video frames as patches in window order, packed into rows.

    A frame's windows are blocks of `window` slots; an edge window leaves the rest of its block empty:

        slot     0 1 2 3 | 4 5 6 7 | 8 9 10 11      (window = 4 slots)
        frames   1 1 1 1 | 1 1 0 0 | 2 2  2  2      frame 1 has a partial second window; frame 2 starts a new block
    """

    patches: Array  # [S W P C]
    positions: Array  # [S W P 2] row and column, for the rotary embedding
    frames: Array  # [S W P] 0 = empty slot; full attention stays within one number of one row


@flax.struct.dataclass
class Prompts:
    """Token rows ready for the device.

    segments: 0 = padding; packed conversations of one row carry 1, 2, ...
    slots: -1 for text; else which merged vision feature [W * P / 4] of the row's batch shard stands here.
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
    policy_logps: Array  # [B R] under the raw policy (temperature 1, nothing cut)
    finished: Array  # [B] True when a stop token ended the row, False when the length limit did


@flax.struct.dataclass
class Batch:
    """Tokens to learn from, each with the state that predicts it.

    Rows of plain or packed conversations name those states in `where`; groups (`where` is None) hold B = Q * G responses
    that follow Q left-padded prompts.
    """

    prompts: Prompts
    targets: Array  # [B A] the tokens (A = R for groups)
    mask: Array  # [B A]
    where: Array | None = None  # [B A] index into the row of the state that predicts each target
    extra: dict[str, Array] = flax.struct.field(
        default_factory=dict
    )  # per row or token: advantages, old_logps, ref_logps, ...


@flax.struct.dataclass
class TrainState:
    """All that a training step changes."""

    step: Array  # [] optimiser steps taken in this stage
    params: Params  # the trained leaves (None elsewhere)
    opt_state: Any
    skipped: Array  # [] non-finite steps in a row
