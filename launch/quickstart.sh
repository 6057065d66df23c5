#!/usr/bin/env bash
# Fresh machine -> virtual environment, install, the demo (a tiny model, synthetic tasks, no downloads), and where its report is.
#   bash launch/quickstart.sh [DIR]        DIR: the workdir, runs/demo by default
set -euo pipefail
source "$(dirname "$0")/env.sh" ""  # without an argument it would see this script's
out=${1:-runs/demo}
export XLA_FLAGS="--xla_backend_optimization_level=2 ${XLA_FLAGS:-}"  # compiled in four fifths of the time, and as fast
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
if [ "$JAX_PLATFORMS" = cpu ]; then source launch/cpu_memory.sh; fi
python launch/train.py --config=configs/demo.py --workdir="$out"
echo "The report: $out/report.html"
