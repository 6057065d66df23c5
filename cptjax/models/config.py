"""Model configs: the shape of a model of any family, and how it is computed."""

import dataclasses
from typing import Any, ClassVar

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's change of the rotary frequencies, for rows longer than it was pretrained on."""

    factor: float = 8.0  # by which frequencies of long wavelengths are divided
    low: float = 1.0  # wavelengths above old_positions / low are long
    high: float = 4.0  # wavelengths below old_positions / high keep their frequency
    old_positions: int = 8192  # tokens of a row in pretraining


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding of the decoder."""

    theta: float = 1e6
    # M-RoPE: the number of frequencies of time, height and width; None = all of one position id.
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False  # the frequencies of time, height and width alternate
    scaling: Llama3Scaling | None = None


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Shape of the language model."""

    vocab: int
    width: int
    mlp: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6
    tied: bool = False  # the unembedding is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False  # RMS norms of the queries and keys of each head
    max_positions: int = 32768


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What all vision towers have; each tower adds its own fields."""

    depth: int = 32
    width: int = 1280
    mlp: int = 3420
    heads: int = 16
    patch: int = 14  # pixels
    temporal: int = 2  # frames of one patch
    merge: int = 2  # patches merged to one token, per side
    channels: int = 3
    # The tower takes (byte * pixel_scale - pixel_mean) / pixel_std of each channel.
    pixel_scale: float = 1 / 255
    pixel_mean: tuple[float, ...] = CLIP_MEAN
    pixel_std: tuple[float, ...] = CLIP_STD

    position_values: ClassVar[int] = 2  # of a patch in FrameLayout.positions

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_dim(self) -> int:
        return self.channels * self.temporal * self.patch**2

    @property
    def window_slots(self) -> int:
        """Number of patches of a window; a frame takes whole windows."""
        return self.merge**2

    @property
    def added_layers(self) -> int:
        """Layers of the decoder after which features of the tower are added."""
        return 0

    @property
    def block_values(self) -> int:
        """Values of a patch inside a block, without its input, that the backward pass needs."""
        return 6 * self.width + 2 * self.mlp


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed; its shape and outputs do not depend on it."""

    remat: str = "none"  # a name of layers.REMAT_POLICIES
    # xla | tiled | cudnn | cudnn_padded | splash, from attention.choose_backend
    attention: str = "xla"
    unroll: bool = False  # run the text layers without a loop; see unrolled.py
    unroll_sampling: bool = False  # the same only while sampling

    @property
    def samples_unrolled(self) -> bool:
        return self.unroll or self.unroll_sampling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole model; static under jit."""

    family: str  # a name of families.FAMILIES
    text: TextConfig
    vision: VisionConfig | None = None
    image_token: int | None = None  # this and the next three: None without a vision tower
    video_token: int | None = None
    vision_start: int | None = None
    vision_end: int | None = None
    eos: tuple[int, ...] = ()
    pad: int = 0
    lora_scale: float = 1.0  # alpha / rank, where adapters are present
    compute: ComputeConfig = ComputeConfig()

    @property
    def vision_tokens(self) -> tuple[int, ...]:
        """Tokens that only the processor writes; the sampler never generates them."""
        if self.vision is None:
            return ()
        return (self.image_token, self.video_token, self.vision_start, self.vision_end)

    def with_compute(self, **changes: Any) -> "ModelConfig":
        """Return the config with other settings of ComputeConfig."""
        return dataclasses.replace(self, compute=dataclasses.replace(self.compute, **changes))
