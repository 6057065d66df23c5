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
python launch/train.py --config=configs/demo.py --workdir="$out"
echo "The report: $out/report.html"
