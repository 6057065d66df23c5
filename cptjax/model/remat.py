"""What a layer keeps for its backward pass, by name."""

from collections.abc import Callable

import jax

_policies = jax.checkpoint_policies
REMAT: dict[str, Callable | None] = {
    "none": None,  # keep everything: fastest, largest
    "dots": _policies.dots_with_no_batch_dims_saveable,  # keep products with weights; recompute attention and elementwise
    "block": _policies.nothing_saveable,  # keep each layer's input only: slowest, smallest
    "offload": _policies.offload_dot_with_no_batch_dims("device", "pinned_host"),  # "dots", kept in host memory
}


def check(name: str) -> None:
    if name not in REMAT:
        raise ValueError(f"model.remat={name!r}; expected one of {', '.join(REMAT)}")


def checkpoint(step: Callable, name: str) -> Callable:
    """The scan body with the named policy."""
    check(name)
    return step if name == "none" else jax.checkpoint(step, policy=REMAT[name], prevent_cse=False)
