"""Continual post-training of vision-language and language models in JAX."""

import os
from typing import Any

# transformers warns that PyTorch is missing; cptjax uses its tokenizers and templates only.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# The module of each public name, imported on first use: host-only modules load without jax.
_PUBLIC = {
    **dict.fromkeys(("Model", "generate", "load", "logits", "save", "score"), "cptjax.api"),
    "run": "cptjax.continual.driver",
    "ContinualMethod": "cptjax.training.algorithms.continual_learning.hooks",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cptjax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
