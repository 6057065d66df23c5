# Makes or reuses a virtual environment with cptjax in it; sourced by the other scripts: `source launch/env.sh "[extras]"`.
# PYTHON picks the interpreter (>= 3.11), VENV the folder.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
  "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && PYTHON=$candidate && break
done
[ -n "${PYTHON:-}" ] || { echo "cptjax needs Python 3.11 or newer on the PATH; found $(python3 --version 2>&1). Set PYTHON=..." >&2; exit 2; }
VENV=${VENV:-.venv}
extras=${1:+[$1]}
stamp="$VENV/.installed$(cat setup.py | cksum | tr -d ' ')${1:-}"
if [ ! -e "$stamp" ]; then
  echo "making $VENV ($("$PYTHON" --version)) and installing cptjax$extras"
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  "$VENV/bin/python" -m pip install -q --upgrade pip
  "$VENV/bin/python" -m pip install -q -e ".$extras"
  touch "$stamp"
fi
source "$VENV/bin/activate"
