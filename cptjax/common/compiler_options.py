"""The compiler's options for each platform, and the jit that compiles programs with them."""

import functools
from collections.abc import Callable
from typing import Any

import jax

Options = dict[str, bool | int | str]

# By `jax.Device.platform`. The options decide how a program is scheduled
# and how devices share its work, not what it computes. The compiler refuses unknown names.
COMPILER_OPTIONS: dict[str, Options] = {
    "cpu": {},
    "tpu": {
        # Gather a weight, then multiply. By default the compiler cuts a product with a large weight
        # of `fsdp` into one product for each device, and each of these adds its bfloat16 sum to the
        # whole output in memory. The threshold, in MiB, is above every weight.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    },
    "gpu": {
        # Transfer weights and gradients beside the products of other layers.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # The default with WHILE: the decode loop then runs without asking the host at each step.
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
        ),
    },
}


def compiler_options(platform: str) -> Options:
    """Return the options of a platform; one that the table does not name has none."""
    return COMPILER_OPTIONS.get(platform, {})


class PlatformJit:
    """`jax.jit` with the compiler's options for the devices that the program runs on.

    These are the devices of the mesh that is set when the function is called or lowered, or JAX's
    default devices without a mesh. Modules create programs before any mesh is known, so each
    platform gets a jitted function of its own. JAX allows options for the outermost function only,
    so another jitted function cannot call this one.
    """

    def __init__(self, function: Callable, **settings: Any) -> None:
        functools.update_wrapper(self, function)

        @functools.cache
        def for_platform(platform: str) -> Any:
            return jax.jit(function, compiler_options=compiler_options(platform), **settings)

        self.for_platform = for_platform

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.for_platform(current_platform())(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the jitted function, such as `lower` or `eval_shape`."""
        return getattr(self.for_platform(current_platform()), name)


def current_platform() -> str:
    """Return the platform of the mesh that is set, or of JAX's default devices."""
    mesh = jax.sharding.get_mesh()
    return (jax.devices()[0] if mesh.empty else mesh.devices.flat[0]).platform
