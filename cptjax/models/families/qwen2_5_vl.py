"""Qwen2.5-VL: 3B, 7B, 32B, 72B."""

from cptjax.common import images
from cptjax.models import vision_qwen2_5
from cptjax.models.config import ModelConfig, RopeConfig, TextConfig
from cptjax.models.family import (
    TEXT_TENSOR_NAMES,
    Family,
    HFConfig,
    ImageTower,
    expect_value,
    find_key,
    read_text_config,
    rope_keys,
    text_keys,
    write_text_config,
)
from cptjax.models.layers import MLP_LINEARS
from cptjax.models.vision_qwen2_5 import Qwen25VisionConfig

NAME = "qwen2_5_vl"
TOKENS = {
    "image_token": 151655,
    "video_token": 151656,
    "vision_start": 151652,
    "vision_end": 151653,
}
TOKEN_KEYS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
ENDS = {"eos": (151645, 151643), "pad": 151643}


def _text(**shape: int | bool) -> TextConfig:
    rope = RopeConfig(1e6, (16, 24, 24))
    return TextConfig(**shape, head_dim=128, rope=rope, qkv_bias=True, max_positions=128000)


def _model(vision: Qwen25VisionConfig, **shape: int | bool) -> ModelConfig:
    return ModelConfig(NAME, _text(**shape), vision, **TOKENS, **ENDS)


LARGE_TOWER = Qwen25VisionConfig(mlp=3456)
PRESETS = {
    "3b": _model(
        Qwen25VisionConfig(),
        vocab=151936,
        width=2048,
        mlp=11008,
        depth=36,
        heads=16,
        kv_heads=2,
        tied=True,
    ),
    "7b": _model(
        Qwen25VisionConfig(), vocab=152064, width=3584, mlp=18944, depth=28, heads=28, kv_heads=4
    ),
    "32b": _model(LARGE_TOWER, vocab=152064, width=5120, mlp=27648, depth=64, heads=40, kv_heads=8),
    "72b": _model(LARGE_TOWER, vocab=152064, width=8192, mlp=29568, depth=80, heads=64, kv_heads=8),
    "tiny": ModelConfig(  # of the demo: 0.2 M parameters, 384 tokens
        NAME,
        TextConfig(
            vocab=384,
            width=64,
            mlp=192,
            depth=2,
            heads=4,
            kv_heads=2,
            head_dim=16,
            rope=RopeConfig(1e4, (2, 3, 3)),
            tied=True,
            qkv_bias=True,
            max_positions=1024,
        ),
        Qwen25VisionConfig(
            depth=2, width=48, mlp=96, heads=4, patch=8, window=32, full_blocks=(1,)
        ),
        image_token=5,
        video_token=6,
        vision_start=3,
        vision_end=4,
        eos=(2, 0),
        pad=0,
    ),
}


def read_config(raw: HFConfig) -> ModelConfig:
    """Read a config.json; the keys of the text model are at the top level or in `text_config`."""
    t = text_keys(raw)
    text = read_text_config(t, _read_rope(t), norm_eps=1e-5, max_positions=32768, qkv_bias=True)
    expect_value("head_dim", text.head_dim, text.width // text.heads)
    sections = text.rope.sections
    if len(sections) != 3 or 2 * sum(sections) != text.head_dim:
        raise ValueError(
            f"config.json has mrope_section={list(sections)}; expected three numbers that sum to "
            f"{text.head_dim // 2}"
        )
    tokens = {
        name: find_key(raw, key, default=token)
        for (name, token), key in zip(TOKENS.items(), TOKEN_KEYS, strict=True)
    }
    return ModelConfig(
        NAME, text, _read_vision(find_key(raw, "vision_config"), text.width), **tokens, **ENDS
    )


def _read_rope(t: HFConfig) -> RopeConfig:
    rope = rope_keys(t)
    expect_value("rope type", rope["rope_type"], "mrope", "default")
    theta = find_key(rope, "rope_theta", default=1e6)
    return RopeConfig(float(theta), tuple(find_key(rope, "mrope_section")))


def _read_vision(v: HFConfig, width: int) -> Qwen25VisionConfig:
    expect_value("vision_config.hidden_act", find_key(v, "hidden_act", default="silu"), "silu")
    rope = v.get("rope_parameters") or {}
    expect_value("vision_config rope_theta", rope.get("rope_theta", 1e4), 1e4)
    out = find_key(v, "out_hidden_size", default=width)
    expect_value("vision_config.out_hidden_size", out, width)
    return Qwen25VisionConfig(
        depth=find_key(v, "depth"),
        width=find_key(v, "hidden_size"),
        mlp=find_key(v, "intermediate_size"),
        heads=find_key(v, "num_heads"),
        patch=find_key(v, "patch_size", "spatial_patch_size", default=14),
        temporal=find_key(v, "temporal_patch_size", default=2),
        merge=find_key(v, "spatial_merge_size", default=2),
        window=find_key(v, "window_size", default=112),
        full_blocks=tuple(find_key(v, "fullatt_block_indexes", default=(7, 15, 23, 31))),
        channels=find_key(v, "in_channels", "in_chans", default=3),
        tokens_per_second=int(find_key(v, "tokens_per_second", default=4)),
    )


def write_config(cfg: ModelConfig) -> HFConfig:
    """Return the keys of config.json, flat as in the released checkpoints."""
    v: Qwen25VisionConfig = cfg.vision
    sections = list(cfg.text.rope.sections)
    return write_text_config(cfg.text) | {
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": sections},
        "use_sliding_window": False,
        "image_token_id": cfg.image_token,
        "video_token_id": cfg.video_token,
        "vision_start_token_id": cfg.vision_start,
        "vision_end_token_id": cfg.vision_end,
        "vision_config": {
            "model_type": NAME,
            "depth": v.depth,
            "hidden_size": v.width,
            "intermediate_size": v.mlp,
            "num_heads": v.heads,
            "in_channels": v.channels,
            "in_chans": v.channels,
            "out_hidden_size": cfg.text.width,
            "patch_size": v.patch,
            "spatial_patch_size": v.patch,
            "temporal_patch_size": v.temporal,
            "spatial_merge_size": v.merge,
            "window_size": v.window,
            "fullatt_block_indexes": list(v.full_blocks),
            "hidden_act": "silu",
            "tokens_per_second": v.tokens_per_second,
        },
    }


FAMILY = Family(
    name=NAME,
    architecture="Qwen2_5_VLForConditionalGeneration",
    read_config=read_config,
    write_config=write_config,
    tensor_names=TEXT_TENSOR_NAMES
    | {
        "vision.patch": "visual.patch_embed.proj",
        "vision.blocks.norm1": "visual.blocks.{}.norm1",
        "vision.blocks.norm2": "visual.blocks.{}.norm2",
        "vision.blocks.qkv": "visual.blocks.{}.attn.qkv",
        "vision.blocks.proj": "visual.blocks.{}.attn.proj",
        "vision.blocks.gate": "visual.blocks.{}.mlp.gate_proj",
        "vision.blocks.up": "visual.blocks.{}.mlp.up_proj",
        "vision.blocks.down": "visual.blocks.{}.mlp.down_proj",
        "merger.norm": "visual.merger.ln_q",
        "merger.fc1": "visual.merger.mlp.0",
        "merger.fc2": "visual.merger.mlp.2",
    },
    presets=PRESETS,
    released={f"Qwen2.5-VL-{size.upper()}-Instruct": size for size in PRESETS if size != "tiny"},
    prefixes={"model.visual.": "visual.", "model.language_model.": "model."},
    tower=ImageTower(
        declare_params=vision_qwen2_5.declare_tower,
        run=vision_qwen2_5.run_tower,
        merge=vision_qwen2_5.merge_states,
        frame_layout=vision_qwen2_5.frame_layout,
        token_positions=vision_qwen2_5.token_positions,
        count_flops=vision_qwen2_5.tower_flops,
        adapters={"q": "qkv", "k": "qkv", "v": "qkv", "o": "proj"}
        | {name: name for name in MLP_LINEARS},
        processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": images.DEFAULT_MIN_PIXELS,
            "max_pixels": images.DEFAULT_MAX_PIXELS,
        },
    ),
)
