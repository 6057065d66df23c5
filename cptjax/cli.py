"""How every launcher ends: a user's mistake is one line on stderr and exit code 2, never a traceback."""

import sys
from collections.abc import Callable

from absl import app


def main(fn: Callable[[], None]) -> None:
    """Run `fn` after absl has parsed the flags."""

    def run(argv: list[str]) -> None:
        try:
            if argv[1:]:
                raise ValueError(f"unexpected argument {argv[1]!r}; flags are written --name=value, see --help")
            fn()
        except (ValueError, OSError) as e:
            print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
            sys.exit(2)

    def parse(argv: list[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(argv)
        except SystemExit as e:
            sys.exit(2 if e.code else 0)  # absl leaves with 1

    app.run(run, flags_parser=parse)
