"""Parts of the README that scripts write, each between <!-- NAME --> and <!-- /NAME -->."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def split_readme(name: str) -> tuple[str, str, str]:
    """The README before a part, the part, and the README after it."""
    before, rest = README.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
    current, after = rest.split(f"<!-- /{name} -->")
    return f"{before}<!-- {name} -->\n", current, f"<!-- /{name} -->{after}"


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), ["---"] * len(list(header)), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_or_write(name: str, render: Callable[[], str]) -> None:
    """Print a part, or with --write put it into the README."""
    if sys.argv[1:] == ["--write"]:
        before, _, after = split_readme(name)
        README.write_text(before + render() + after, encoding="utf-8")
    else:
        print(render(), end="")
