"""Qwen2 and Qwen2.5, text models of 0.5B to 72B."""

from typing import Any

from cptjax.models.config import ModelConfig, RopeConfig, TextConfig
from cptjax.models.family import (
    TEXT_TENSOR_NAMES,
    TINY_ENDS,
    TINY_TEXT,
    Family,
    HFConfig,
    read_plain_rope,
    read_text_config,
    text_keys,
    write_text_config,
)

NAME = "qwen2"


def _released(heads: int, kv_heads: int, head_dim: int = 128, **shape: Any) -> ModelConfig:
    """Return the config of a released Qwen2.5 instruction model."""
    text = TextConfig(
        width=heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=True,
        **shape,
    )
    return ModelConfig(NAME, text, eos=(151645, 151643), pad=151643)


PRESETS = {
    "qwen2.5-0.5b": _released(14, 2, 64, vocab=151936, mlp=4864, depth=24, tied=True),
    "qwen2.5-1.5b": _released(12, 2, vocab=151936, mlp=8960, depth=28, tied=True),
    "qwen2.5-3b": _released(16, 2, vocab=151936, mlp=11008, depth=36, tied=True),
    "qwen2.5-7b": _released(28, 4, vocab=152064, mlp=18944, depth=28),
    "qwen2.5-14b": _released(40, 8, vocab=152064, mlp=13824, depth=48),
    "qwen2.5-32b": _released(40, 8, vocab=152064, mlp=27648, depth=64),
    "qwen2.5-72b": _released(64, 8, vocab=152064, mlp=29568, depth=80),
    "tiny_qwen2": ModelConfig(
        NAME,
        TextConfig(**TINY_TEXT, head_dim=16, rope=RopeConfig(1e4), qkv_bias=True),
        **TINY_ENDS,
    ),
}


def read_config(raw: HFConfig) -> ModelConfig:
    t = text_keys(raw)
    text = read_text_config(
        t, read_plain_rope(t), norm_eps=1e-6, max_positions=32768, qkv_bias=True
    )
    return ModelConfig(NAME, text)


def write_config(cfg: ModelConfig) -> HFConfig:
    return write_text_config(cfg.text) | {"use_sliding_window": False}


FAMILY = Family(
    name=NAME,
    architecture="Qwen2ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    tensor_names=TEXT_TENSOR_NAMES,
    presets=PRESETS,
    released={
        f"Qwen2.5-{size}B-Instruct": f"qwen2.5-{size}b"
        for size in ("0.5", "1.5", "3", "7", "14", "32", "72")
    },
)
