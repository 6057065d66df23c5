"""Qwen3-VL, dense models of 2B, 4B, 8B and 32B."""

import re
from collections.abc import Sequence

import numpy as np

from cptjax.models import vision_qwen3
from cptjax.models.config import ModelConfig, RopeConfig, TextConfig
from cptjax.models.family import (
    MAX_FRAMES,
    MIN_FRAMES,
    TEXT_TENSOR_NAMES,
    TINY_ENDS,
    TINY_TEXT,
    Family,
    HFConfig,
    ImageTower,
    MediaGrid,
    expect_value,
    find_key,
    read_text_config,
    rope_keys,
    text_keys,
    write_text_config,
)
from cptjax.models.vision_qwen3 import Qwen3VisionConfig

NAME = "qwen3_vl"
TOKENS = {
    "image_token": 151655,
    "video_token": 151656,
    "vision_start": 151652,
    "vision_end": 151653,
}
TOKEN_KEYS = {
    "image_token": "image_token_id",
    "video_token": "video_token_id",
    "vision_start": "vision_start_token_id",
    "vision_end": "vision_end_token_id",
}
ENDS = {"eos": (151645, 151643), "pad": 151643}
SMALL_TOWER = Qwen3VisionConfig(depth=24, width=1024, mlp=4096, deepstack=(5, 11, 17))
LARGE_TOWER = Qwen3VisionConfig()
VIDEO_PLACEHOLDER = "<|video_pad|>"


def _released(
    tower: Qwen3VisionConfig, width: int, mlp: int, depth: int, heads: int, tied: bool
) -> ModelConfig:
    """Return the config of a released model; its heads are 128 wide whatever its width."""
    text = TextConfig(
        vocab=151936,
        width=width,
        mlp=mlp,
        depth=depth,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        rope=RopeConfig(5e6, (24, 20, 20), interleaved=True),
        tied=tied,
        qk_norm=True,
        max_positions=262144,
    )
    return ModelConfig(NAME, text, tower, **TOKENS, **ENDS)


PRESETS = {
    "qwen3-vl-2b": _released(SMALL_TOWER, 2048, 6144, 28, 16, tied=True),
    "qwen3-vl-4b": _released(SMALL_TOWER, 2560, 9728, 36, 32, tied=True),
    "qwen3-vl-8b": _released(LARGE_TOWER, 4096, 12288, 36, 32, tied=False),
    "qwen3-vl-32b": _released(LARGE_TOWER, 5120, 25600, 64, 64, tied=False),
    "tiny_qwen3_vl": ModelConfig(
        NAME,
        TextConfig(
            **TINY_TEXT,
            head_dim=24,
            rope=RopeConfig(1e4, (4, 4, 4), interleaved=True),
            qk_norm=True,
        ),
        Qwen3VisionConfig(depth=2, width=48, mlp=96, heads=4, patch=8, table=8, deepstack=(0,)),
        image_token=5,
        video_token=6,
        vision_start=3,
        vision_end=4,
        **TINY_ENDS,
    ),
}


def read_config(raw: HFConfig) -> ModelConfig:
    t = {"head_dim": 128} | text_keys(raw)  # the default of transformers
    expect_value("attention_bias", bool(t.get("attention_bias", False)), False)
    text = read_text_config(t, _read_rope(t), norm_eps=1e-6, max_positions=128000, qk_norm=True)
    if 2 * sum(text.rope.sections) != text.head_dim:
        raise ValueError(
            f"config.json has mrope_section={list(text.rope.sections)}; expected three numbers "
            f"that sum to {text.head_dim // 2}"
        )
    tokens = {
        name: find_key(raw, TOKEN_KEYS[name], default=token) for name, token in TOKENS.items()
    }
    tower = _read_tower(find_key(raw, "vision_config"), text)
    return ModelConfig(NAME, text, tower, **tokens, **ENDS)


def _read_rope(t: HFConfig) -> RopeConfig:
    rope = rope_keys(t)
    expect_value("rope type", rope["rope_type"], "default", "mrope")
    expect_value("mrope_interleaved", rope.get("mrope_interleaved", True), True)
    time, height, width = find_key(rope, "mrope_section", default=(24, 20, 20))
    theta = float(find_key(rope, "rope_theta", default=5e5))
    return RopeConfig(theta, (time, height, width), interleaved=True)


def _read_tower(v: HFConfig, text: TextConfig) -> Qwen3VisionConfig:
    activation = find_key(v, "hidden_act", default="gelu_pytorch_tanh")
    expect_value("vision_config.hidden_act", activation, "gelu_pytorch_tanh")
    rope = v.get("rope_parameters") or {}
    expect_value("vision_config rope_theta", rope.get("rope_theta", 1e4), 1e4)
    out = find_key(v, "out_hidden_size", default=text.width)
    expect_value("vision_config.out_hidden_size", out, text.width)
    rows = find_key(v, "num_position_embeddings", default=2304)
    side = round(rows**0.5)
    expect_value("vision_config.num_position_embeddings", rows, side**2)
    deepstack = tuple(find_key(v, "deepstack_visual_indexes", default=(8, 16, 24)))
    if list(deepstack) != sorted(set(deepstack)) or len(deepstack) > text.depth:
        raise ValueError(
            f"config.json has deepstack_visual_indexes={list(deepstack)}; expected rising numbers "
            f"of blocks, at most one for each of the {text.depth} text layers"
        )
    return Qwen3VisionConfig(
        depth=find_key(v, "depth"),
        width=find_key(v, "hidden_size"),
        mlp=find_key(v, "intermediate_size"),
        heads=find_key(v, "num_heads"),
        patch=find_key(v, "patch_size", default=16),
        temporal=find_key(v, "temporal_patch_size", default=2),
        merge=find_key(v, "spatial_merge_size", default=2),
        channels=find_key(v, "in_channels", default=3),
        table=side,
        deepstack=deepstack,
    )


def write_config(cfg: ModelConfig) -> HFConfig:
    """Return the keys of config.json, nested as in the released checkpoints."""
    t, v = cfg.text, cfg.vision
    rope = {
        "rope_type": "default",
        "mrope_section": list(t.rope.sections),
        "mrope_interleaved": True,
    }
    text = write_text_config(t) | {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "rope_scaling": rope,
    }
    return {
        **{key: getattr(cfg, name) for name, key in TOKEN_KEYS.items()},
        "tie_word_embeddings": t.tied,
        "text_config": text,
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": v.depth,
            "hidden_size": v.width,
            "intermediate_size": v.mlp,
            "num_heads": v.heads,
            "in_channels": v.channels,
            "out_hidden_size": t.width,
            "patch_size": v.patch,
            "temporal_patch_size": v.temporal,
            "spatial_merge_size": v.merge,
            "num_position_embeddings": v.table**2,
            "deepstack_visual_indexes": list(v.deepstack),
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


def choose_frames_to_the_end(
    total: int, native_fps: float, fps: float, temporal: int
) -> tuple[int, ...]:
    """Return frames at a nearly steady rate, the first and the last among them."""
    n = min(max(int(total / native_fps * fps), MIN_FRAMES), MAX_FRAMES, total)
    return tuple(np.linspace(0, total - 1, n).round().astype(int).tolist())


def rewrite_videos(
    pieces: Sequence[str], media: Sequence[MediaGrid]
) -> tuple[list[str], list[MediaGrid]]:
    """Give each frame pair of a video a placeholder of its own, after the text of its time.

    As transformers does since 5.10, the start and end that the chat template writes around the
    video stay around all of its frame pairs.
    """
    videos = iter([m for m in media if m.kind == "video"])

    def expand(placeholder: re.Match) -> str:
        video = next(videos, None)
        if video is None:  # the processor refuses a placeholder without a video
            return placeholder[0]
        frame = f"<|vision_start|>{VIDEO_PLACEHOLDER}<|vision_end|>"
        return "".join(f"<{time:.1f} seconds>{frame}" for time in video.times)

    pieces = [re.sub(re.escape(VIDEO_PLACEHOLDER), expand, piece) for piece in pieces]
    split = []
    for m in media:
        split += [m._replace(grid=(1, *m.grid[1:])) for _ in m.times] if m.kind == "video" else [m]
    return pieces, split


FAMILY = Family(
    name=NAME,
    architecture="Qwen3VLForConditionalGeneration",
    read_config=read_config,
    write_config=write_config,
    tensor_names={
        module: name.replace("model.", "model.language_model.")
        for module, name in TEXT_TENSOR_NAMES.items()
    }
    | {
        "vision.patch": "model.visual.patch_embed.proj",
        "vision.table": "model.visual.pos_embed",
        "vision.blocks.norm1": "model.visual.blocks.{}.norm1",
        "vision.blocks.norm2": "model.visual.blocks.{}.norm2",
        "vision.blocks.qkv": "model.visual.blocks.{}.attn.qkv",
        "vision.blocks.proj": "model.visual.blocks.{}.attn.proj",
        "vision.blocks.up": "model.visual.blocks.{}.mlp.linear_fc1",
        "vision.blocks.down": "model.visual.blocks.{}.mlp.linear_fc2",
        "merger.norm": "model.visual.merger.norm",
        "merger.fc1": "model.visual.merger.linear_fc1",
        "merger.fc2": "model.visual.merger.linear_fc2",
        "merger.deepstack.norm": "model.visual.deepstack_merger_list.{}.norm",
        "merger.deepstack.fc1": "model.visual.deepstack_merger_list.{}.linear_fc1",
        "merger.deepstack.fc2": "model.visual.deepstack_merger_list.{}.linear_fc2",
    },
    presets=PRESETS,
    released={f"Qwen3-VL-{size}B-Instruct": f"qwen3-vl-{size}b" for size in (2, 4, 8, 32)},
    tower=ImageTower(
        declare_params=vision_qwen3.declare_frame_tower,
        run=vision_qwen3.run_frame_tower,
        merge=vision_qwen3.merge_frame_states,
        frame_layout=vision_qwen3.whole_frame_layout,
        token_positions=vision_qwen3.frame_token_positions,
        count_flops=vision_qwen3.frame_tower_flops,
        # One map leads into the MLP; it stands for both maps of a gated one.
        adapters={"q": "qkv", "k": "qkv", "v": "qkv", "o": "proj"}
        | {"gate": "up", "up": "up", "down": "down"},
        processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen3VLProcessor",
            "min_pixels": 256 * 256,
            "max_pixels": 4096 * 4096,
        },
        rewrite_videos=rewrite_videos,
        choose_frames=choose_frames_to_the_end,
        video_processor={
            "video_processor_type": "Qwen3VLVideoProcessor",
            "size": {"shortest_edge": 64 * 64, "longest_edge": 24576 * 32 * 32},
        },
    ),
)
