"""Qwen3-VL's presets are the released configs, and other forms of them are refused in one line."""

import copy

import pytest

from cptjax.models import causal_lm, trainable
from cptjax.models.families import PRESETS, RELEASED
from cptjax.models.hf_config import config_from_hf, config_to_hf

GENERATION = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
# As in the config.json of Qwen3-VL-4B-Instruct.
RELEASED_4B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}


def test_the_preset_is_the_released_config():
    assert config_from_hf(RELEASED_4B, GENERATION) == PRESETS["qwen3-vl-4b"]
    assert RELEASED["Qwen3-VL-4B-Instruct"] == PRESETS["qwen3-vl-4b"]


def test_transformers_reads_what_is_written_and_writes_what_is_read(tmp_path):
    from transformers import Qwen3VLConfig

    for cfg in (PRESETS["qwen3-vl-8b"], PRESETS["tiny_qwen3_vl"]):
        written = config_to_hf(cfg)
        assert config_from_hf(written, {"eos_token_id": list(cfg.eos)}) == cfg
        theirs = Qwen3VLConfig(**copy.deepcopy(written)).to_dict()
        assert config_from_hf(theirs, {"eos_token_id": list(cfg.eos)}) == cfg


@pytest.mark.parametrize(
    "size, billions", [("2b", 2.13), ("4b", 4.44), ("8b", 8.77), ("32b", 33.36)]
)
def test_parameters_are_as_many_as_published(size, billions):
    declared = causal_lm.declare_params(PRESETS[f"qwen3-vl-{size}"])
    assert trainable.count_params(declared) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(
    "part, key, value, words",
    [
        ("vision_config", "hidden_act", "silu", ("hidden_act='silu'", "gelu_pytorch_tanh")),
        ("vision_config", "out_hidden_size", 64, ("out_hidden_size=64", "2560")),
        ("vision_config", "num_position_embeddings", 2300, ("2300", "2304")),
        ("vision_config", "deepstack_visual_indexes", [5, 5], ("[5, 5]", "rising")),
        ("text_config", "attention_bias", True, ("attention_bias=True", "False")),
        (
            "text_config",
            "rope_scaling",
            {"mrope_section": [24, 20, 2], "rope_type": "default"},
            ("[24, 20, 2]", "64"),
        ),
    ],
)
def test_other_forms_are_refused_in_one_line(part, key, value, words):
    raw = copy.deepcopy(RELEASED_4B)
    raw[part][key] = value
    with pytest.raises(ValueError) as caught:
        config_from_hf(raw)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
