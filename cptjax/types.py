"""The data types that flow through cptjax, with the shapes of their fields.

The letters in all shapes and einsums:

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
    """A mean as its sum and count, so that micro-batches, padding and devices do not change it."""

    sum: Any
    count: Any

    def __add__(self, other: "Mean") -> "Mean":
        if isinstance(other, int):
            return self
        return Mean(self.sum + other.sum, self.count + other.count)

    __radd__ = __add__  # lets the built-in sum() start at 0

    @property
    def value(self) -> float:
        """The mean; NaN if there are no values."""
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

    Each window of a frame is a block of slots; a partial window leaves the rest of its block empty:

        slot     0 1 2 3 | 4 5 6 7 | 8 9 10 11      (window = 4 slots)
        frames   1 1 1 1 | 1 1 0 0 | 2 2  2  2      the second window of frame 1 is partial
    """

    patches: Array  # [S W P C] bytes, which the vision tower normalises
    positions: Array  # [S W P 2] row and column (and more, if a tower needs it)
    frames: Array  # [S W P] 0 = empty slot; full attention is within equal numbers of a row


@flax.struct.dataclass
class Prompts:
    """Token rows ready for the device.

    segments: 0 = padding; the packed conversations of a row are numbered 1, 2, ...
    slots: -1 for text; otherwise the number of the vision feature in the batch shard [W * P / 4],
        or after these, in `pool`.
    """

    tokens: Array  # [B T]
    positions: Array  # [3 B T] time, height, width (M-RoPE)
    segments: Array  # [B T]
    slots: Array  # [B T]
    vision: Vision | None = None
    # The states of `vision` in a frozen tower, which several models share: after the last block
    # [S W*P D], and in some families also after earlier blocks [n S W*P D].
    tower_states: tuple[Array, ...] | None = None
    pool: "FeaturePool | None" = None
    # Each row has one conversation and then padding.
    right_padded: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def patches(self) -> int:
        """The patches of a batch shard's images or of their states, with empty slots; 0 = none."""
        if self.tower_states:
            return self.tower_states[0].shape[-2]
        return math.prod(self.vision.frames.shape[1:]) if self.vision else 0


@flax.struct.dataclass
class FeaturePool:
    """Image features that other shards use as well.

    All shards of a domain get the same n features, and number them after those of their own images.
    """

    slots: Array  # [S n] number of each feature in the shard that has it, -1 in the others
    domains: int = flax.struct.field(pytree_node=False)  # equal parts of the shards


@flax.struct.dataclass
class Rollouts:
    """Sampled responses; row q * G + g is response g of prompt q."""

    tokens: Array  # [B R]
    mask: Array  # [B R] True up to and including the stop token
    logps: Array  # [B R] under the distribution sampled from (temperature, top-k, top-p applied)
    policy_logps: Array  # [B R] under the policy itself (temperature 1, no truncation)
    finished: Array  # [B] True when a stop token ended the row, False when the length limit did


@flax.struct.dataclass
class Packing:
    """How the groups of a batch are packed into one row of n tokens per batch shard.

    The padded arrays of a shard are its prompts [Q/S * P] and then its responses [B/S * R], one
    after the other. -1 marks padding in all indices.
    """

    source: Array  # [S n] index in the padded arrays of each packed token
    place: Array  # [S Q/S*P + B/S*R] index in the row of each padded token; inverse of `source`
    real: Array  # [S A] index of each real target among the shard's targets [B/S * R]
    spread: Array  # [S B/S*R] inverse of `real`


@flax.struct.dataclass
class Batch:
    """Target tokens, each with the state that predicts it.

    The states are those of rows of single or packed conversations, one or more targets a row, or
    those of packed groups: the targets are the B = Q * G responses to Q left-padded prompts. If
    responses have moved between shards (`data.balance`), some prompts are copies, and some prompts
    and responses are empty.
    """

    prompts: Prompts
    targets: Array  # [B A] the tokens (A = R for groups)
    mask: Array  # [B A]
    # [B A] index in the row of the state that predicts each target; of groups [S A], in the packed
    # row of each real target
    where: Array | None = None
    # Arrays by row or by token: advantages, old_logps, ref_logps, ...
    extra: dict[str, Array] = flax.struct.field(default_factory=dict)
    packing: Packing | None = None  # of groups

    @property
    def tokens_with_padding(self) -> int:
        """The tokens that the decoder processes, over all processes."""
        return (self.prompts.tokens if self.packing is None else self.packing.source).size


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes."""

    step: Array  # [] optimizer updates applied in this stage
    params: Params  # the trained leaves (None elsewhere)
    opt_state: Any
    skipped: Array  # [] non-finite steps in a row
    # The states of continual-learning methods that follow the updates of the stage, by name.
    methods: dict[str, Any] = flax.struct.field(default_factory=dict)
