# Create or reuse a virtual environment with cptjax, and activate it. The other scripts source this
# file: `source launch/env.sh [extras]`. PYTHON sets the interpreter (>= 3.11), VENV the folder.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || return
_candidates=${PYTHON:-python3 python3.13 python3.12 python3.11}
PYTHON=
for candidate in $_candidates; do
  "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
  PYTHON=$candidate
  break
done
if [ -z "$PYTHON" ]; then
  echo "expected Python 3.11 or newer, got none of: $_candidates; set PYTHON=..." >&2
  exit 2
fi
unset _candidates
VENV=${VENV:-.venv}
extras=${1:+[$1]}
stamp="$VENV/.installed$(cksum < setup.py | tr -d ' ')${1:-}"
# Jobs that start at the same time, such as those of an array, install one after the other.
(
  if [ ! -e "$stamp" ]; then
    mkdir -p "$VENV"
    exec 9> "$VENV/.lock"
    if command -v flock > /dev/null; then flock 9; fi
  fi
  if [ ! -e "$stamp" ]; then
    echo "creating $VENV ($("$PYTHON" --version)) and installing cptjax$extras"
    { [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"; } &&
      "$VENV/bin/python" -m pip install -q --upgrade pip &&
      "$VENV/bin/python" -m pip install -q -e ".$extras" &&
      touch "$stamp"
  fi
) || exit
# shellcheck source=/dev/null
source "$VENV/bin/activate"
