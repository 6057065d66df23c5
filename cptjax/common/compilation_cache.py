"""Compiled programs on the disk, so that a command does not compile those of an earlier one."""

import hashlib
import platform
from pathlib import Path

import jax

from cptjax.common import console, files

MAX_BYTES = 10 * 2**30  # of the folder; JAX removes the programs that were not used for longest
MIN_SECONDS = 0.1  # programs that compile faster are not kept


def keep_compiled_programs(folder: str) -> None:
    """Let JAX keep compiled programs in `folder`; "" = the user's cache, "off" = nowhere.

    JAX tells programs apart by its version, the devices and the options of the compiler. Where the
    user has chosen a folder for JAX, as with JAX_COMPILATION_CACHE_DIR, that setting is kept.
    """
    if folder == "off" or jax.config.jax_compilation_cache_dir is not None:
        return
    path = Path(folder) if folder else default_folder()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        console.print_message(f"compiled programs are not kept: {path}: {error.strerror}")
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def default_folder() -> Path:
    """Return a folder in the user's cache, a different one for each kind of CPU.

    A program for a CPU uses the instructions of that CPU, and hosts of a cluster may have different
    CPUs and one home folder.
    """
    return files.cache_folder() / "programs" / hashlib.sha256(_cpu().encode()).hexdigest()[:12]


def _cpu() -> str:
    """Describe the instructions that this host's CPU has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.platform() + platform.processor()
    known = [x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(dict.fromkeys(known))
