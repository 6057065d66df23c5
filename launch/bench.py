"""Time each phase of a run on this machine, with random weights; --peer=hf times torch in turns.

--suite times steps of GRPO through the trainer, with images on the disk, rewards and responses of
random lengths, and what each part of the step gains. --check compares what this platform computes
with float32. One JSON line on standard output.

python launch/bench.py --size=cpu-s [--phases=rollout,logp,sft,grpo] [--peer=hf]
python launch/bench.py --size=3b --dtype=bfloat16 --micro=16
python launch/bench.py --size=3b --phases=load
python launch/bench.py --suite --size=3b [--rows=base,layers] [--repeat=5] [--minutes=6]
python launch/bench.py --check

cptjax/benchmark/phase_times.py describes the phases and the numbers, suite.py the rows of --suite.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

from absl import flags

from cptjax.common import cli

SIZE = flags.DEFINE_string("size", "cpu-s", "cpu-s, cpu-m, or a preset such as 3b or qwen2.5-7b.")
PHASES = flags.DEFINE_list(
    "phases", ["rollout", "logp", "sft", "grpo"], "Some of load, data, rollout, logp, sft, grpo."
)
PEER = flags.DEFINE_enum(
    "peer", None, ["hf"], "Time transformers + torch in turns with our phases (needs torch)."
)
IMAGE = flags.DEFINE_integer(
    "image",
    112,
    "Pixels of a side of an image, a multiple of two patches (28); 0 = no images.",
    lower_bound=0,
)
PROMPTS = flags.DEFINE_integer("prompts", 8, "Prompts, each with an image.", lower_bound=1)
GROUP = flags.DEFINE_integer("group", 8, "Responses to each prompt.", lower_bound=1)
TEXT = flags.DEFINE_integer("text", 32, "Text tokens of a prompt.", lower_bound=4)
NEW = flags.DEFINE_integer("new", 64, "Tokens of a response.", lower_bound=1)
REPEAT = flags.DEFINE_integer(
    "repeat",
    None,
    "Timed runs of each phase, 3 by default, or steps of --suite, 5 by default; the median counts.",
    lower_bound=1,
)
MICRO = flags.DEFINE_integer(
    "micro", 0, "Rows of one device pass in logp and sft; 0 = all.", lower_bound=0
)
CHUNK = flags.DEFINE_integer(
    "chunk", 4096, "Tokens whose logits are in memory at once (train.chunk).", lower_bound=1
)
DTYPE = flags.DEFINE_string(
    "dtype",
    "float32",
    "float32 or bfloat16, of weights and arithmetic; the optimizer's moments are float32.",
)
REMAT = flags.DEFINE_string(
    "remat",
    "none",
    "What layers keep for gradients: none (all, as the peer), dots, block or offload.",
)
SUITE = flags.DEFINE_bool(
    "suite", False, "Time steps of GRPO through the trainer; --size is cpu-s, 3b or 7b."
)
ROWS = flags.DEFINE_list(
    "rows",
    None,
    "Rows of --suite, all by default: base, padded (GPUs only), layers, prefix, ahead, top_p=1, "
    "slots, slot_rows, xla.",
)
CHECK = flags.DEFINE_bool(
    "check",
    False,
    "Compare attention, packed groups and sampling with float32; of the flags only --size counts.",
)
MINUTES = flags.DEFINE_float(
    "minutes", 0.0, "After these minutes --suite starts no further row; 0 = it does.", lower_bound=0
)
OF_SUITE = ("rows", "minutes", "repeat")
OF_PHASES = (
    *("phases", "peer", "image", "prompts", "group", "text", "new"),
    *("micro", "chunk", "dtype", "remat"),
)


def refuse_unused_flags() -> None:
    """Refuse flags that the chosen kind of benchmark does not read."""
    kind, refused = "the phases", (*OF_SUITE[:2],)
    if SUITE.value:
        kind, refused = "--suite", (*OF_PHASES, "check")
    elif CHECK.value:
        kind, refused = "--check", (*OF_PHASES, *OF_SUITE)
    for name in refused:
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name}: not a flag of {kind}; remove it")


def main() -> None:
    refuse_unused_flags()
    from cptjax.common import chips

    chips.reserve_gpu_memory()
    if SUITE.value:
        run_suite()
    elif CHECK.value:
        run_checks()
    else:
        run_phases()


def run_checks() -> None:
    """Print a line for each check, and the JSON line of all; fail if one does."""
    from cptjax.benchmark import device_checks
    from cptjax.common import console

    checks = device_checks.run_checks(SIZE.value)
    for check in checks:
        word = "ok  " if check.passed else "FAIL"
        console.print_message(f"{word} {check.name}: {check.error:.2g}, limit {check.limit:g}")
    print(json.dumps([dataclasses.asdict(check) | {"passed": check.passed} for check in checks]))
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise ValueError(f"wrong on this platform: {', '.join(failed)}")


def run_suite() -> None:
    """Time steps of GRPO, and print the table and its JSON line."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # configs/ is not a part of the package
    from configs.base import get_config
    from cptjax.benchmark import suite

    rows = suite.platform_rows() if ROWS.value is None else ROWS.value
    found = suite.run_suite(get_config(), SIZE.value, rows, REPEAT.value or 5, MINUTES.value)
    suite.print_rows(found)
    print(json.dumps(found))


def run_phases() -> None:
    """Time the phases, and print a line for each and the JSON line of all."""
    # The peer needs a part of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from cptjax.benchmark import phase_times, workload
    from cptjax.common import console

    work = workload.Workload(
        size=SIZE.value,
        image=IMAGE.value,
        prompts=PROMPTS.value,
        group=GROUP.value,
        text=TEXT.value,
        new=NEW.value,
        repeat=REPEAT.value or 3,
        micro=MICRO.value,
        chunk=CHUNK.value,
        dtype=DTYPE.value,
        remat=REMAT.value,
    )
    metrics = phase_times.run_benchmark(work, PHASES.value, PEER.value)
    if jax.default_backend() == "cpu" and "glibc.malloc" not in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        console.print_warning(
            "on a CPU, `source launch/cpu_memory.sh` first; "
            "without it, large steps are slow, also those of the peer"
        )
    for phase in PHASES.value:
        console.print_message(phase_times.phase_line(phase, metrics))
    numbers = dataclasses.asdict(work) | metrics
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}
    print(json.dumps(rounded))


if __name__ == "__main__":
    cli.run_launcher(main)
