"""What a model family is: data and functions, and the parts of config.json that families share."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cptjax.models.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from cptjax.models.positions import FrameLayout
from cptjax.types import Array, Params, Vision

MIN_FRAMES, MAX_FRAMES = 4, 768  # used of a video, as in transformers
# Sizes in TextConfig and VisionConfig.
SIZES = {
    *("vocab", "width", "mlp", "depth", "heads", "kv_heads", "head_dim", "max_positions"),
    *("patch", "temporal", "merge", "channels"),
}
MAX_SIZE, MAX_LAYERS = 2**24, 2**12
HFConfig = dict[str, Any]  # the content of a config.json
Grid = tuple[int, int, int]  # time, height, width in patches


class MediaGrid(NamedTuple):
    """The size of an image or a video of a conversation."""

    kind: str  # image | video
    grid: Grid
    seconds: float = 0.0  # from one frame pair of a video to the next
    times: tuple[float, ...] = ()  # the second of each frame pair of a video


class VisionFeatures(NamedTuple):
    """The output of a vision tower, one feature per token."""

    merged: Array  # [S N D] replace the embeddings of the tokens
    # [n S N D] are added to the tokens' hidden states after the first n decoder layers, or None.
    added: Array | None = None


def choose_even_frames(total: int, native_fps: float, fps: float, temporal: int) -> tuple[int, ...]:
    """Return frames at a steady rate from the first one, a multiple of `temporal` if possible."""
    most = min(MAX_FRAMES, total) // temporal * temporal
    n = int(min(max(total / native_fps * fps, MIN_FRAMES), most)) // temporal * temporal or 1
    return tuple((np.arange(n) * (total / n)).astype(np.float32).astype(int).tolist())


@dataclasses.dataclass(frozen=True)
class ImageTower:
    """How a family takes images and videos: layout on the host, encoding on the device."""

    # -> {"vision": ..., "merger": ...}
    declare_params: Callable[[ModelConfig], Params]
    # -> `Prompts.tower_states`; the parameters of the merger are not used.
    run: Callable[[Params, Vision, ModelConfig, jnp.dtype], tuple[Array, ...]]
    # The states -> features; of all parameters only those of the merger are used.
    merge: Callable[[Params, tuple[Array, ...], ModelConfig], VisionFeatures]
    # The order of the patches of a frame of h x w patches.
    frame_layout: Callable[[int, int, VisionConfig], FrameLayout]
    # (types [T], grids, seconds per frame pair of each video) -> time, height, width ids [3 T]
    token_positions: Callable[
        [np.ndarray, Sequence[Grid], Sequence[float], VisionConfig], np.ndarray
    ]
    # FLOPs of `patches` slots in all, in frames of `frame` slots each.
    count_flops: Callable[[ModelConfig, float, float], float]
    adapters: Mapping[str, str]  # a target of LoRA -> the map of the tower's blocks
    processor: HFConfig  # preprocessor_config.json where a checkpoint does not say otherwise
    # Rewrite the pieces of a rendered conversation so that each frame pair of a video has a
    # placeholder and a grid of its own; None = a video has one placeholder.
    rewrite_videos: (
        Callable[[list[str], list[MediaGrid]], tuple[list[str], list[MediaGrid]]] | None
    ) = None
    # (frames of a video, their rate, wanted rate, frames of a patch) -> the frames to use.
    choose_frames: Callable[[int, float, float, int], tuple[int, ...]] = choose_even_frames
    # video_preprocessor_config.json where a checkpoint does not say otherwise: `size` limits the
    # pixels of all frames of a video together; None = each frame has the limits of an image.
    video_processor: HFConfig | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family; the decoder is common to all, with the options of TextConfig."""

    name: str  # model_type of config.json
    architecture: str  # its class in transformers
    # All of a ModelConfig but the end, padding and start tokens, which hf_config reads.
    read_config: Callable[[HFConfig], ModelConfig]
    write_config: Callable[[ModelConfig], HFConfig]
    # Module in the tree -> module in the released checkpoints; {} is the number of the layer. The
    # leaf "w" and a module that is a single vector are .weight; the leaf "b" is .bias.
    tensor_names: Mapping[str, str]
    presets: Mapping[str, ModelConfig]
    released: Mapping[str, str]  # name on the hub, without its owner -> preset
    # Prefixes that some versions of transformers write -> those of the released checkpoints.
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tower: ImageTower | None = None


# What a text-only preset of the package's own tokenizer has, in any family.
TINY_TEXT = {"vocab": 384, "width": 64, "mlp": 192, "depth": 2, "heads": 4, "kv_heads": 2}
TINY_TEXT |= {"tied": True, "max_positions": 1024}
TINY_ENDS = {"eos": (2, 0), "pad": 0}

TEXT_TENSOR_NAMES = {
    "text.embed": "model.embed_tokens",
    "text.blocks.norm1": "model.layers.{}.input_layernorm",
    "text.blocks.norm2": "model.layers.{}.post_attention_layernorm",
    "text.blocks.q": "model.layers.{}.self_attn.q_proj",
    "text.blocks.k": "model.layers.{}.self_attn.k_proj",
    "text.blocks.v": "model.layers.{}.self_attn.v_proj",
    "text.blocks.o": "model.layers.{}.self_attn.o_proj",
    "text.blocks.q_norm": "model.layers.{}.self_attn.q_norm",
    "text.blocks.k_norm": "model.layers.{}.self_attn.k_norm",
    "text.blocks.gate": "model.layers.{}.mlp.gate_proj",
    "text.blocks.up": "model.layers.{}.mlp.up_proj",
    "text.blocks.down": "model.layers.{}.mlp.down_proj",
    "text.norm": "model.norm",
    "text.unembed": "lm_head",
}


def find_key(source: HFConfig, *names: str, default: Any = dataclasses.MISSING) -> Any:
    """Return the value of the first of `names` that is set."""
    for name in names:
        if source.get(name) is not None:
            return source[name]
    if default is dataclasses.MISSING:
        raise ValueError(
            f"config.json lacks {names[0]!r}; copy the whole file from the checkpoint of its "
            "model_type"
        )
    return default


def positive_size(source: HFConfig, name: str, default: Any = dataclasses.MISSING) -> int:
    """Return a size, which other sizes are divided by."""
    value = find_key(source, name, default=default)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json has {name}={value!r:.60}; expected a whole number above 0")
    return value


def expect_value(key: str, value: Any, *supported: Any) -> None:
    """Refuse a value that the models of a family do not have."""
    if value not in supported:
        raise ValueError(
            f"config.json has {key}={value!r}; expected {' or '.join(map(repr, supported))}, the "
            "only form that is implemented"
        )


def check_shape(cfg: ModelConfig, tokens: Sequence[Any]) -> None:
    """Refuse sizes that are no whole numbers above 0, and tokens outside of the vocabulary."""
    for part in filter(None, (cfg.text, cfg.vision)):
        for name, value in dataclasses.asdict(part).items():
            is_size = isinstance(value, int) and not isinstance(value, bool)
            most = MAX_LAYERS if name == "depth" else MAX_SIZE
            if name in SIZES and not (is_size and 0 < value <= most):
                raise ValueError(
                    f"config.json gives the size {name}={value!r:.60}; expected a whole number "
                    f"from 1 to {most}"
                )
    if cfg.vision and cfg.vision.width % cfg.vision.heads:
        raise ValueError(
            f"config.json gives {cfg.vision.heads} heads to a vision tower of width "
            f"{cfg.vision.width}; expected a divisor of the width"
        )
    if not (0 < cfg.text.rope.theta < math.inf and 0 <= cfg.text.norm_eps < 1):
        raise ValueError(
            f"config.json gives rope_theta={cfg.text.rope.theta}, "
            f"rms_norm_eps={cfg.text.norm_eps}; expected numbers above 0, the second one below 1"
        )
    vocab = cfg.text.vocab
    for token in tokens:
        if not isinstance(token, int) or not -1 <= token < vocab:
            raise ValueError(
                f"config.json or generation_config.json names the token {token!r:.60}; expected a "
                f"number below vocab_size={vocab}"
            )


def text_keys(raw: HFConfig) -> HFConfig:
    """Return the keys of the text model, which are at the top level or in `text_config`."""
    text = {**raw, **(raw.get("text_config") or {})}
    # Older versions of transformers write tie_word_embeddings into text_config.
    tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return text | {"tie_word_embeddings": tied}


def rope_keys(text: HFConfig) -> HFConfig:
    """Return the rotary parameters, under the names of transformers 5."""
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", text.get("rope_theta"))
    return rope


def read_plain_rope(text: HFConfig) -> RopeConfig:
    """Read a rotary embedding of one position id without scaling."""
    rope = rope_keys(text)
    expect_value("rope type", rope["rope_type"], "default")
    return RopeConfig(float(find_key(rope, "rope_theta", default=1e4)))


def read_text_config(
    t: HFConfig, rope: RopeConfig, *, norm_eps: float, max_positions: int, **options: bool
) -> TextConfig:
    """Return the shape of a text model; `norm_eps` and `max_positions` are transformers' defaults.

    options: fields of TextConfig that are the same in all models of the family.
    """
    expect_value("hidden_act", find_key(t, "hidden_act", default="silu"), "silu")
    expect_value("use_sliding_window", bool(t.get("use_sliding_window", False)), False)
    for kind in t.get("layer_types") or ():
        expect_value("layer_types", kind, "full_attention")
    width, heads = positive_size(t, "hidden_size"), positive_size(t, "num_attention_heads")
    kv_heads = positive_size(t, "num_key_value_heads", default=heads)
    head_dim = find_key(t, "head_dim", default=width // heads)
    if heads % kv_heads or (t.get("head_dim") is None and width % heads) or head_dim % 2:
        raise ValueError(
            f"config.json has num_attention_heads={heads}, num_key_value_heads={kv_heads}, "
            f"hidden_size={width}, head_dim={t.get('head_dim')}; expected heads that divide the "
            "width, key/value heads that divide the heads, and an even head_dim"
        )
    return TextConfig(
        vocab=find_key(t, "vocab_size"),
        width=width,
        mlp=find_key(t, "intermediate_size"),
        depth=find_key(t, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        norm_eps=float(find_key(t, "rms_norm_eps", default=norm_eps)),
        tied=bool(t.get("tie_word_embeddings")),
        max_positions=find_key(t, "max_position_embeddings", default=max_positions),
        **options,
    )


def write_text_config(t: TextConfig) -> HFConfig:
    """Return the keys of the text model, without those of its rotary embedding but theta."""
    return {
        "vocab_size": t.vocab,
        "hidden_size": t.width,
        "intermediate_size": t.mlp,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "head_dim": t.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": t.max_positions,
        "rms_norm_eps": t.norm_eps,
        "rope_theta": t.rope.theta,
        "rope_scaling": None,
        "tie_word_embeddings": t.tied,
        "attention_dropout": 0.0,
    }
