#!/usr/bin/env bash
# Fresh machine -> virtual environment, test dependencies, lint, every test. Exactly what CI runs.
set -euo pipefail
source "$(dirname "$0")/env.sh" test
# Parity tests compare with torch; its small CPU build is looked for on Python 3.11 only, elsewhere those tests skip.
if python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' && ! python -c 'import torch' 2>/dev/null; then
  python -m pip install -q "torch==2.13.0" || echo "no torch here: parity tests will skip"
fi
ruff check . && ruff format --check --diff . || exit 1
# Two processes: compiling is most of it, and a file's compiled programs leave with its process or its last test.
# Where one crashes the run ends: xdist would wait for ever for the tests of its file.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 "$@"
