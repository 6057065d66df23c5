"""The table of model families."""

from cptjax.models.config import ModelConfig
from cptjax.models.families import llama, mistral, qwen2, qwen2_5_vl, qwen3, qwen3_vl
from cptjax.models.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        qwen2_5_vl.FAMILY,
        qwen3_vl.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        llama.FAMILY,
        mistral.FAMILY,
    )
}
PRESETS: dict[str, ModelConfig] = {
    name: cfg for family in FAMILIES.values() for name, cfg in family.presets.items()
}
# Name of a checkpoint on the hub, without its owner -> its config.
RELEASED: dict[str, ModelConfig] = {
    name: PRESETS[preset]
    for family in FAMILIES.values()
    for name, preset in family.released.items()
}


def find_family(cfg: ModelConfig) -> Family:
    return FAMILIES[cfg.family]
