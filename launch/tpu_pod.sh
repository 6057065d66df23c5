#!/usr/bin/env bash
# Run cptjax on a TPU pod slice of Google Cloud: queue for the slice, install, run, follow, restart.
#
#   bash launch/tpu_pod.sh create SLICE --zone=ZONE --type=v5litepod-64 [--spot] [--slices=N]
#        [--runtime=VERSION] [-- FLAGS of gcloud compute tpus queued-resources create]
#   bash launch/tpu_pod.sh run    SLICE [--ref=GIT_REF | --tarball=FILE] [--env=NAME ...]
#        -- --config=configs/cpt7.py:grpo,7b --workdir=gs://BUCKET/RUN
#   bash launch/tpu_pod.sh resume SLICE      the same run again: follow it, or start it again
#   bash launch/tpu_pod.sh logs   SLICE      print the log of the first host, and follow it
#   bash launch/tpu_pod.sh stop   SLICE      save and end the run
#   bash launch/tpu_pod.sh delete SLICE      give the slice back
#
# With --dry-run a command only prints what it would execute. `run` waits for the slice, gives all
# hosts the same code (a commit, HEAD by default, or a tarball with setup.py at its top) and follows
# the run until it ends. A slice that is preempted is requested again, and the run continues. A run
# that fails is started again up to --restarts=10 times, unless its input has a mistake (exit code
# 2). The run goes on without the connection: after Ctrl-C or a closed terminal, `resume` follows it
# again. --env passes an environment variable, such as HF_TOKEN.
#
# The folder .tpu_pod/SLICE remembers the slice and the run; for a slice that is not known there,
# give `run` the flags of `create`. The project is that of gcloud.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
POLL_SECONDS=${POLL_SECONDS:-30}
HOST_FOLDER=cptjax_run # in the home folder of each host

fail() {
  echo "error: $*" >&2
  exit 2
}

# ---- the slice -----------------------------------------------------------------------------------

call() {
  if [ -n "$dry_run" ]; then
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
  else
    "$@"
  fi
}

queued() { # VERB FLAGS...
  local verb=$1
  shift
  call gcloud compute tpus queued-resources "$verb" "$name" --zone="$zone" "$@"
}

create_slice() {
  local nodes=(--node-id="$name")
  if [ "$slices" -gt 1 ]; then nodes=(--node-count="$slices" --node-prefix="$name"); fi
  queued create --accelerator-type="$type" --runtime-version="$runtime" "${nodes[@]}" \
    ${spot:+--spot} "${more[@]}"
}

delete_slice() { queued delete --force --quiet; }

# Print the state of the request, MISSING, or UNKNOWN if there is no answer. A request may stay
# ACTIVE for a while after its nodes are lost; that is SUSPENDED here.
slice_state() {
  local found node nodes=("$name") i
  if ! found=$(queued describe --format='value(state.state)' 2>&1); then
    case $found in
      *NOT_FOUND* | *"not found"*) echo MISSING ;;
      *) echo UNKNOWN ;;
    esac
    return
  fi
  if [ "$slices" -gt 1 ]; then
    nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
  fi
  if [ "$found" = ACTIVE ]; then
    for node in "${nodes[@]}"; do
      case $(gcloud compute tpus tpu-vm describe "$node" --zone="$zone" --format='value(state)' \
        2>&1) in
        *PREEMPTED* | *TERMINATED* | *NOT_FOUND*) found=SUSPENDED ;;
      esac
    done
  fi
  echo "$found"
}

wait_for_slice() {
  local now before=
  if [ -n "$dry_run" ]; then
    echo "# until the slice is ACTIVE:"
    queued describe --format='value(state.state)'
    echo "# if it is SUSPENDED or FAILED, as after a preemption:"
    delete_slice
    create_slice
    echo "# when it is ACTIVE:"
    return
  fi
  while true; do
    now=$(slice_state)
    if [ "$now" != "$before" ]; then echo "$(date +%H:%M:%S) $name is $now" >&2; fi
    before=$now
    case $now in
      ACTIVE) return ;;
      SUSPENDED | FAILED) delete_slice || true ;; # then it is MISSING
      MISSING) create_slice ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# ---- the run -------------------------------------------------------------------------------------

on_hosts() { # all|0 VERB
  queued ssh --node="$1" --worker="$1" --command="bash $HOST_FOLDER/tpu_worker.sh $2"
}

pack_run() { # FLAGS of train.py
  local variable commit
  if [ -n "$tarball" ]; then
    [ -r "$tarball" ] || fail "--tarball=$tarball: no such file"
    grep -qxE '(\./)?setup\.py' <<< "$(tar tzf "$tarball")" \
      || fail "--tarball=$tarball: expected setup.py at its top, as in tar czf FILE -C REPOSITORY ."
    call cp "$tarball" "$folder/code.tar.gz"
  else
    commit=$(git rev-parse -q --verify "$ref^{commit}") || fail "--ref=$ref: no such commit here"
    if [ -n "$(git status --porcelain -uno)" ]; then
      echo "warning: changes that are not committed are left out; give a --tarball for them" >&2
    fi
    call git archive --format=tar.gz --output="$folder/code.tar.gz" "$commit"
  fi
  printf '%q ' "$@" > "$folder/arguments"
  : > "$folder/environment"
  chmod 600 "$folder/environment"
  for variable in "${variables[@]}"; do
    [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] \
      || fail "--env: expected the name of a variable, got one with other characters;" \
        "export the variable here, and give its name alone"
    [ -n "${!variable+set}" ] || fail "--env=$variable: the variable is not set here"
    printf '%s=%q\n' "$variable" "${!variable}" >> "$folder/environment"
  done
  if [ -n "$dry_run" ]; then echo "# $folder/arguments: $(cat "$folder/arguments")"; fi
}

install() {
  queued ssh --node=all --worker=all --command="mkdir -p $HOST_FOLDER" \
    && call gcloud compute tpus queued-resources scp launch/tpu_worker.sh \
      "$folder"/{code.tar.gz,arguments,environment} "$name:$HOST_FOLDER" --zone="$zone" \
      --node=all --worker=all \
    && on_hosts all install
}

supervise() { # run|resume
  local failures=0 ended fresh=$1
  while true; do
    wait_for_slice
    if [ "$fresh" = run ] && [ -z "$dry_run" ] \
      && [ "$(on_hosts 0 status 2> /dev/null | tail -n 1)" = running ]; then
      fail "a run is going on on $name: follow it with resume, or end it with stop"
    fi
    # Hosts of a slice that was requested again have nothing yet.
    if { [ "$fresh" = resume ] && on_hosts all start; } || { install && on_hosts all start; }; then
      fresh=resume
      on_hosts 0 follow || true
      ended=$(on_hosts 0 status | tail -n 1) || ended=
    else
      ended="not started"
    fi
    if [ -n "$dry_run" ]; then
      echo "$ended"
      echo "# after exit code 0, 2 or stop: end; otherwise from the start, at most $restarts times"
      return
    fi
    case $ended in
      "ended 0" | stopped) return ;;
      "ended 2") exit 2 ;;
      running) ;; # the connection was lost
      *)
        [ "$(slice_state)" != ACTIVE ] || failures=$((failures + 1))
        [ "$failures" -le "$restarts" ] \
          || fail "the run failed $failures times, the last time with: ${ended:-no connection}"
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# ---- the command line ----------------------------------------------------------------------------

usage() {
  sed -n '4,12s/^#   //p' "${BASH_SOURCE[0]}"
  exit "$1"
}

command=${1:-} name=${2:-}
case $command in
  create | run | resume | logs | stop | delete) ;;
  --help | -h) usage 0 ;;
  *) usage 2 >&2 ;;
esac
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] \
  || fail "got the name '$name' of a slice, expected lower-case letters, digits and hyphens"
shift 2

zone='' type='' runtime='' spot='' slices=1 more=()
ref=HEAD tarball='' variables=() restarts=10 dry_run=''
known=.tpu_pod/$name folder=.tpu_pod/$name
# shellcheck source=/dev/null
if [ -e "$known/slice" ]; then source "$known/slice"; fi
while [ $# -gt 0 ]; do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --spot) spot=yes ;;
    --slices=*) slices=${1#*=} ;;
    --ref=*) ref=${1#*=} ;;
    --tarball=*) tarball=$(cd "$OLDPWD" && realpath -m -- "${1#*=}") ;;
    --env=*) variables+=("${1#*=}") ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry-run) dry_run=yes ;;
    --)
      shift
      break
      ;;
    *) fail "unexpected argument $1; flags of train.py or gcloud stand after --" ;;
  esac
  shift
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices: expected a whole number of at least 1"
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || fail "--restarts=$restarts: expected a whole number"
if [ -z "$zone" ] || [ -z "$type" ]; then
  fail "$name is not known here: give --zone and --type"
fi
case ${runtime:-$type} in
  v4-*) runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  "$type") fail "--type=$type: its software version is not known here; give --runtime" ;;
esac
if [ "$command" = create ]; then more=("$@"); fi
if [ -n "$dry_run" ]; then
  folder=$(mktemp -d)
  trap 'rm -r "$folder"' EXIT
else
  mkdir -p "$known"
  declare -p zone type runtime spot slices more > "$known/slice"
fi

case $command in
  create) create_slice ;;
  run)
    [ $# -gt 0 ] || fail "expected the flags of train.py after --"
    pack_run "$@"
    supervise run
    ;;
  resume)
    [ -n "$dry_run" ] || [ -e "$folder/arguments" ] || fail "no run was started on $name from here"
    supervise resume
    ;;
  logs) on_hosts 0 follow ;;
  stop) on_hosts all stop ;;
  delete)
    delete_slice
    if [ -z "$dry_run" ]; then rm -r "$known"; fi
    ;;
esac
