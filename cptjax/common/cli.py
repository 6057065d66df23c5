"""Start and end of every command; a user's mistake prints one line and exits with code 2."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from cptjax.common import config_flag


def init_distributed() -> None:
    """Connect to the other hosts if the launch script says that there are some."""
    if os.environ.get("CPTJAX_DISTRIBUTED"):
        import jax

        jax.distributed.initialize()


def run_launcher(main: Callable[[], None]) -> None:
    """Parse the flags and run `main`."""

    def run(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every step of every save
        try:
            if argv[1:]:
                raise ValueError(
                    f"unexpected argument {argv[1]!r}; flags are written --name=value, see --help"
                )
            config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
            config_flag.refuse_ineffective_overrides(config, sys.argv[1:])
            main()
            # Everything is saved, so a SIGTERM while Python exits must not change the exit code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        except (ValueError, OSError) as error:
            _exit_with_error(error)
        except SystemExit as error:
            # After a SIGTERM, exit at once: a normal exit would release the device while a program
            # runs on it.
            if not isinstance(error.code, int):
                raise
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code)

    app.run(run, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags and load the config file; treat any failure as the user's mistake."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _exit_with_error(_last_line(error))
    except (ValueError, OSError) as error:
        _exit_with_error(error)
    except (AttributeError, KeyError, TypeError, ImportError, SyntaxError) as error:
        _exit_with_error(f"{type(error).__name__}: {error}")


def _last_line(error: Exception) -> str:
    """Return the reason of a flag error, without the traceback of an error in a config file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    head = lines[0].removesuffix("Error whilst parsing config file:")
    return lines[0] if len(lines) == 1 else f"{head}{lines[-1].removeprefix('ValueError: ')}"


def _exit_with_error(error: object) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
