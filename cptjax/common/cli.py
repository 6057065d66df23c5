"""How every launcher begins and ends: configs by path, several hosts, and a user's mistake as one line and exit code 2."""

import difflib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from cptjax.config import MULTI_RUN_SECTIONS, all_runs, resolve_stages

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]


def define_config_flag() -> flags.FlagHolder:
    """`--config=configs/X.py[:argument]` and `--config.section.key=value`; configs may import each other from the root."""
    sys.path.insert(0, str(REPOSITORY_ROOT))
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, with its argument behind a colon.", lock_config=True
    )


def init_distributed() -> None:
    """Join the other hosts where the launcher says that there are some."""
    if os.environ.get("CPTJAX_DISTRIBUTED"):
        import jax

        jax.distributed.initialize()


def restart_with_malloc_settings() -> None:
    """Start again with a C library that keeps what it was given, in pages of 2 MiB: it reads these settings before Python runs.

    On a CPU every run of a program takes its memory anew. A training step of gigabytes then waits for the kernel to find and clear
    them; in a virtual machine, whose host takes free pages back, for a third of its time and more.
    """
    name, given = "GLIBC_TUNABLES", os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.mmap_max" not in given:
        settings = {
            "hugetlb": 1,
            "mmap_max": 0,
            "trim_threshold": 1 << 40,
            "top_pad": 1 << 28,
            "arena_max": 1,
        }
        os.environ[name] = ":".join(
            filter(None, (given, *(f"glibc.malloc.{k}={v}" for k, v in settings.items())))
        )
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run_launcher(fn: Callable[[], None]) -> None:
    """Run `fn` after absl has parsed the flags."""

    def run(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save
        try:
            if argv[1:]:
                raise ValueError(
                    f"unexpected argument {argv[1]!r}; flags are written --name=value, see --help"
                )
            refuse_ineffective_flags(
                flags.FLAGS["config"].value if "config" in flags.FLAGS else None, sys.argv[1:]
            )
            fn()
            signal.signal(
                signal.SIGTERM, signal.SIG_IGN
            )  # all is said and saved: what comes while Python ends changes nothing
        except (ValueError, OSError) as error:
            _exit_with_error(error)
        except SystemExit as leaving:  # SIGTERM came while a program ran: Python must not take the device from under it
            if not isinstance(leaving.code, int):
                raise
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(leaving.code)

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            _exit_with_error(_last_line(error))
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            OSError,
            ImportError,
            SyntaxError,
        ) as error:
            _exit_with_error(_explain_flag_error(error, argv))

    app.run(run, flags_parser=parse)


def refuse_ineffective_flags(config: Any, argv: list[str]) -> None:
    """A setting of the command line that every arm, the pre-stage or every stage sets again would change nothing."""
    given = [
        a[len("--config.") :].split("=")[0].split(".") for a in argv if a.startswith("--config.")
    ]
    paths = [p for p in given if p[0] not in MULTI_RUN_SECTIONS]
    stages = (
        [each.config for _, single in all_runs(config) for each in resolve_stages(single)]
        if paths
        else []
    )
    for path in paths:
        if all(_value_at(each, path) != _value_at(config, path) for each in stages):
            name = ".".join(path)
            hint = next(
                (
                    f"; set --config.arms.{arm}.{name}"
                    for arm in config.arms
                    if _value_at(config.arms[arm], path) is not None
                ),
                "",
            )
            raise ValueError(
                f"--config.{name} changes nothing, since every run of the config sets it itself{hint}"
            )


def _value_at(config: Any, path: list[str]) -> Any:
    """The value at a dotted name; None = there is none."""
    for key in path:
        config = config[key] if hasattr(config, "keys") and key in config else None
    return config


def _last_line(error: Exception) -> str:
    """What went wrong, without the traceback that a config's own error carries."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    head = lines[0].removesuffix("Error whilst parsing config file:")
    return lines[0] if len(lines) == 1 else f"{head}{lines[-1].removeprefix('ValueError: ')}"


def _exit_with_error(error: Any) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def _explain_flag_error(error: Exception, argv: list[str]) -> str:
    """An override of something that the config does not have: its nearest name."""
    unknown = [a for a in argv if a.startswith("--config.")]
    name = str(error).strip("'\"")
    if not isinstance(error, AttributeError | KeyError) or not unknown:
        return (
            f"{type(error).__name__}: {error}"
            if not isinstance(error, ValueError | OSError)
            else str(error)
        )
    flag = next((a for a in unknown if name.split(".")[-1] in a), unknown[-1]).split("=")[0]
    return f"{flag} does not exist in the config{_nearest_flag(flag)}"


def _nearest_flag(flag: str) -> str:
    try:
        config = flags.FLAGS["config"].value
    except (KeyError, flags.UnparsedFlagAccessError):
        return ""
    names = [f"--config.{path}" for path in _dotted_names(config or {})]
    close = difflib.get_close_matches(flag, names, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _dotted_names(config: Any, before: str = "") -> list[str]:
    out = []
    for key, value in config.items():
        out += [
            f"{before}{key}",
            *(_dotted_names(value, f"{before}{key}.") if hasattr(value, "items") else ()),
        ]
    return out
