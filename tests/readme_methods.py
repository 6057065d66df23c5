"""Write the README's table of continual-learning methods from .github/methods.json.

python tests/readme_methods.py                  print the table
python tests/readme_methods.py --write          put it into README.md, between <!-- methods --> marks
python tests/readme_methods.py --read WORKDIR   make .github/methods.json from the runs of
                                                configs/demo.py:0,methods
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from readme_parts import markdown_table, print_or_write

ROOT = Path(__file__).parents[1]
NUMBERS = ROOT / ".github" / "methods.json"
METRICS = ("learned_gain", "fm_diagonal", "text", "text_forced")
TITLES = dict(
    none="none",
    replay="replay of 1/8 of a batch",
    ewc="EWC",
    mas="MAS",
    cpo="CPO",
    lwf="LwF",
    der="DER",
    agem="A-GEM",
    olora="O-LoRA",
    ties="TIES",
)


def collect_numbers(workdir: Path) -> dict[str, Any]:
    """Return mean and standard deviation over the seeds of each arm, in fractions of 1."""
    report = json.loads((workdir / "report.json").read_text())
    arms = {}
    for name, found in report["arms"].items():
        runs = [json.loads(p.read_text()) for p in sorted(workdir.glob(f"{name}/*/summary.json"))]
        arms[name] = {
            "seeds": len(runs),
            "kept_bytes": max(run["cost"].get("kept_bytes") or 0 for run in runs),
            "flops": float(np.mean([run["cost"]["flops"] for run in runs])),
            **{m: [round(found[m][k], 4) for k in ("mean", "sd")] for m in METRICS},
        }
    return arms


def points(value: list[float]) -> str:
    return f"{100 * value[0]:+.1f} ± {100 * value[1]:.1f}"


def render_table(arms: dict[str, Any]) -> str:
    """Return a table with a row for each arm; FLOPs are those of all work of a run."""
    header = "method, learned, earlier tasks, text tasks, text tasks with prefix, kept, FLOPs"
    rows = []
    for base, title in (("sft", "SFT"), ("grpo", "GRPO")):
        for name, words in TITLES.items():
            arm = arms[f"{base}_{name}"]
            extra = arm["flops"] / arms[f"{base}_none"]["flops"]
            kept = f"{arm['kept_bytes'] / 1e6:.2f} MB"
            cells = [points(arm[metric]) for metric in METRICS]
            rows.append([f"{title}, {words}", *cells, kept, f"x {extra:.2f}"])
    return markdown_table(header.split(", "), rows) + "\n"


def render_part() -> str:
    return render_table(json.loads(NUMBERS.read_text()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        numbers = collect_numbers(Path(sys.argv[2]))
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
    print_or_write("methods", render_part)
