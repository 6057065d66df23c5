"""Read and write the config of a Hugging Face checkpoint, and find its folder."""

import dataclasses
import functools
from pathlib import Path

import huggingface_hub

from cptjax.common import files
from cptjax.models.config import ModelConfig
from cptjax.models.families import FAMILIES, PRESETS, find_family
from cptjax.models.family import check_shape, text_keys


def _end_tokens(*sources: dict) -> tuple[int, ...]:
    """Return all end tokens that the sources name, in order, each once."""
    tokens: list[int] = []
    for source in sources:
        ids = source.get("eos_token_id")
        tokens += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(tokens))


def config_from_hf(raw: dict, generation: dict | None = None) -> ModelConfig:
    """Return the config of a Hugging Face `config.json` and `generation_config.json`.

    A missing key has the default of transformers.
    """
    name = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(
            f"config.json has model_type={raw.get('model_type')!r}; expected one of "
            f"{', '.join(FAMILIES)}"
        )
    cfg, text, generation = family.read_config(raw), text_keys(raw), generation or {}
    stops = _end_tokens(generation, raw, text) or cfg.eos
    # Older configs have -1 where no token is set.
    pads = (generation.get("pad_token_id"), text.get("pad_token_id"), *reversed(stops), cfg.pad)
    pad = next(token for token in pads if token not in (None, -1))
    check_shape(cfg, (*stops, pad))
    return dataclasses.replace(cfg, eos=stops, pad=pad)


def locate_checkpoint(path: str | Path, weights: bool = False) -> Path:
    """Return the folder of a checkpoint: the path, or the local copy of the hub's `org/name`.

    `hf:org/name` is always a hub id. `weights` downloads the weights too.
    """
    if Path(path).is_dir():
        return Path(path)
    hub_id = files.find_hub_id(str(path))
    if hub_id is None:
        raise ValueError(
            f"{path} is neither a folder nor a hub id like Qwen/Qwen2.5-VL-3B-Instruct"
            f"{files.nearest_path(str(path))}; presets are {', '.join(PRESETS)}"
        )
    return _download(hub_id, weights)


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
        if files.is_outage(error):
            raise files.TryAgain(
                f"{name}: the hub does not answer ({reason[:160]}); run the same command again, or "
                "give a local folder"
            ) from error
        raise ValueError(
            f"{name} is neither a local folder nor a model that the hub returns ({reason[:160]})"
        ) from error


def read_model_config(folder: str | Path) -> ModelConfig:
    """Return the config of a Hugging Face checkpoint, a folder or a hub id."""
    path = locate_checkpoint(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a Hugging Face checkpoint folder")
    generation = path.with_name("generation_config.json")
    raw = files.read_json(path, dict)
    given = files.read_json(generation, dict) if generation.is_file() else None
    with files.explain_errors(str(path)):
        return config_from_hf(raw, given)


def config_to_hf(cfg: ModelConfig, dtype: str = "bfloat16") -> dict:
    """Return a `config.json` for transformers and vLLM."""
    family = find_family(cfg)
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        "torch_dtype": dtype,
        **family.write_config(cfg),
        "eos_token_id": cfg.eos[0] if cfg.eos else None,
        "pad_token_id": cfg.pad,
        "bos_token_id": None,
    }
