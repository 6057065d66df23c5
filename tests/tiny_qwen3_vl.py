"""A tiny Qwen3-VL in cptjax and transformers; `tiny` prepares its input rows."""

import copy
from pathlib import Path
from typing import Any

import pytest
from tiny import END, EOS, IMAGE, PAD, START, VIDEO

from cptjax.models.config import ModelConfig
from cptjax.models.hf_config import config_from_hf

TEXT = {
    "vocab_size": 384,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not width / heads
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_heads": 8,
    "out_hidden_size": 96,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}


def hf_config(tied: bool = False, text: dict | None = None, vision: dict | None = None) -> Any:
    """Return transformers' config of the tiny model.

    Every mesh of the tests divides its 8 heads.
    """
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        text_config=copy.deepcopy(TEXT | (text or {})),
        vision_config=VISION | (vision or {}),
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def our_config(**kwargs: Any) -> ModelConfig:
    return config_from_hf(hf_config(**kwargs).to_dict())


def torch_model(seed: int = 0, **kwargs: Any) -> Any:
    """Return a random transformers model without zero biases or unit norms."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(hf_config(**kwargs)).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            is_scale = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.1 * noise if is_scale else 0.1 * noise)
    return model


def save(folder: str | Path, seed: int = 0, dtype: str = "float32", **kwargs: Any) -> Path:
    """Write a random checkpoint with transformers."""
    torch = pytest.importorskip("torch")

    torch_model(seed, **kwargs).to(getattr(torch, dtype)).save_pretrained(folder)
    return Path(folder)
