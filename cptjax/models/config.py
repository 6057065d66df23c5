"""Model configs: shapes, presets, and conversion from and to Hugging Face `config.json`."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower; the defaults are those of the released models."""

    depth: int = 32
    width: int = 1280
    mlp: int = 3420
    heads: int = 16
    patch: int = 14  # pixels
    temporal: int = 2  # frames of one patch
    merge: int = 2  # patches merged to one token, per side
    window: int = 112  # pixels
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)
    channels: int = 3
    tokens_per_second: int = 2  # time ids of one second of video

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_dim(self) -> int:
        return self.channels * self.temporal * self.patch**2

    @property
    def window_slots(self) -> int:
        """Number of patches of a whole window."""
        side = self.window // self.patch // self.merge * self.merge
        return side * side


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Shape of the language model; the defaults are those of the 7B model."""

    vocab: int = 152064
    width: int = 3584
    mlp: int = 18944
    depth: int = 28
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    rope_theta: float = 1e6
    rope_sections: tuple[int, int, int] = (16, 24, 24)  # frequencies of time, height, width
    norm_eps: float = 1e-6
    tied: bool = False  # the unembedding is the embedding
    max_positions: int = 128000


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole model; static under jit."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    image_token: int = 151655
    video_token: int = 151656
    vision_start: int = 151652
    vision_end: int = 151653
    eos: tuple[int, ...] = (151645, 151643)
    pad: int = 151643
    remat: str = "none"  # a name of layers.REMAT_POLICIES
    attention: str = "xla"  # xla | tiled | cudnn | splash, from attention.choose_backend
    lora_scale: float = 1.0  # alpha / rank, where adapters are present
    unroll: bool = False  # run the text layers without a loop; see unrolled.py

    @property
    def vision_tokens(self) -> tuple[int, ...]:
        """Tokens that only the processor writes; the sampler never generates them."""
        return (self.image_token, self.video_token, self.vision_start, self.vision_end)


PRESETS: dict[str, ModelConfig] = {
    "3b": ModelConfig(
        text=TextConfig(
            vocab=151936, width=2048, mlp=11008, depth=36, heads=16, kv_heads=2, tied=True
        )
    ),
    "7b": ModelConfig(),
    "32b": ModelConfig(
        vision=VisionConfig(mlp=3456),
        text=TextConfig(vocab=152064, width=5120, mlp=27648, depth=64, heads=40, kv_heads=8),
    ),
    "72b": ModelConfig(
        vision=VisionConfig(mlp=3456),
        text=TextConfig(vocab=152064, width=8192, mlp=29568, depth=80, heads=64, kv_heads=8),
    ),
    "tiny": ModelConfig(  # of the demo: 0.2 M parameters, 384 tokens
        vision=VisionConfig(
            depth=2, width=48, mlp=96, heads=4, patch=8, window=32, full_blocks=(1,)
        ),
        text=TextConfig(
            vocab=384,
            width=64,
            mlp=192,
            depth=2,
            heads=4,
            kv_heads=2,
            head_dim=16,
            rope_theta=1e4,
            rope_sections=(2, 3, 3),
            tied=True,
            max_positions=1024,
        ),
        image_token=5,
        video_token=6,
        vision_start=3,
        vision_end=4,
        eos=(2, 0),
        pad=0,
    ),
}


def _get(source: dict, *names: str, default: Any = dataclasses.MISSING) -> Any:
    """Return the value of the first of `names` that is set."""
    for name in names:
        if source.get(name) is not None:
            return source[name]
    if default is dataclasses.MISSING:
        raise ValueError(
            f"config.json lacks {names[0]!r}; expected that of a Qwen2.5-VL checkpoint"
        )
    return default


def _expect(key: str, value: Any, *supported: Any) -> None:
    """Refuse a value that no Qwen2.5-VL checkpoint has."""
    if value not in supported:
        raise ValueError(
            f"config.json has {key}={value!r}; expected {' or '.join(map(repr, supported))}, "
            "as in a Qwen2.5-VL checkpoint"
        )


def _vision(v: dict, width: int) -> VisionConfig:
    _expect("vision_config.hidden_act", _get(v, "hidden_act", default="silu"), "silu")
    rope = v.get("rope_parameters") or {}
    _expect("vision_config rope_theta", rope.get("rope_theta", 1e4), 1e4)
    _expect("vision_config.out_hidden_size", _get(v, "out_hidden_size", default=width), width)
    return VisionConfig(
        depth=_get(v, "depth"),
        width=_get(v, "hidden_size"),
        mlp=_get(v, "intermediate_size"),
        heads=_get(v, "num_heads"),
        patch=_get(v, "patch_size", "spatial_patch_size", default=14),
        temporal=_get(v, "temporal_patch_size", default=2),
        merge=_get(v, "spatial_merge_size", default=2),
        window=_get(v, "window_size", default=112),
        full_blocks=tuple(_get(v, "fullatt_block_indexes", default=(7, 15, 23, 31))),
        channels=_get(v, "in_channels", "in_chans", default=3),
        tokens_per_second=int(_get(v, "tokens_per_second", default=4)),
    )


def _text(t: dict, tied: bool) -> TextConfig:
    rope = t.get("rope_parameters") or t.get("rope_scaling") or {}
    _expect("rope type", _get(rope, "rope_type", "type", default="mrope"), "mrope", "default")
    _expect("hidden_act", _get(t, "hidden_act", default="silu"), "silu")
    _expect("use_sliding_window", bool(t.get("use_sliding_window", False)), False)
    width = _get(t, "hidden_size")
    heads = _get(t, "num_attention_heads")
    kv_heads = _get(t, "num_key_value_heads", default=heads)
    sections = tuple(_get(rope, "mrope_section"))
    _expect("head_dim", _get(t, "head_dim", default=width // heads), width // heads)
    if width % heads or heads % kv_heads:
        raise ValueError(
            f"config.json has num_attention_heads={heads}, num_key_value_heads={kv_heads}, "
            f"hidden_size={width}; expected heads that divide the width, and key/value heads that "
            "divide the heads"
        )
    if 2 * sum(sections) != width // heads or len(sections) != 3:
        raise ValueError(
            f"config.json has mrope_section={list(sections)}; expected three numbers that sum to "
            f"{width // heads // 2}"
        )
    return TextConfig(
        vocab=_get(t, "vocab_size"),
        width=width,
        mlp=_get(t, "intermediate_size"),
        depth=_get(t, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        rope_theta=float(_get(rope, "rope_theta", default=_get(t, "rope_theta", default=1e6))),
        rope_sections=sections,
        norm_eps=float(_get(t, "rms_norm_eps", default=1e-5)),
        tied=tied,
        max_positions=_get(t, "max_position_embeddings", default=32768),
    )


def _end_tokens(*sources: dict) -> tuple[int, ...]:
    """Return all end tokens that the sources name, in order, each once."""
    tokens: list[int] = []
    for source in sources:
        ids = source.get("eos_token_id")
        tokens += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(tokens))


def config_from_hf(raw: dict, generation: dict | None = None) -> ModelConfig:
    """Return the config of a Hugging Face `config.json` and `generation_config.json`.

    The keys of the text model are at the top level (released checkpoints) or in `text_config`
    (newer ones). A missing key has the default of transformers.
    """
    _expect("model_type", raw.get("model_type"), "qwen2_5_vl")
    text = {**raw, **(raw.get("text_config") or {})}
    # Older versions of transformers write tie_word_embeddings into text_config.
    tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    generation = generation or {}
    stops = _end_tokens(generation, raw, text) or ModelConfig().eos
    return ModelConfig(
        vision=_vision(_get(raw, "vision_config"), _get(text, "hidden_size")),
        text=_text(text, tied),
        image_token=_get(raw, "image_token_id", default=151655),
        video_token=_get(raw, "video_token_id", default=151656),
        vision_start=_get(raw, "vision_start_token_id", default=151652),
        vision_end=_get(raw, "vision_end_token_id", default=151653),
        eos=stops,
        pad=_get(generation, "pad_token_id", default=_get(text, "pad_token_id", default=stops[-1])),
    )


def locate_checkpoint(path: str | Path, weights: bool = False) -> Path:
    """Return the folder of a checkpoint: the path, or the local copy of the hub's `org/name`.

    `weights` downloads the weights too.
    """
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        raise ValueError(
            f"{path} is neither a folder nor a hub id like Qwen/Qwen2.5-VL-3B-Instruct; presets "
            f"are {', '.join(PRESETS)}"
        )
    return _download(str(path), weights)


@functools.cache
def _download(name: str, weights: bool) -> Path:
    """Download a checkpoint; of several processes on a machine, one downloads and the rest wait."""
    patterns = ["*.json", "*.txt", "*.jinja"]
    if weights:
        patterns.append("*.safetensors")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # every error of the hub is one of these
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name} is neither a local folder nor a model that the hub returns ({reason[:160]})"
        ) from error


def read_model_config(folder: str | Path) -> ModelConfig:
    """Return the config of a Hugging Face checkpoint, a folder or a hub id."""
    path = locate_checkpoint(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a Hugging Face checkpoint folder")
    generation = path.with_name("generation_config.json")
    raw = _read_json(path)
    return config_from_hf(raw, _read_json(generation) if generation.is_file() else None)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from None


def config_to_hf(cfg: ModelConfig, dtype: str = "bfloat16") -> dict:
    """Return a `config.json` for transformers and vLLM, flat as in the released checkpoints."""
    t, v = cfg.text, cfg.vision
    rope = {"type": "default", "rope_type": "default", "mrope_section": list(t.rope_sections)}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": dtype,
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
        "rope_theta": t.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": t.tied,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "image_token_id": cfg.image_token,
        "video_token_id": cfg.video_token,
        "vision_start_token_id": cfg.vision_start,
        "vision_end_token_id": cfg.vision_end,
        "eos_token_id": cfg.eos[0],
        "pad_token_id": cfg.pad,
        "bos_token_id": None,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": v.depth,
            "hidden_size": v.width,
            "intermediate_size": v.mlp,
            "num_heads": v.heads,
            "in_channels": v.channels,
            "in_chans": v.channels,
            "out_hidden_size": t.width,
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
