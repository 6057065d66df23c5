"""The model and what surrounds it on this machine: mesh, processor, sampling. What every stage and every evaluation shares."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cptjax import layout, multihost, sampler, sharding
from cptjax import processor as processors
from cptjax.model import attention, convert, qwen25_vl, trainable
from cptjax.model.config import PRESETS, Config, read
from cptjax.processor import Encoded, Processor, Shape, widest
from cptjax.train import place_prompts
from cptjax.types import Params, Rollouts

UNROLLED = 12  # layers at most that a CPU's programs hold without a loop: faster, but compiled one by one
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A model's shape and surroundings; parameters are passed beside it."""

    cfg: Config
    processor: Processor
    mesh: Mesh
    dtype: Any  # of the arithmetic
    ladder: tuple[int, ...]  # lengths that prompts are padded to

    @property
    def shards(self) -> int:
        """Batch shards of this process."""
        return sharding.batch_shards(self.mesh) // jax.process_count()

    def longer(self, more: int) -> "Runtime":
        """The same for rows that may be `more` tokens longer than prompts."""
        top = max(self.ladder)
        return dataclasses.replace(self, ladder=(*self.ladder, *processors.ladder(top + more, 2 * top))) if more else self

    def prompts(self, encoded: Sequence[Encoded]):
        """Left-padded prompts on the mesh; the row count is this process's part of the batch."""
        prompts, _ = processors.collate(list(encoded), buckets=self.ladder, side="left", shards=self.shards, agree=together)
        return place_prompts(prompts, self.mesh)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    group: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 64
    slots: int = 0
    check_every: int = 16
    gather: bool = False  # weights copied over fsdp while decoding
    dtype: str = ""  # of the arithmetic while decoding; "" = the runtime's, int8 = the runtime's with eight-bit weights


@dataclasses.dataclass(frozen=True)
class Samples:
    """Answers on the host, this process's rows; row q * G + g answers prompt q."""

    texts: list[str]
    tokens: np.ndarray  # [B R]
    mask: np.ndarray  # [B R]
    logps: np.ndarray  # [B R]
    policy_logps: np.ndarray  # [B R]
    finished: np.ndarray  # [B]


def load(settings: Any, mesh_settings: Any, seed: int, ladder: Sequence[int]) -> tuple[Runtime, Params]:
    """The model that `config.model` names, on the mesh that `config.mesh` describes; adapters are added where asked for."""
    for name in ("param_dtype", "compute_dtype"):
        if settings[name] not in DTYPES:
            raise ValueError(f"model.{name}={settings[name]!r}; expected one of {', '.join(DTYPES)}")
    mesh = sharding.make_mesh(**mesh_settings)
    check_shards(sharding.batch_shards(mesh), jax.process_count())
    cfg = read(settings.path) if settings.path else preset(settings.preset)
    cfg = fitted(cfg, settings, mesh)
    processor = processors.load(settings.path or None, cfg, settings.min_pixels, settings.max_pixels)
    runtime = Runtime(cfg, processor, mesh, DTYPES[settings.compute_dtype], tuple(ladder))
    return runtime, create(settings, runtime, seed)


def together(shape: Shape) -> Shape:
    """The shape that holds every process's part of a batch."""
    return widest(multihost.gather(shape))


def check_shards(shards: int, processes: int) -> None:
    """Refuse a mesh on which two processes would each feed the same rows."""
    if shards % processes:
        raise ValueError(
            f"config.mesh cuts a batch into {shards} shards (data x fsdp) for {processes} processes: expected a multiple, so that "
            "each feeds rows of its own; lower mesh.model until it stays within a process"
        )


def fitted(cfg: Config, settings: Any, mesh: Mesh) -> Config:
    """The model's shape with what `config.model` and the mesh decide."""
    kernel = attention.choose(mesh, cfg, DTYPES[settings.compute_dtype], settings.attention)
    scale = settings.lora.alpha / max(settings.lora.rank, 1)
    unroll = mesh.devices.flat[0].platform == "cpu" and cfg.text.depth <= UNROLLED
    return dataclasses.replace(cfg, remat=settings.remat, attention=kernel, lora_scale=scale, unroll=unroll)


def preset(name: str) -> Config:
    if name not in PRESETS:
        raise ValueError(f"model.preset={name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def declare(settings: Any, cfg: Config) -> Params:
    """The tree of Param of `config.model`, adapters included."""
    tree = qwen25_vl.params(cfg)
    lora = settings.lora
    return trainable.add_lora(tree, lora.rank, lora.targets, lora.vision) if lora.rank else tree


def create(settings: Any, runtime: Runtime, seed: int) -> Params:
    """Parameters on the mesh: trained leaves in param_dtype, frozen leaves in compute_dtype."""
    cfg, mesh = runtime.cfg, runtime.mesh
    rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    declared = declare(settings, cfg)
    if not settings.path:
        params = sharding.init(declared, jax.random.key(seed), jnp.float32, mesh, rules)
    else:
        params = convert.load(settings.path, cfg, mesh, None, rules)
        extra = {k: v for k, v in trainable.flatten(declared).items() if k[-1] in trainable.ADAPTER}
        if extra:
            adapters = sharding.init(trainable.unflatten(extra), jax.random.key(seed), jnp.float32, mesh, rules)
            params = trainable.join(adapters, params)
    chosen = trainable.chosen(settings.freeze, settings.lora.rank)
    trained, frozen = trainable.split(params, chosen)
    return trainable.join(_astype(trained, DTYPES[settings.param_dtype]), _astype(frozen, runtime.dtype))


def _astype(tree: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), tree)


def prepared(runtime: Runtime, params: Params, sampling: Sampling) -> tuple[Params, Sampling]:
    """Weights as this sampling wants them, and the sampling that takes them as they are: once for several batches."""
    int8, dtype = sampling.dtype == "int8", arithmetic(sampling.dtype, runtime.dtype)
    if sampling.gather or int8:
        with jax.set_mesh(runtime.mesh):
            params = layout.prepare(params, runtime.cfg, dtype=dtype, gather=sampling.gather, int8=int8)
    return params, dataclasses.replace(sampling, gather=False, dtype="" if int8 else sampling.dtype)


def arithmetic(name: str, own: Any) -> Any:
    """The type in which answers are drawn where `rollout.dtype` says `name`."""
    return own if name in ("", "int8") else DTYPES[name]


def sample(
    runtime: Runtime, params: Params, encoded: Sequence[Encoded], key: jax.Array, rows: np.ndarray, sampling: Sampling, **more: Any
) -> Samples:
    """Answers to encoded prompts; `rows` are the prompts' numbers in the whole run, on which their randomness depends."""
    with jax.set_mesh(runtime.mesh):
        params, sampling = prepared(runtime, params, sampling)
        out = sampler.sample(
            params, runtime.prompts(encoded), key, runtime.cfg, rows=rows, group=sampling.group, max_new=sampling.max_new_tokens,
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p,
            slots=sampling.slots, check_every=sampling.check_every, dtype=arithmetic(sampling.dtype, runtime.dtype), **more,
        )  # fmt: skip
    return read_samples(runtime, out)


def read_samples(runtime: Runtime, out: Rollouts) -> Samples:
    local = {f.name: sharding.local_rows(getattr(out, f.name)) for f in dataclasses.fields(out)}
    return Samples(texts(runtime, local["tokens"], local["mask"]), **local)


def texts(runtime: Runtime, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Decoded answers without their stop token."""
    stops = set(runtime.cfg.eos)
    ids = [[int(t) for t in row[keep] if int(t) not in stops] for row, keep in zip(tokens, mask.astype(bool), strict=True)]
    return runtime.processor.decode(ids)


def pixels(runtime: Runtime) -> str:
    return f"{runtime.processor.min_pixels}-{runtime.processor.max_pixels}"


def source(settings: Any) -> str:
    return settings.path and str(Path(settings.path)) or f"random {settings.preset}"
