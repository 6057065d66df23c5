"""A family is one module and one row of the table; other families are refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cptjax import sharding
from cptjax.models import causal_lm, families, hf_checkpoint, lora
from cptjax.models.families import FAMILIES, PRESETS, llama
from cptjax.models.hf_config import config_from_hf, config_to_hf, read_model_config
from cptjax.models.load import check_parts, declare_model_params
from cptjax.models.trainable import count_params, is_trained


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe", "qwen3_5", "mixtral", None])
def test_other_families_are_refused_with_the_supported_names(name):
    with pytest.raises(ValueError) as error:
        config_from_hf({"model_type": name})
    message = str(error.value)
    assert repr(name) in message and "\n" not in message
    assert all(family in message for family in FAMILIES)


def test_a_new_family_is_one_module_and_one_row(monkeypatch, tmp_path):
    """The module below and its row are all that a llama under another name needs."""
    module = dataclasses.replace(  # the module
        llama.FAMILY,
        name="alpaca",
        read_config=lambda raw: dataclasses.replace(llama.read_config(raw), family="alpaca"),
        presets={},
        released={},
    )
    monkeypatch.setitem(families.FAMILIES, module.name, module)  # the row
    cfg = dataclasses.replace(PRESETS["tiny_llama"], family="alpaca")
    hf_checkpoint.write_random_checkpoint(cfg, tmp_path / "a", "float32")
    assert read_model_config(tmp_path / "a") == cfg
    params = hf_checkpoint.load_hf_checkpoint(tmp_path / "a", cfg)
    prompts = tiny.prompts([tiny.random_row([9], cfg, np.random.default_rng(0))], cfg)
    forward = jax.jit(causal_lm.forward, static_argnums=2)
    hidden = forward(params, prompts, cfg)
    same = forward(params, prompts, PRESETS["tiny_llama"])
    assert np.array_equal(hidden, same) and np.isfinite(hidden).all()
    assert config_to_hf(cfg)["model_type"] == "alpaca"


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_qwen3", "tiny_llama"])
def test_adapters_and_freezing_know_a_model_without_a_tower(name):
    from configs import base

    settings = base.get_config().model
    settings.lora.rank = 2
    cfg = PRESETS[name]
    tree = declare_model_params(settings, cfg)
    assert tree.keys() == {"text"}
    for target in lora.DECODER_LINEARS:
        assert {"lora_a", "lora_b"} <= tree["text"]["blocks"][target].keys()
    for part in ("vision", "language"):
        settings.freeze = (part,)
        with pytest.raises(ValueError, match=f"freeze names {part}"):
            check_parts(settings, cfg)
    assert is_trained((), 0)(("text", "blocks", "q_norm"))


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
def test_a_saved_folder_is_bit_identical_in_bfloat16(tmp_path, family):
    pytest.importorskip("torch")
    from safetensors.numpy import load_file

    source = tiny.save(tmp_path / "hf", dtype="bfloat16", family=family, tied=family == "llama")
    cfg = read_model_config(source)
    params = hf_checkpoint.load_hf_checkpoint(source, cfg)
    hf_checkpoint.save_hf_checkpoint(params, cfg, tmp_path / "ours")
    theirs, ours = (load_file(f / "model.safetensors") for f in (source, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        assert x.dtype == ours[name].dtype and x.tobytes() == ours[name].tobytes(), name
    assert read_model_config(tmp_path / "ours") == cfg


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
def test_meshes_give_the_same_logits(family):
    cfg = tiny.our_config(family=family)
    params = jax.tree.map(jnp.asarray, tiny.random_params(cfg))
    rng = np.random.default_rng(0)
    prompts = tiny.prompts([tiny.random_row([9], cfg, rng) for _ in range(4)], cfg)
    forward = jax.jit(lambda p, x: causal_lm.forward(p, x, cfg))
    wanted = np.asarray(forward(params, prompts))
    for shape in ((2, 2, 2), (1, 4, 2)):
        mesh = sharding.make_mesh(*shape)
        places = sharding.param_shardings(causal_lm.declare_params(cfg), mesh)
        with jax.set_mesh(mesh):
            found = forward(jax.device_put(params, places), sharding.place_prompts(prompts, mesh))
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


RELEASED_SIZES = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_presets_have_as_many_parameters_as_the_released_models():
    for name, size in RELEASED_SIZES.items():
        assert count_params(causal_lm.declare_params(PRESETS[name])) == size, name
