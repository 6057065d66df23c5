"""Eight CPU devices, full float32, compiled programs kept between runs; all before jax starts."""

import gc
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu compiles for slices that this machine does not have
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = (
    "1"  # compiling holds no chip, so two test runs need not exclude each other
)
os.environ["TPU_STDERR_LOG_LEVEL"] = os.environ["TPU_MIN_LOG_LEVEL"] = os.environ[
    "TF_CPP_MIN_LOG_LEVEL"
] = "3"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
# Most of the suite is compiling programs that run for milliseconds; only machine code is made with less care, fusion stays.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import pytest

from cptjax.common import console

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no process is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def nothing_outlives_its_file():
    """A compiled CPU program holds memory maps; a whole suite of them meets the kernel's limit (65,530) and LLVM crashes.

    How the console speaks is set back too.
    """
    yield
    console.set_console_mode("auto")
    for module in [m for name, m in sys.modules.items() if name.startswith("cptjax")]:
        for kept in [f for f in vars(module).values() if hasattr(f, "cache_clear")]:
            kept.cache_clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def no_broadcast():
    """Arrays of different rank do not meet by accident: for losses, advantages and other small arithmetic."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def no_cache():
    """Programs for hardware that is not here can be written to jax's cache but not read back."""
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax looks at the switch once
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
