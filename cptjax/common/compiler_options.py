"""The compiler's options for each kind of device, and the jit that compiles programs with them."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from cptjax.common import chips

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
        # By default at least five instructions make a command buffer. Between two checks whether
        # all responses have ended there are three: the loop over the steps and two others.
        "xla_gpu_graph_min_graph_size": 2,
    },
}


# Further options, by chip. The sparse cores of these TPUs gather weights and sum gradients while
# the other cores multiply, which otherwise wait for it.
_SPARSE_CORE_OPTIONS: Options = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": False,
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": False,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
}
CHIP_OPTIONS: dict[str, Options] = {"v5p": _SPARSE_CORE_OPTIONS, "v6e": _SPARSE_CORE_OPTIONS}


def compiler_options(platform: str, device_kind: str) -> Options:
    """Return the options of a kind of device; one that the tables do not name has none."""
    chip = chips.find_chip(device_kind)
    return COMPILER_OPTIONS.get(platform, {}) | CHIP_OPTIONS.get(chip.name if chip else "", {})


class PlatformJit:
    """`jax.jit` with the compiler's options for the devices that the program runs on.

    These are the devices of the mesh that is set when the function is called or lowered, or JAX's
    default devices without a mesh. Modules create programs before any mesh is known, so each kind
    of device gets a jitted function of its own. JAX allows options for the outermost function only,
    so another jitted function cannot call this one.
    """

    def __init__(self, function: Callable, **settings: Any) -> None:
        functools.update_wrapper(self, function)

        @functools.cache
        def for_device(platform: str, device_kind: str) -> Any:
            options = compiler_options(platform, device_kind)
            return jax.jit(function, compiler_options=options, **settings)

        self.for_device = for_device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.for_device(*current_device())(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the jitted function, such as `lower` or `eval_shape`."""
        return getattr(self.for_device(*current_device()), name)


def current_device() -> tuple[str, str]:
    """Return the platform and kind of the devices of the mesh that is set, or of JAX's default."""
    mesh = jax.sharding.get_mesh()
    device = jax.devices()[0] if mesh.empty else mesh.devices.flat[0]
    return device.platform, device.device_kind
