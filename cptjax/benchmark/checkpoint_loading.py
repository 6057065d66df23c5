"""The load phase: measure seconds and host memory for loading a checkpoint of several files.

load_s_per_gb        seconds per GB of the checkpoint, with a warm file cache
load_peak_ratio      peak growth of the process's memory divided by the size of the checkpoint; on
                     a CPU this includes the parameters
checksum_s_per_gb    seconds per GB for the checksums of the loaded arrays, which a run computes
                     each time it saves or restores a checkpoint
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from cptjax.benchmark.workload import Workload, find_size
from cptjax.common import console
from cptjax.continual import checksums
from cptjax.models import causal_lm, hf_checkpoint, trainable
from cptjax.models.hf_config import read_model_config
from cptjax.types import Params


def process_memory(peak: bool = False) -> int:
    """Return the host memory of this process in bytes: the current value or the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss would include the memory of the parent process before exec.
    name = "VmHWM:" if peak else "VmRSS:"
    return (
        next(
            int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith(name)
        )
        * 1024
    )


def measure_loading(work: Workload) -> dict[str, float]:
    """Write a random checkpoint of several files, and measure how another process loads it."""
    cfg = find_size(work.size)
    size = trainable.count_params(causal_lm.declare_params(cfg)) * 2
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < 1.1 * size:
            raise ValueError(
                f"the checkpoint takes {size / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free; "
                "set TMPDIR to another folder"
            )
        with console.show_waiting(f"load: writing {size / 1e9:.2f} GB"):
            hf_checkpoint.write_random_checkpoint(
                cfg, Path(folder) / "model", shard_bytes=max(size / 5, 1e6)
            )
        with console.show_waiting("load: loading"):
            code = (
                "import sys; from cptjax.benchmark import checkpoint_loading; "
                "checkpoint_loading.report_loading(sys.argv[1])"
            )
            command = [sys.executable, "-c", code, str(Path(folder) / "model")]
            metrics = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            )
    return {
        "load_gb": size / 1e9,
        "load_s_per_gb": metrics["load_s"] / size * 1e9,
        "checksum_s_per_gb": metrics.pop("checksum_s") / size * 1e9,
        "load_peak_ratio": metrics.pop("grown") / size,
        **metrics,
    }


def report_loading(folder: str) -> None:
    """Load the checkpoint in this process, and print the time and the memory as JSON."""
    jax.block_until_ready(jnp.zeros(()))
    before = process_memory()
    start = time.perf_counter()
    params = hf_checkpoint.load_hf_checkpoint(folder, read_model_config(folder))
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    peak = process_memory(peak=True)
    metrics = {"load_s": seconds, "load_peak_gib": peak / 2**30, "grown": peak - before}
    print(json.dumps({**metrics, "checksum_s": time_checksums(params)}))


def time_checksums(params: Params) -> float:
    """Return the seconds for the checksums of all arrays, without compiling the program."""
    checksums.array_checksums(params)
    start = time.perf_counter()
    checksums.array_checksums(params)
    return time.perf_counter() - start
