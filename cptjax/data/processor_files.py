"""Read, copy and write a checkpoint's processor files: tokenizer, chat template, pixel limits."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from cptjax.common import files
from cptjax.common.images import ImageSettings
from cptjax.models.config import ModelConfig, VisionConfig
from cptjax.models.families import find_family

PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def refuse_special_files(folder: Path) -> None:
    """Refuse a folder or a pipe under the name of a file, which other code would wait for."""
    for name in PROCESSOR_FILES:
        if (folder / name).exists() and not (folder / name).is_file():
            raise ValueError(f"{folder / name}: expected a file; copy it from the checkpoint")


def _read_json_file(path: Path) -> dict[str, Any]:
    return files.read_json(path, dict) if path.is_file() else {}


def write_processor_files(
    folder: Path, pixels: ImageSettings | None, template: str, cfg: ModelConfig
) -> None:
    """Write the chat template and the pixel limits over copied files."""
    if not (folder / "chat_template.json").is_file():
        (folder / "chat_template.jinja").write_text(template)
    if pixels is None:
        return
    limits = {"min_pixels": pixels.min_pixels, "max_pixels": pixels.max_pixels}
    limits["size"] = {"shortest_edge": pixels.min_pixels, "longest_edge": pixels.max_pixels}
    old = _read_json_file(folder / "preprocessor_config.json")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(_hf_image_settings(pixels, cfg) | old | limits, indent=2)
    )
    video = find_family(cfg).tower.video_processor
    if video is not None and not (folder / "video_preprocessor_config.json").is_file():
        shared = {k: v for k, v in _hf_image_settings(pixels, cfg).items() if k not in limits}
        shared.pop("image_processor_type")
        (folder / "video_preprocessor_config.json").write_text(
            json.dumps(shared | dict(video), indent=2)
        )
    newer = folder / "processor_config.json"
    if newer.is_file():
        old = _read_json_file(newer)
        newer.write_text(
            json.dumps(old | {"image_processor": old.get("image_processor", {}) | limits}, indent=2)
        )


def _hf_image_settings(pixels: ImageSettings, cfg: ModelConfig) -> dict[str, Any]:
    return dict(find_family(cfg).tower.processor) | {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": cfg.vision.pixel_scale,
        "resample": pixels.resample,
        "image_mean": list(cfg.vision.pixel_mean),
        "image_std": list(cfg.vision.pixel_std),
        "patch_size": pixels.patch,
        "temporal_patch_size": pixels.temporal,
        "merge_size": pixels.merge,
    }


def copy_processor_files(source: str | Path, folder: str | Path) -> None:
    """Copy those of the tokenizer, template and processor files that a checkpoint has."""
    for name in PROCESSOR_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(folder) / name)


def read_image_settings(
    folder: Path | None, cfg: ModelConfig, min_pixels: int | None, max_pixels: int | None
) -> ImageSettings:
    """Return the image settings of a checkpoint; given pixel limits replace its own."""
    with files.explain_errors(f"{folder}: preprocessor_config.json or processor_config.json"):
        return _read_image_settings(folder, cfg, min_pixels, max_pixels)


def _read_image_settings(
    folder: Path | None, cfg: ModelConfig, min_pixels: int | None, max_pixels: int | None
) -> ImageSettings:
    v, tower = cfg.vision, find_family(cfg).tower
    defaults = tower.processor
    sizes = {"patch_size": v.patch, "temporal_patch_size": v.temporal, "merge_size": v.merge}
    raw, video = (_read_keys(folder, kind) for kind in ("image", "video"))
    for name, expected in sizes.items():
        if raw.get(name, expected) != expected:
            raise ValueError(
                f"preprocessor_config.json has {name}={raw[name]}; expected {expected} as in "
                "config.json"
            )
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if raw.get(name) is False:
            raise ValueError(f"preprocessor_config.json has {name}=false; expected true")
    size = raw.get("size") or {}
    least = (v.patch * v.merge) ** 2
    low = (
        min_pixels
        or raw.get("min_pixels")
        or size.get("shortest_edge")
        or max(defaults["min_pixels"], least)
    )
    high = (
        max_pixels
        or raw.get("max_pixels")
        or size.get("longest_edge")
        or max(defaults["max_pixels"], low)
    )
    return ImageSettings(
        min_pixels=low,
        max_pixels=high,
        video_pixels=_video_limits(video, tower.video_processor),
        patch=v.patch,
        temporal=v.temporal,
        merge=v.merge,
        resample=raw.get("resample", ImageSettings.resample),
    )


def read_pixel_values(folder: Path | None, v: VisionConfig) -> VisionConfig:
    """Return the tower with the scale, means and deviations that a checkpoint was trained with."""
    raw = _read_keys(folder, "image")
    mean = tuple(raw.get("image_mean") or v.pixel_mean)
    std = tuple(raw.get("image_std") or v.pixel_std)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != v.channels:
            raise ValueError(
                f"preprocessor_config.json has image_{name}={list(values)}; expected a number for "
                f"each of {v.channels} channels"
            )
    scale = raw.get("rescale_factor", v.pixel_scale)
    return dataclasses.replace(v, pixel_scale=scale, pixel_mean=mean, pixel_std=std)


def _read_keys(folder: Path | None, kind: str) -> dict[str, Any]:
    """Return the settings of the processor of images or videos; {} if a folder has none."""
    if folder is None:
        return {}
    prefix = {"image": "", "video": "video_"}[kind]
    return _read_json_file(folder / f"{prefix}preprocessor_config.json") or _read_json_file(
        folder / "processor_config.json"
    ).get(f"{kind}_processor", {})


def _video_limits(stored: dict[str, Any], defaults: dict | None) -> tuple[int, int] | None:
    """Return the least and most pixels of all frames of a video; None = no common limit."""
    if defaults is None:
        return None
    size = defaults["size"] | stored.get("size", {})
    return size["shortest_edge"], size["longest_edge"]


def read_chat_template(folder: Path, tokenizer_template: str | None) -> str:
    """Return the processor's chat template, or the tokenizer's if there is none.

    The processor's has priority: in released checkpoints the tokenizer's does not know images.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        template = path.read_text()
    else:
        stored = _read_json_file(folder / "chat_template.json")
        template = stored.get("chat_template") or tokenizer_template
    if not isinstance(template, str):
        raise ValueError(
            f"{folder} has no chat template; expected chat_template.jinja, chat_template.json or "
            "one in tokenizer_config.json"
        )
    return template
