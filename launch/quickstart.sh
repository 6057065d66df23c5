#!/usr/bin/env bash
# Create a virtual environment on a new machine, install cptjax, run the demo and print the path of
# its report.
#   bash launch/quickstart.sh [DIR]        DIR: the workdir, runs/demo by default
set -euo pipefail
source "$(dirname "$0")/env.sh" ""  # without an argument it would see those of this script
out=${1:-runs/demo}
# Level 2 compiles in four fifths of the time, and the programs are as fast as with the default.
export XLA_FLAGS="--xla_backend_optimization_level=2 ${XLA_FLAGS:-}"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
if [ "$JAX_PLATFORMS" = cpu ]; then source launch/cpu_memory.sh; fi

# Steps of such a small model keep little more than one core busy, and a program is compiled on one,
# so two processes train different arms at the same time. The first also makes the base model.
train=(python launch/train.py --config=configs/demo.py --workdir="$out")
mkdir -p "$out"
(
  until [ -e "$out/base/.lock" ]; do sleep 0.5; done
  exec "${train[@]}" --only=iterative,grpo --plain
) > "$out/second.log" 2>&1 &
second=$!
trap 'kill "$second" 2> /dev/null || true' EXIT
"${train[@]}" --only=sft_bare,sft_style,joint
echo "waiting for iterative and grpo, which print to $out/second.log"
wait "$second" || { tail -n 3 "$out/second.log"; exit 1; }
echo "The report: $out/report.html"
