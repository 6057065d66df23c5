"""Mistral 7B v0.3 and others of type mistral without a sliding window, such as WildGuard."""

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

NAME = "mistral"

_7B = TextConfig(
    vocab=32768,
    width=4096,
    mlp=14336,
    depth=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    rope=RopeConfig(1e6),
    norm_eps=1e-5,
    max_positions=32768,
)
PRESETS = {
    "mistral-7b": ModelConfig(NAME, _7B, eos=(2,), pad=2),
    "tiny_mistral": ModelConfig(
        NAME, TextConfig(**TINY_TEXT, head_dim=16, rope=RopeConfig(1e4)), **TINY_ENDS
    ),
}


def read_config(raw: HFConfig) -> ModelConfig:
    t = text_keys(raw)
    # transformers attends within 4,096 positions where the key is missing.
    expect_value("sliding_window", t.get("sliding_window", 4096), None)
    text = read_text_config(t, read_plain_rope(t), norm_eps=1e-6, max_positions=131072)
    return ModelConfig(NAME, text)


def write_config(cfg: ModelConfig) -> HFConfig:
    return write_text_config(cfg.text) | {"sliding_window": None}


FAMILY = Family(
    name=NAME,
    architecture="MistralForCausalLM",
    read_config=read_config,
    write_config=write_config,
    tensor_names=TEXT_TENSOR_NAMES,
    presets=PRESETS,
    released={"Mistral-7B-Instruct-v0.3": "mistral-7b", "wildguard": "mistral-7b"},
)
