#!/usr/bin/env bash
# Run one command on every host of a TPU pod slice; jax.distributed connects the hosts.
#   TPU_NAME=my-slice ZONE=us-east5-a bash launch/tpu_pod.sh \
#     --config=configs/cpt7.py:grpo,7b --workdir=/mnt/shared/run
# The repository is expected in the home folder of every host, under the name of this one. The
# workdir is one folder at the same path on every host.
set -euo pipefail
: "${TPU_NAME:?set TPU_NAME to the slice}" "${ZONE:?set ZONE}"
repo=$(basename "$(git rev-parse --show-toplevel)")
arguments=$(printf '%q ' "$@") # quoted once more for the shell of each host
gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="\
set -e; cd ~/$(printf '%q' "$repo"); git pull -q; VENV=.venv bash -ec 'source launch/env.sh tpu'; \
CPTJAX_DISTRIBUTED=1 exec .venv/bin/python launch/train.py $arguments"
