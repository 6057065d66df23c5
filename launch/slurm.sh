#!/usr/bin/env bash
#SBATCH --job-name=cptjax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Run one process per node, which takes all GPUs of the node; jax.distributed reads the variables of
# SLURM.
#   sbatch --nodes=4 launch/slurm.sh --config=configs/cpt7.py:grpo,7b --workdir=/shared/run
#
# In an array, each task runs one of the arms and seeds that `launch/train.py --list` prints:
#   sbatch --array=0-5 launch/slurm.sh --config=... --config.seeds=0,1,2 --workdir=/shared/runs
#
# SLURM sends SIGTERM two minutes before the time limit, a person with `scancel --signal=TERM JOB`.
# The run then saves, and the job is queued again and continues; `scancel JOB` ends it. A process
# that fails ends the job. EXTRAS are what is installed with cptjax: cuda, or nothing for CPUs.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source launch/env.sh "${EXTRAS-cuda}"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  listed=$(python launch/train.py "$@" --list) # which says what is wrong with the flags
  mapfile -t parts <<< "$listed"
  if [ "$SLURM_ARRAY_TASK_ID" -ge ${#parts[@]} ]; then
    echo "--array: got task $SLURM_ARRAY_TASK_ID, but the config has ${#parts[@]} arms and seeds," \
      "counted from 0: ${parts[*]:-run it without --array}" >&2
    exit 2
  fi
  set -- "$@" --only="${parts[$SLURM_ARRAY_TASK_ID]}"
fi
code=0
# srun does not take --cpus-per-task from sbatch by itself.
CPTJAX_DISTRIBUTED=1 srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  python launch/train.py --fail_on_sigterm "$@" || code=$?
if [ "$code" = 143 ]; then # stopped by SIGTERM
  echo "queued again, to continue from what was saved"
  job=$SLURM_JOB_ID # of the last task of an array, it would name the whole array
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  scontrol requeue "$job"
fi
exit "$code"
