"""Llama 3 with its rotary scaling, and all other models of type llama, such as SmolLM2."""

from typing import Any

from cptjax.models.config import Llama3Scaling, ModelConfig, RopeConfig, TextConfig
from cptjax.models.family import (
    TEXT_TENSOR_NAMES,
    TINY_ENDS,
    TINY_TEXT,
    Family,
    HFConfig,
    expect_value,
    find_key,
    read_plain_rope,
    read_text_config,
    rope_keys,
    text_keys,
    write_text_config,
)

NAME = "llama"


def _llama3(factor: float, heads: int, head_dim: int = 128, **shape: Any) -> ModelConfig:
    """Return the config of a released Llama 3 instruction model."""
    text = TextConfig(
        vocab=128256,
        width=heads * head_dim,
        heads=heads,
        kv_heads=8,
        head_dim=head_dim,
        rope=RopeConfig(5e5, scaling=Llama3Scaling(factor)),
        norm_eps=1e-5,
        max_positions=131072,
        **shape,
    )
    return ModelConfig(NAME, text, eos=(128001, 128008, 128009), pad=128009)


def _smollm2(heads: int, kv_heads: int, theta: float = 1e5, **shape: Any) -> ModelConfig:
    text = TextConfig(
        vocab=49152,
        width=heads * 64,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=64,
        rope=RopeConfig(theta),
        norm_eps=1e-5,
        tied=True,
        max_positions=8192,
        **shape,
    )
    return ModelConfig(NAME, text, eos=(2,), pad=2)


PRESETS = {
    "llama3.2-1b": _llama3(32, 32, 64, mlp=8192, depth=16, tied=True),
    "llama3.2-3b": _llama3(32, 24, mlp=8192, depth=28, tied=True),
    "llama3.1-8b": _llama3(8, 32, mlp=14336, depth=32),
    "llama3.1-70b": _llama3(8, 64, mlp=28672, depth=80),
    "smollm2-135m": _smollm2(9, 3, mlp=1536, depth=30),
    "smollm2-360m": _smollm2(15, 5, mlp=2560, depth=32),
    "smollm2-1.7b": _smollm2(32, 32, 1.3e5, mlp=8192, depth=24),
    "tiny_llama": ModelConfig(
        NAME,
        TextConfig(
            **TINY_TEXT,
            head_dim=16,
            rope=RopeConfig(1e4, scaling=Llama3Scaling(old_positions=128)),
        ),
        **TINY_ENDS,
    ),
}


def read_config(raw: HFConfig) -> ModelConfig:
    t = text_keys(raw)
    for name in ("attention_bias", "mlp_bias"):
        expect_value(name, bool(t.get(name, False)), False)
    return ModelConfig(NAME, read_text_config(t, _read_rope(t), norm_eps=1e-6, max_positions=2048))


def _read_rope(t: HFConfig) -> RopeConfig:
    rope = rope_keys(t)
    if rope["rope_type"] != "llama3":
        return read_plain_rope(t)
    scaling = Llama3Scaling(
        factor=float(find_key(rope, "factor")),
        low=float(find_key(rope, "low_freq_factor")),
        high=float(find_key(rope, "high_freq_factor")),
        old_positions=find_key(rope, "original_max_position_embeddings"),
    )
    return RopeConfig(float(find_key(rope, "rope_theta", default=1e4)), scaling=scaling)


def write_config(cfg: ModelConfig) -> HFConfig:
    keys = write_text_config(cfg.text) | {"attention_bias": False, "mlp_bias": False}
    if (s := cfg.text.rope.scaling) is not None:
        keys["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low,
            "high_freq_factor": s.high,
            "original_max_position_embeddings": s.old_positions,
        }
    return keys


FAMILY = Family(
    name=NAME,
    architecture="LlamaForCausalLM",
    read_config=read_config,
    write_config=write_config,
    tensor_names=TEXT_TENSOR_NAMES,
    presets=PRESETS,
    released={
        "Llama-3.2-1B-Instruct": "llama3.2-1b",
        "Llama-3.2-3B-Instruct": "llama3.2-3b",
        "Llama-3.1-8B-Instruct": "llama3.1-8b",
        "Llama-3.1-70B-Instruct": "llama3.1-70b",
        "SmolLM2-135M-Instruct": "smollm2-135m",
        "SmolLM2-360M-Instruct": "smollm2-360m",
        "SmolLM2-1.7B-Instruct": "smollm2-1.7b",
    },
)
