"""Arithmetic of the model counted by hand: one multiply-add is two, causal attention counts half, recomputation does not count."""

from cptjax.model.config import Config


def text_forward(cfg: Config, rows: int, length: int, scored: int) -> float:
    """Plain rows of `length` tokens, logits for `scored` tokens of each."""
    return rows * (length * _per_token(cfg) + _mix(cfg) * length * (length + 1) / 2 + scored * _logits(cfg))


def group_forward(cfg: Config, prompts: int, prompt: int, group: int, response: int) -> float:
    """Prompts shared by their responses: the prompt's work is done once."""
    tokens = prompt + group * response
    pairs = prompt * (prompt + 1) / 2 + group * response * (prompt + (response + 1) / 2)
    return prompts * (tokens * _per_token(cfg) + _mix(cfg) * pairs + group * response * _logits(cfg))


def decode(cfg: Config, prompts: int, prompt: int, group: int, steps: int) -> float:
    """`steps` tokens for each of the group's rows, after the prefill."""
    pairs = steps * prompt + steps * (steps + 1) / 2
    return prompts * group * (steps * (_per_token(cfg) + _logits(cfg)) + _mix(cfg) * pairs)


def vision_forward(cfg: Config, patches: int, frame: int) -> float:
    """`patches` slots in all, frames of `frame` slots each."""
    v, d = cfg.vision, cfg.vision.width
    block = 2 * (4 * d * d + 3 * d * v.mlp)
    full = len(v.full_blocks)
    mixing = 4 * d * (full * frame + (v.depth - full) * v.window_slots)
    wide = d * v.merge**2
    merger = 2 * (wide * wide + wide * cfg.text.width) / v.merge**2
    return patches * (2 * v.patch_dim * d + v.depth * block + mixing + merger)


def _per_token(cfg: Config) -> float:
    t = cfg.text
    attention = t.width * t.head_dim * (2 * t.heads + 2 * t.kv_heads)
    return 2 * t.depth * (attention + 3 * t.width * t.mlp)


def _mix(cfg: Config) -> float:
    """Scores and mixing for one query-key pair, over all layers."""
    return 4 * cfg.text.depth * cfg.text.heads * cfg.text.head_dim


def _logits(cfg: Config) -> float:
    return 2 * cfg.text.width * cfg.text.vocab
