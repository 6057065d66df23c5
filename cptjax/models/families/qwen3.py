"""Qwen3, dense text models of 0.6B to 32B."""

from typing import Any

from cptjax.models.config import ModelConfig, RopeConfig, TextConfig
from cptjax.models.family import (
    TEXT_TENSOR_NAMES,
    TINY_ENDS,
    TINY_TEXT,
    Family,
    HFConfig,
    expect_value,
    read_plain_rope,
    read_text_config,
    text_keys,
    write_text_config,
)

NAME = "qwen3"


def _released(width: int, heads: int, **shape: Any) -> ModelConfig:
    """Return the config of a released model; its heads are 128 wide whatever its width."""
    text = TextConfig(
        vocab=151936,
        width=width,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        qk_norm=True,
        max_positions=40960,
        **shape,
    )
    return ModelConfig(NAME, text, eos=(151645, 151643), pad=151643)


PRESETS = {
    "qwen3-0.6b": _released(1024, 16, mlp=3072, depth=28, tied=True),
    "qwen3-1.7b": _released(2048, 16, mlp=6144, depth=28, tied=True),
    "qwen3-4b": _released(2560, 32, mlp=9728, depth=36, tied=True),
    "qwen3-8b": _released(4096, 32, mlp=12288, depth=36),
    "qwen3-14b": _released(5120, 40, mlp=17408, depth=40),
    "qwen3-32b": _released(5120, 64, mlp=25600, depth=64),
    "tiny_qwen3": ModelConfig(
        NAME,
        TextConfig(**TINY_TEXT, head_dim=24, rope=RopeConfig(1e4), qk_norm=True),
        **TINY_ENDS,
    ),
}


def read_config(raw: HFConfig) -> ModelConfig:
    t = {"head_dim": 128} | text_keys(raw)  # the default of transformers
    expect_value("attention_bias", bool(t.get("attention_bias", False)), False)
    text = read_text_config(t, read_plain_rope(t), norm_eps=1e-6, max_positions=32768, qk_norm=True)
    return ModelConfig(NAME, text)


def write_config(cfg: ModelConfig) -> HFConfig:
    return write_text_config(cfg.text) | {"attention_bias": False, "use_sliding_window": False}


FAMILY = Family(
    name=NAME,
    architecture="Qwen3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    tensor_names=TEXT_TENSOR_NAMES,
    presets=PRESETS,
    released={f"Qwen3-{size}B": f"qwen3-{size}b" for size in ("0.6", "1.7", "4", "8", "14", "32")},
)
