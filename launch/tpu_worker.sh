#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on each host of a slice, in a folder with the code and the command:
#   install   unpack code.tar.gz and make a virtual environment
#   start     start the run that the file `arguments` describes, unless it is going on
#   follow    print its log until it ends
#   status    print one of: running, stopped, ended CODE
#   stop      send the run SIGTERM: it saves and ends
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

is_running() { [ -e shell ] && kill -0 "$(cat shell)" 2> /dev/null; }

case $1 in
  install)
    if is_running; then
      echo "error: a run is going on: follow it with resume, or end it with stop" >&2
      exit 2
    fi
    rm -rf code && mkdir code && tar xzf code.tar.gz -C code
    # Images of TPU VMs may have an older Python.
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python3 -m pip install -q --user uv
      python3 -m uv python install -q 3.12
      PYTHON=$(python3 -m uv python find 3.12)
      export PYTHON
    fi
    export VENV="$PWD/venv"
    # shellcheck source=/dev/null
    source code/launch/env.sh "${EXTRAS-tpu,gcs}"
    ;;
  start)
    if is_running; then exit 0; fi
    rm -f code_of_exit stopped
    setsid bash tpu_worker.sh train > run.log 2>&1 < /dev/null &
    echo $! > shell
    ;;
  train)
    set -a
    # shellcheck source=/dev/null
    source ./environment
    set +a
    eval "set -- $(cat arguments)"
    # shellcheck source=/dev/null
    source venv/bin/activate
    export CPTJAX_DISTRIBUTED=${CPTJAX_DISTRIBUTED-1}
    cd code
    python launch/train.py --fail_on_sigterm "$@" &
    echo $! > ../python
    code=0
    wait $! || code=$?
    echo "$code" > ../code_of_exit
    ;;
  follow) tail -n +1 -f --pid="$(cat shell)" run.log ;;
  status)
    if is_running; then
      echo running
    elif [ -e stopped ]; then
      echo stopped
    else
      echo "ended $(cat code_of_exit 2> /dev/null || echo 1)"
    fi
    ;;
  stop)
    touch stopped
    if is_running; then kill -TERM "$(cat python)"; fi
    ;;
esac
