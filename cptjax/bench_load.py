"""The load phase: how fast a checkpoint in several files is read, and in how much host memory.

load_s_per_gb      seconds for each GB of the checkpoint, file cache warm
load_peak_ratio    by how much the process grew at its largest, over the checkpoint's size; on a CPU the parameters are a part of it
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

from cptjax import console
from cptjax.bench_work import SIZES, Work
from cptjax.model import convert, qwen25_vl, trainable
from cptjax.model.config import read


def resident(peak: bool = False) -> int:
    """Bytes of host memory that this process holds, or held at most."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name = "VmHWM:" if peak else "VmRSS:"  # ru_maxrss would count the parent's memory from before exec
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) * 1024


def measure(work: Work) -> dict[str, float]:
    """Writes a random checkpoint in several files and has a process of its own load it."""
    cfg = SIZES[work.size]
    size = trainable.count(qwen25_vl.params(cfg)) * 2
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < 1.1 * size:
            raise ValueError(f"the checkpoint takes {size / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free; point TMPDIR elsewhere")
        with console.waiting(f"load: writing {size / 1e9:.2f} GB"):
            convert.random_checkpoint(cfg, Path(folder) / "model", shard_bytes=max(size / 5, 1e6))
        with console.waiting("load: loading"):
            command = [sys.executable, "-c", f"from cptjax import bench_load; bench_load.loading({str(Path(folder) / 'model')!r})"]
            told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {"load_gb": size / 1e9, "load_s_per_gb": told["load_s"] / size * 1e9, "load_peak_ratio": told.pop("grown") / size, **told}


def loading(folder: str) -> None:
    """What the process of its own does: its time and memory, as JSON."""
    jax.block_until_ready(jnp.zeros(()))
    before = resident()
    start = time.perf_counter()
    jax.block_until_ready(convert.load(folder, read(folder)))
    seconds = time.perf_counter() - start
    peak = resident(peak=True)
    print(json.dumps({"load_s": seconds, "load_peak_gib": peak / 2**30, "grown": peak - before}))
