"""Write the README's map: every folder and file in import order, with its docstring's first line.

python tests/readme_map.py            print the map
python tests/readme_map.py --write    put it into README.md, between <!-- map --> and <!-- /map -->
"""

import ast
from pathlib import Path

from readme_parts import print_or_write
from test_imports import ORDER, ROOT, module_name, package_imports

FOLDERS = {
    "configs": "Settings as data; they import ml_collections and nothing of cptjax.",
    "launch": "One file per command: flags -> one call of the library.",
}


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path.relative_to(ROOT)} has no docstring"
    return docstring.splitlines()[0]


def in_import_order(paths: list[Path]) -> list[Path]:
    """Sort files so that each follows those that it imports; by name where both are possible."""
    waiting = {module_name(path): path for path in sorted(paths)}
    uses = {name: package_imports(path, everywhere=False) for name, path in waiting.items()}
    ordered = []
    while waiting:
        name = next(n for n in waiting if not (uses[n] - {n}) & waiting.keys())
        ordered.append(waiting.pop(name))
    return ordered


def folder_lines(folder: Path, depth: int) -> list[str]:
    """The lines of one folder: its files in import order, then its sub-folders."""
    lines = []
    for path in in_import_order([p for p in folder.glob("*.py") if p.name != "__init__.py"]):
        lines.append(map_line(path.name, first_line(path), depth))
    for sub in sorted(p.parent for p in folder.glob("*/__init__.py")):
        lines.append(map_line(f"{sub.name}/", first_line(sub / "__init__.py"), depth))
        lines += folder_lines(sub, depth + 1)
    return lines


def map_line(name: str, text: str, depth: int) -> str:
    return f"{'  ' * depth + name:<28}{text}"


def build_map() -> str:
    lines = []
    for name, text in FOLDERS.items():
        lines += [map_line(f"{name}/", text, 0), *folder_lines(ROOT / name, 1)]
    lines.append("cptjax/")
    for names in ORDER:
        for name in names.split():
            path = ROOT / "cptjax" / name
            if path.is_dir():
                lines.append(map_line(f"{name}/", first_line(path / "__init__.py"), 1))
                lines += folder_lines(path, 2)
            else:
                path = path.with_suffix(".py")
                lines.append(map_line(path.name, first_line(path), 1))
    return "```\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    print_or_write("map", build_map)
