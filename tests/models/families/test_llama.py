"""Llama 3's rotary scaling at long positions, and what else differs from transformers' llama."""

import numpy as np
import pytest
import tiny

from cptjax.models import decoder
from cptjax.models.families import PRESETS
from cptjax.models.hf_config import config_from_hf, config_to_hf


@pytest.mark.parametrize("size", ["llama3.1-8b", "llama3.2-1b", "tiny_llama"])
def test_the_angles_are_those_of_transformers_beyond_8192_positions(size):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    cfg = PRESETS[size]
    positions = np.array([0, 1, 77, 8191, 8192, 8193, 20_000, 131_071])
    rotary = LlamaRotaryEmbedding(AutoConfig.for_model(**config_to_hf(cfg)))
    wanted = rotary(torch.zeros(1), torch.tensor(positions[None]))
    ours = decoder.rope_cos_sin(np.broadcast_to(positions, (3, 8)), cfg.text)
    for mine, theirs in zip(ours, wanted, strict=True):
        half = theirs[0, :, : cfg.text.head_dim // 2]
        # An angle of 131,071 has the float32 rounding of 0.008.
        np.testing.assert_allclose(mine[:5], half[:5], atol=2e-3)
        np.testing.assert_allclose(mine[5:], half[5:], atol=2e-2)
    frequencies = decoder.rope_frequencies(cfg.text.rope, cfg.text.head_dim)
    np.testing.assert_allclose(frequencies, rotary.inv_freq, rtol=1e-6)
    slowest = 1 / cfg.text.rope.theta ** (1 - 2 / cfg.text.head_dim)
    assert frequencies[-1] == pytest.approx(slowest / cfg.text.rope.scaling.factor, rel=1e-5)


REFUSED = {
    "biases": ({"attention_bias": True}, "attention_bias=True"),
    "biases of the MLP": ({"mlp_bias": True}, "mlp_bias=True"),
    "another scaling": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "rope type='yarn'",
    ),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_are_refused_in_one_line(name):
    changes, expected = REFUSED[name]
    raw = tiny.hf_config(family="llama").to_dict() | changes
    with pytest.raises(ValueError) as error:
        config_from_hf(raw)
    assert expected in str(error.value) and "\n" not in str(error.value)
