"""Start and end of every command; a user's mistake prints one line and exits with code 2."""

import argparse
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict

from cptjax.common import buckets, cluster, config_checks, config_flag, console, files


def define_cluster_flags() -> None:
    """Define the flags that connect the processes of a run (see `connect_processes`)."""
    flags.DEFINE_string(
        "coordinator", None, "host:port of process 0, to run on several hosts without a scheduler."
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes; with --coordinator.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0; with --coordinator.")


def define_cache_flag() -> None:
    """Define the flag of commands that keep their compiled programs for the next time."""
    flags.DEFINE_string(
        "compilation_cache",
        "",
        "Folder of compiled programs, which later commands load instead of compiling; default: "
        "cptjax in the user's cache, at most 10 GiB; off = none.",
    )


def connect_processes() -> None:
    """Connect to the other processes of the run, if there are some.

    The flags name them. With CPTJAX_DISTRIBUTED=1 JAX finds them by itself, on Cloud TPU and under
    SLURM.
    """
    values = flags.FLAGS.flag_values_dict()
    given = [values[name] for name in ("coordinator", "num_processes", "process_id")]
    if None in given and given != [None] * 3:
        raise ValueError(
            "--coordinator, --num_processes, --process_id: expected all of them or none, got "
            f"{given[0]}, {given[1]}, {given[2]}"
        )
    if None not in given or os.environ.get("CPTJAX_DISTRIBUTED"):
        minutes = values["config"].stuck_minutes if values.get("config") else 0.0
        cluster.connect(*given, wait_seconds=60 * minutes)


def run_launcher(main: Callable[[], None]) -> None:
    """Parse the flags and run `main`."""

    def run(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every step of every save
        try:
            if argv[1:]:
                raise ValueError(
                    f"unexpected argument {argv[1]!r}; flags are written --name=value, see --help"
                )
            if "config" in flags.FLAGS:
                _check_config_flag(flags.FLAGS["config"].value)
            if "compilation_cache" in flags.FLAGS:
                from cptjax.common import chips, compilation_cache  # import jax

                chips.reserve_gpu_memory()
                compilation_cache.keep_compiled_programs(flags.FLAGS["compilation_cache"].value)
            main()
            cluster.disconnect()
            # Everything is saved, so a signal while Python exits must not change the exit code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        except BrokenPipeError:  # nobody reads the results, as in `... | head -1`
            os._exit(128 + signal.SIGPIPE)
        except (ValueError, OSError) as error:
            exit_with_error(error)
        except KeyboardInterrupt:
            cluster.end_all("stopped by Ctrl-C", 128 + signal.SIGINT)
        except SystemExit as error:
            # After a stop signal, exit at once: a normal exit would release the device while a
            # program runs on it.
            if not isinstance(error.code, int):
                raise
            if cluster.is_connected() and 0 < error.code < 128:
                cluster.end_all(f"exit code {error.code}", error.code)
            cluster.disconnect()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code)
        except Exception as error:
            if not cluster.is_connected():
                exit_with_error(error)
            cluster.wait_for_lost_process(error)
            traceback.print_exc()
            cluster.end_all(f"{type(error).__name__}: {error}", 1, say=False)

    app.run(run, flags_parser=_parse_flags)


def _check_config_flag(config: ConfigDict | None) -> None:
    """Check the values of the config and the overrides on the command line."""
    if config is None:
        raise ValueError("--config is missing; expected --config=configs/X.py[:argument]")
    with files.explain_errors("--config"):
        config_checks.check_config(config)
        config_flag.refuse_ineffective_overrides(config, sys.argv[1:])


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags and load the config file; treat any failure as the user's mistake."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        exit_with_error(_last_line(error))
    except (ValueError, OSError) as error:
        exit_with_error(error)
    except Exception as error:
        exit_with_error(files.describe_error(error))


def _last_line(error: Exception) -> str:
    """Return the reason of a flag error, without the traceback of an error in a config file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if missing := re.findall(r"Flag (--\w+) must have a value other than None", str(error)):
        return f"{', '.join(missing)}: expected a value, got none; add {missing[0]}=..., see --help"
    head = lines[0].removesuffix("Error whilst parsing config file:")
    return lines[0] if len(lines) == 1 else f"{head}{lines[-1].removeprefix('ValueError: ')}"


def _save_traceback(error: Exception) -> str:
    """Write the traceback of an error that no one expected to a file; return a line about it."""
    with tempfile.NamedTemporaryFile("w", prefix="cptjax-", suffix=".log", delete=False) as file:
        traceback.print_exception(error, file=file)
    return f"unexpected {files.describe_error(error)}; the traceback is in {file.name}"


def exit_with_error(error: object) -> NoReturn:
    """Print one line about an error, and exit with code 2, or with 1 if the input may be right.

    Launchers start a run again after code 1.
    """
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        reason = files.describe_error(error) if isinstance(error, Exception) else error
        error = f"out of memory ({reason}); lower the size of batches or rows"
    is_unexpected = isinstance(error, Exception) and not isinstance(error, ValueError | OSError)
    may_pass = isinstance(error, (files.TryAgain, ConnectionError, TimeoutError))
    code = 1 if is_unexpected or may_pass else 2
    if cluster.is_connected():
        if isinstance(error, Exception):
            cluster.wait_for_lost_process(error)
        cluster.end_all(str(error), code)
    console.print_error(_save_traceback(error) if is_unexpected else error)
    if isinstance(error, buckets.BucketUnreachable):
        # The array store may still try to write a checkpoint.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as in the commands with absl's flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")
