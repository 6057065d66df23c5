#!/usr/bin/env bash
#SBATCH --job-name=cptjax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
# Run one process per node, which takes all GPUs of the node; jax.distributed reads the variables of
# SLURM. SLURM sends SIGTERM two minutes before the time limit; the run then saves and exits with
# code 0. A process that fails ends the job.
#   sbatch --nodes=4 launch/slurm.sh --config=configs/cpt7.py:grpo,7b --workdir=/shared/run
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source launch/env.sh cuda
# srun does not take --cpus-per-task from sbatch by itself.
CPTJAX_DISTRIBUTED=1 srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  python launch/train.py "$@"
