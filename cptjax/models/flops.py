"""FLOPs of the model by formula.

A multiply-add counts as two, causal attention counts half, and recomputation does not count.
"""

import dataclasses
from collections.abc import Sequence

from cptjax.models.config import ModelConfig
from cptjax.models.families import find_family


@dataclasses.dataclass(frozen=True)
class PassCosts:
    """What passes cost, in forward passes of the text model and the tower.

    The default is a forward and backward pass. A backward pass computes the gradients of the inputs
    and those of the weights; each costs as much as a forward pass.
    """

    text: int = 3
    vision: int = 3


def training_pass_costs(freeze: Sequence[str], lora_rank: int, lora_vision: bool) -> PassCosts:
    """Return the costs with frozen parts (`model.freeze`) and adapters (`model.lora`).

    Frozen weights need no gradient, and a tower in which nothing is trained no backward pass. The
    adapters themselves do not count.
    """
    if lora_rank:
        return PassCosts(text=2, vision=2 if lora_vision else 1)
    return PassCosts(text=2 if "language" in freeze else 3, vision=1 if "vision" in freeze else 3)


def text_forward_flops(cfg: ModelConfig, rows: int, length: int, scored: int) -> float:
    """Return the FLOPs of rows of `length` tokens, with logits for `scored` tokens of each."""
    return rows * (
        length * _per_token(cfg)
        + _per_pair(cfg) * length * (length + 1) / 2
        + scored * _per_logits(cfg)
    )


def group_forward_flops(
    cfg: ModelConfig, prompts: int, prompt: int, group: int, response: int
) -> float:
    """Return the FLOPs of prompts with `group` responses each; a prompt is computed once."""
    tokens = prompt + group * response
    pairs = prompt * (prompt + 1) / 2 + group * response * (prompt + (response + 1) / 2)
    return prompts * (
        tokens * _per_token(cfg) + _per_pair(cfg) * pairs + group * response * _per_logits(cfg)
    )


def padded_attention_in_tokens(cfg: ModelConfig, prompt: int, group: int, response: int) -> float:
    """Return for how many tokens the rest of the decoder costs as much as a group's attention."""
    pairs = prompt * (prompt + 1) / 2 + group * response * (prompt + (response + 1) / 2)
    return pairs * _per_pair(cfg) / _per_token(cfg)


def decode_flops(cfg: ModelConfig, prompts: int, prompt: int, group: int, steps: int) -> float:
    """Return the FLOPs to generate `steps` tokens of each response, without the prefill."""
    pairs = steps * prompt + steps * (steps + 1) / 2
    return prompts * group * (steps * (_per_token(cfg) + _per_logits(cfg)) + _per_pair(cfg) * pairs)


def vision_forward_flops(cfg: ModelConfig, patches: float, frame: float) -> float:
    """Return the FLOPs of `patches` slots in all, in frames of `frame` slots each."""
    tower = find_family(cfg).tower
    return tower.count_flops(cfg, patches, frame) if tower and patches else 0.0


def _per_token(cfg: ModelConfig) -> float:
    t = cfg.text
    attention = t.width * t.head_dim * (2 * t.heads + 2 * t.kv_heads)
    return 2 * t.depth * (attention + 3 * t.width * t.mlp)


def _per_pair(cfg: ModelConfig) -> float:
    """Return the FLOPs of the score and the mixing of one query-key pair, over all layers."""
    return 4 * cfg.text.depth * cfg.text.heads * cfg.text.head_dim


def _per_logits(cfg: ModelConfig) -> float:
    return 2 * cfg.text.width * cfg.text.vocab
