"""An interpreter that only records its arguments, to test what a launcher installs and runs."""

import os
import stat
import sys
from pathlib import Path


def make_environment(folder: Path) -> tuple[dict[str, str], Path]:
    """Return variables with which launchers use the interpreter, and the file that it writes."""
    venv, log = folder / "venv", folder / "log"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (venv / "bin" / "activate").write_text(f'PATH="{venv}/bin:$PATH"\n')
    return os.environ | {"VENV": str(venv), "PYTHON": sys.executable}, log
