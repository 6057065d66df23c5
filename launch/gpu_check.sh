#!/usr/bin/env bash
# Check what an accelerator computes, then time GRPO steps on it; written for a few minutes on one
# lent GPU, so each part has a time limit and leaves its result in DIR.
#   bash launch/gpu_check.sh [SIZE] [DIR]     SIZE: 3b by default, 7b, or cpu-s on a CPU
#                                             DIR: runs/gpu_check by default
# Compiled programs are kept in DIR/jax_cache: a second call with the same DIR starts warm. A Python
# on PATH that has JAX is used as it is; otherwise an environment is created.
set -euo pipefail
size=${1:-3b} out=$(realpath -m "${2:-runs/gpu_check}")
case "$size" in
  3b | 7b | cpu-s) ;;
  *) echo "SIZE: expected 3b, 7b or cpu-s, got $size" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
if ! python -c 'import jax, orbax.checkpoint, transformers, grain' 2> /dev/null; then
  if [ "${JAX_PLATFORMS:-}" = cpu ]; then extras=int8; else extras=cuda,int8; fi
  source launch/env.sh "$extras"
fi
if [ "${JAX_PLATFORMS:-}" = cpu ]; then source launch/cpu_memory.sh; fi
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR="$out/jax_cache"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
failed=()
part() {  # NAME SECONDS COMMAND: its output is DIR/NAME.json, its messages DIR/NAME.log
  echo "$1"
  if ! timeout "$2" "${@:3}" > "$out/$1.json" 2> >(tee "$out/$1.log" >&2); then failed+=("$1"); fi
}
{
  git log -1 --format=%H || true
  python --version
  python -m pip list 2> /dev/null | grep -i -E '^(jax|flax|optax|orbax|numpy|qwix|nvidia)' || true
  nvidia-smi 2> /dev/null || lscpu
} > "$out/environment.txt"
part checks 120 python launch/bench.py --check
# No row is started after 3 minutes; the rows so far are printed as messages if the time ends.
part suite 230 python launch/bench.py --suite --size="$size" --minutes=3
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; see $out" >&2
  exit 1
fi
echo "The results: $out"
