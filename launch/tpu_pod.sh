#!/usr/bin/env bash
# Run one command on every host of a TPU pod slice; jax.distributed connects the hosts.
#   TPU_NAME=my-slice ZONE=us-east5-a bash launch/tpu_pod.sh \
#     --config=configs/cpt7.py:grpo,7b --workdir=/mnt/shared/run
# The workdir is one folder at the same path on every host: NFS, or a bucket mounted with gcsfuse.
set -euo pipefail
: "${TPU_NAME:?set TPU_NAME to the slice}" "${ZONE:?set ZONE}"
repo=$(basename "$(git rev-parse --show-toplevel)")
gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="\
cd ~/$repo && git pull -q && VENV=.venv bash -c 'source launch/env.sh tpu' && \
CPTJAX_DISTRIBUTED=1 .venv/bin/python launch/train.py $*"
