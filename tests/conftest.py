"""Settings of the tests before jax starts: eight CPU devices, float32, a compilation cache."""

import gc
import importlib.metadata
import os
import sys
from pathlib import Path

# Many tests start processes. Without bytecode, each compiles all modules of cptjax again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu compiles for slices without any TPU
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = (
    "1"  # compiling holds no chip, so two test runs need not exclude each other
)
os.environ["TPU_STDERR_LOG_LEVEL"] = os.environ["TPU_MIN_LOG_LEVEL"] = os.environ[
    "TF_CPP_MIN_LOG_LEVEL"
] = "3"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two test processes use both cores. Threads of torch and numpy would spend half of the time of the
# tests of parity waiting for each other.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
# Most of the time is compilation of programs that run for milliseconds. Level 0 generates machine code
# faster, and the older emitters of fused operations, which jaxlib has until 0.10, take a third of
# the time of the newer ones. Two test processes use both cores, so a program is not split for
# threads.
os.environ["CPTJAX_TEST_XLA_FLAGS"] = (  # also of processes that tests start
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
)
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 "
    + os.environ["CPTJAX_TEST_XLA_FLAGS"]
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(  # also of processes that tests start
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache")
)

import jax
import pytest

from cptjax.common import console

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # the backend has read the flags
# libtpu, which is loaded later, does not know the flag of the emitters.
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(os.environ["CPTJAX_TEST_XLA_FLAGS"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


MANY_MAPS = 8_000  # with about 2 GB of memory


def pytest_collection_modifyitems(items):
    """Run files with slow tests first, so that no process has a long one left at the end."""
    gc.set_threshold(50_000, 10, 10)  # as in run_helpers.collect_rarely
    gc.freeze()
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def release_compiled_programs():
    """Free compiled programs after a file if they are many, and reset the console mode.

    A compiled CPU program holds memory maps. Those of a whole suite exceed the kernel's limit
    (65,530), and LLVM crashes.
    """
    yield
    console.set_console_mode("auto")
    if len(Path("/proc/self/maps").read_text().splitlines()) < MANY_MAPS:
        return
    for module in [m for name, m in sys.modules.items() if name.startswith("cptjax")]:
        for kept in [f for f in vars(module).values() if hasattr(f, "cache_clear")]:
            kept.cache_clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def no_broadcast():
    """Refuse implicit broadcasting between ranks; for losses, advantages and other arithmetic."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def no_cache():
    """Switch off jax's cache: it can write programs for absent hardware but not read them back."""
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax reads the switch once
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def quick_tpu_compiler(no_cache):
    """Let libtpu compile in a fraction of its time, for tests that do not look at schedules."""
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", "UNKNOWN")
