"""Time each phase of a run on this machine, with random weights; --peer=hf times torch in turns.

One JSON line on standard output.

python launch/bench.py --size=cpu-s [--phases=rollout,logp,sft,grpo] [--peer=hf]
python launch/bench.py --size=3b --dtype=bfloat16 --micro=16
python launch/bench.py --size=3b --phases=load

cptjax/benchmark/phase_times.py describes the phases and the numbers.
"""

import dataclasses
import json
import os

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
    "repeat", 3, "Timed runs of each phase; the median counts.", lower_bound=1
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


def main() -> None:
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
        repeat=REPEAT.value,
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
    # The peer needs a part of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cli.run_launcher(main)
