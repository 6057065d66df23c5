"""Model configs: released and newer config.json files, presets, and what is refused."""

import dataclasses
import json

import pytest
import tiny

from cptjax.generation import decode_loop
from cptjax.models.families import PRESETS
from cptjax.models.hf_config import config_from_hf, config_to_hf, read_model_config

VISION = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
SIZES = {  # hidden_size, intermediate_size, heads, layers, kv heads, tied, vocab_size, the tower's mlp
    "3b": (2048, 11008, 16, 36, 2, True, 151936, 3420),
    "7b": (3584, 18944, 28, 28, 4, False, 152064, 3420),
    "32b": (5120, 27648, 40, 64, 8, False, 152064, 3456),
    "72b": (8192, 29568, 64, 80, 8, False, 152064, 3456),
}
GENERATION = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "eos_token_id": [151645, 151643],
    "do_sample": True,
    "temperature": 1e-6,
}


def released(size: str) -> dict:
    """The config.json on the Hub, with the keys of the text model at the top."""
    width, mlp, heads, layers, kv, tied, vocab, tower = SIZES[size]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 128000,
        "max_window_layers": layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": VISION | {"out_hidden_size": width, "intermediate_size": tower},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab,
    }


@pytest.mark.parametrize("size", SIZES)
def test_presets_are_the_released_configs(size):
    assert config_from_hf(released(size), GENERATION) == PRESETS[size]


@pytest.mark.parametrize("size", SIZES)
def test_the_newer_layout_reads_the_same(size, tmp_path):
    """transformers 5 nests the text keys and writes rope_parameters."""
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig(**released(size)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in raw["text_config"] and "hidden_size" not in raw
    assert read_model_config(tmp_path) == PRESETS[size]


def test_nested_text_config_with_rope_scaling_and_tying():
    """transformers 4.52-4.57: nested, but rope_scaling, and tying in text_config alone."""
    flat = released("3b")
    vision = flat.pop("vision_config")
    outer = {
        k: flat.pop(k)
        for k in (
            "model_type",
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
        )
    }
    scaling = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    nested = outer | {
        "text_config": flat | {"rope_scaling": scaling, "model_type": "qwen2_5_vl_text"},
        "vision_config": vision,
    }
    assert config_from_hf(nested, GENERATION) == PRESETS["3b"]
    assert config_from_hf(nested | {"tie_word_embeddings": False}, GENERATION) == PRESETS["3b"]


def test_missing_keys_have_the_defaults_of_transformers():
    from transformers import Qwen2_5_VLConfig

    raw = released("7b")
    for key in (
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_theta",
        "hidden_act",
        "use_sliding_window",
    ):
        del raw[key]
    for key in (
        "tokens_per_second",
        "window_size",
        "fullatt_block_indexes",
        "temporal_patch_size",
        "patch_size",
        "spatial_patch_size",
    ):
        del raw["vision_config"][key]
    theirs, ours = Qwen2_5_VLConfig(**raw), config_from_hf(raw)
    assert ours.text.norm_eps == theirs.text_config.rms_norm_eps
    assert ours.text.max_positions == theirs.text_config.max_position_embeddings
    assert ours.text.rope.theta == theirs.text_config.rope_parameters["rope_theta"]
    for name, key in {
        "tokens_per_second": "tokens_per_second",
        "window": "window_size",
        "temporal": "temporal_patch_size",
    }.items():
        assert getattr(ours.vision, name) == getattr(theirs.vision_config, key)
    assert ours.vision.full_blocks == tuple(theirs.vision_config.fullatt_block_indexes)


@pytest.mark.parametrize("size", PRESETS)
def test_a_written_config_reads_back(size):
    """By us, and by transformers, which writes its own form of it."""
    from transformers import AutoConfig

    cfg = PRESETS[size]
    raw = config_to_hf(cfg)
    generation = {"eos_token_id": list(cfg.eos), "pad_token_id": cfg.pad}
    assert config_from_hf(raw, generation) == cfg
    theirs = AutoConfig.for_model(**raw)
    assert config_from_hf(theirs.to_dict(), generation) == cfg
    text = theirs.get_text_config()
    assert theirs.tie_word_embeddings == cfg.text.tied
    assert text.rms_norm_eps == cfg.text.norm_eps
    assert text.rope_parameters["rope_theta"] == cfg.text.rope.theta
    if cfg.text.rope.sections is not None:
        assert text.rope_parameters["mrope_section"] == list(cfg.text.rope.sections)


@pytest.mark.parametrize(
    "pads,wanted",
    [((-1, None), 2), ((7, -1), 7), ((-1, 9), 9), ((-1, -1), 2), ((7, 9), 9), ((None, None), 2)],
)
def test_a_padding_token_of_minus_one_is_not_set(pads, wanted):
    """Neither of config.json nor of generation_config.json; the end token pads then."""
    raw = config_to_hf(PRESETS["tiny_llama"]) | {"eos_token_id": 2, "pad_token_id": pads[0]}
    cfg = config_from_hf(raw, {"pad_token_id": pads[1]})
    assert cfg.eos == (2,) and cfg.pad == wanted
    assert not decode_loop.forbidden_tokens(cfg, cfg.eos)[-1]


def test_config_is_hashable_and_frozen():
    assert hash(tiny.our_config()) == hash(tiny.our_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.our_config().pad = 1


def _without(key):
    return {k: v for k, v in released("7b").items() if k != key}


REFUSED = {
    "another model": ({"model_type": "qwen2_vl"} | _without("model_type"), "model_type='qwen2_vl'"),
    "no model type": (_without("model_type"), "model_type=None"),
    "no tower": (_without("vision_config"), "lacks 'vision_config'"),
    "no width": (_without("hidden_size"), "lacks 'hidden_size'"),
    "no sections": (released("7b") | {"rope_scaling": None}, "lacks 'mrope_section'"),
    "sections of another width": (
        released("7b") | {"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}},
        "mrope_section",
    ),
    "long-context rope": (
        released("7b")
        | {"rope_scaling": {"type": "yarn", "factor": 4, "mrope_section": [16, 24, 24]}},
        "'yarn'",
    ),
    "sliding window": (released("7b") | {"use_sliding_window": True}, "use_sliding_window=True"),
    "another activation": (released("7b") | {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "head width": (released("7b") | {"head_dim": 64}, "head_dim=64"),
    "tower of another text width": (
        released("7b") | {"vision_config": VISION | {"out_hidden_size": 2048}},
        "out_hidden_size=2048",
    ),
    "kv heads": (released("7b") | {"num_key_value_heads": 5}, "num_key_value_heads=5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_architecture_is_refused_in_one_line(name):
    raw, expected = REFUSED[name]
    with pytest.raises(ValueError) as error:
        config_from_hf(raw)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist"):
        read_model_config(tmp_path)


def test_broken_json_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="config.json: expected JSON"):
        read_model_config(tmp_path)
