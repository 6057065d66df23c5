"""Write the README's table of plans from .github/plans.json, and compile what it lacks.

python -m tests.readme_plans                 print the section
python -m tests.readme_plans --write         put it into README.md, between <!-- plans --> marks
python -m tests.readme_plans --compile [N]   compile N of the missing cells, or all of them

A cell is a model, a slice and a method. Each is saved as soon as it is compiled, so that the
command can be stopped and continued. Programs that do not fit are tried again with the changes of
`UPDATE_CHANGES` and `ROLLOUT_CHANGES`, one after the other, until all of the cell fit.
"""

import collections
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import cpt7
from tests.readme_parts import markdown_table, print_or_write

ROOT = Path(__file__).parents[1]
NUMBERS = ROOT / ".github" / "plans.json"
MODELS = {  # the smallest first, which is also the order of compilation
    "Qwen2.5-VL-3B": "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen2.5-VL-7B": "Qwen/Qwen2.5-VL-7B-Instruct",
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen3-VL-8B": "Qwen/Qwen3-VL-8B-Instruct",
    "Qwen2.5-VL-32B": "Qwen/Qwen2.5-VL-32B-Instruct",
    "Qwen2.5-VL-72B": "Qwen/Qwen2.5-VL-72B-Instruct",
}
SLICES = {  # name -> topology, number of slices, chips
    "v5e-16": ("v5e:4x4", 1, 16),
    "v5e-256": ("v5e:16x16", 1, 256),
    "v6e-16": ("v6e:4x4", 1, 16),
    "v6e-256": ("v6e:16x16", 1, 256),
    "2 x v5e-256": ("v5e:16x16", 2, 512),
}
METHODS = ("sft", "grpo")
GROWTH = (("v5e-16", "v5e-256"), ("v6e-16", "v6e-256"))
Change = tuple[str, dict[str, Any]]  # what the table says, and the settings
# Each is made on top of those before it.
UPDATE_CHANGES: tuple[Change, ...] = (
    ("smallest micro-batch", {"train.micro_batch": "shards"}),
    ("bf16 moments", {"train.moments_dtype": "bfloat16"}),
    ("bf16 weights", {"model.param_dtype": "bfloat16"}),
    ("LoRA", {"model.lora.rank": 64, "model.lora.alpha": 128.0}),
)
ROLLOUT_CHANGES: tuple[Change, ...] = (
    ("slots", {"rollout.slots": "shards"}),
    ("int8 rollouts", {"rollout.dtype": "int8"}),
)
# Where none of these makes a run fit, all are tried again with it.
WIDER_MODEL: Change = ("mesh.model=8", {"mesh.model": 8})
Cell = dict[str, Any]


# ---- compilation ---------------------------------------------------------------------------------


def cell_name(model: str, place: str, method: str) -> str:
    return f"{model}, {place}, {method}"


def cell_config(model: str, place: str, method: str, changes: Sequence[Change] = ()) -> ConfigDict:
    """Return the config of a cell: that of cpt7, with a fixed batch per chip."""
    _, slices, chips = SLICES[place]
    c = cpt7.get_config(f"{method},7b").unlock()
    c.model.path = MODELS[model]
    c.stages = c.stages[:1]
    c.mesh.update(data=slices, slices=slices, fsdp=-1, model=4)
    per_chip = 1 if method == "sft" else 2
    c.train.update(batch=per_chip * chips, micro_batch=0)
    for _, settings in changes:
        shards = chips // c.mesh.model
        values = {k: shards if v == "shards" else v for k, v in settings.items()}
        c.update_from_flattened_dict(values)
    return c


def attempts(refused: str, updates: int, rollouts: int) -> tuple[int, int] | None:
    """Return how many changes of each kind to make next, after a program was refused.

    Rollouts that do not fit with all of their changes need smaller weights.
    """
    if refused.startswith("rollouts") and rollouts < len(ROLLOUT_CHANGES):
        return updates, rollouts + 1
    return (updates + 1, rollouts) if updates < len(UPDATE_CHANGES) else None


def compile_cell(model: str, place: str, method: str, first: tuple[Change, ...] = ()) -> Cell:
    """Compile the programs of a cell with more and more changes after `first`, until all fit."""
    from cptjax.planning import aot_compile

    topology, slices, _ = SLICES[place]
    devices = aot_compile.topology_devices(topology, slices)
    compiled: dict[str, Any] = {}
    state: tuple[int, int] | None = (0, 0)
    cell: Cell = {}
    while state is not None:
        changes = (*first, *UPDATE_CHANGES[: state[0]], *ROLLOUT_CHANGES[: state[1]])
        config = cell_config(model, place, method, changes)
        cell, refused = plan_programs(config, devices, topology, slices, compiled)
        cell["changes"] = [name for name, _ in changes]
        if not refused:
            break
        state = attempts(refused, *state)
    return cell


def plan_programs(
    config: ConfigDict,
    devices: Sequence[Any],
    topology: str,
    slices: int,
    compiled: dict[str, Any],
) -> tuple[Cell, str]:
    """Return the numbers of a step and the first program that does not fit, or "".

    `compiled` has the programs of earlier attempts; those with equal arguments are not compiled
    again.
    """
    from cptjax.common import chips
    from cptjax.planning import aot_compile, memory, plan, programs
    from cptjax.training.programs import training_programs

    mesh = aot_compile.planned_mesh(config, devices, slices)
    stage = programs.planned_stage(config, mesh)
    chip, resident = chips.chip_of_devices(devices), memory.resident_bytes(stage)
    compiler = aot_compile.SubprocessCompiler(config, topology, slices)
    refused = {"fits": False, "limit": chip.usable}
    if sum(resident.values()) > chip.usable:
        return refused | {
            "peak": sum(resident.values()),
            "program": "weights and moments",
        }, "weights"
    costs: list[Any] = []
    listed = sorted(training_programs(stage), key=lambda p: p.name.startswith("rollouts"))
    for program in listed:
        key = program_key(program, config)
        cost = compiled.get(key)
        if cost is None:
            print(f"  {program.name}", flush=True)
            cost = plan.program_cost(program, stage, chip, {}, compiler, costs, slices)
            compiled[key] = cost
        costs.append(dataclasses.replace(cost, calls=program.calls))
        if cost.over or cost.peak > chip.usable:
            return refused | {"peak": cost.peak, "program": program.name}, program.name
    whole = plan.StagePlan("", len(devices), dict(mesh.shape), chip, resident, costs)
    updates = [c for c in costs if not c.name.startswith("rollouts") and "log-probs" not in c.name]
    return {
        "fits": True,
        "limit": chip.usable,
        "peak": whole.peak,
        "program": max(costs, key=lambda c: c.peak).name,
        "step_seconds": whole.step_seconds(),
        "mfu": whole.mfu(),
        "sent": sum(c.sent * c.calls for c in updates),
        "seconds": {c.name: c.bound * c.calls for c in costs},
    }, ""


def program_key(program: Any, config: ConfigDict) -> str:
    """Return a text that is equal for equal programs with equal memory around them."""
    settings = json.loads(config.to_json_best_effort())
    if not program.name.startswith("rollouts"):
        del settings["rollout"]
    return f"{program.name} {json.dumps(settings, sort_keys=True)}"


def missing_cells(cells: Mapping[str, Cell]) -> Iterator[tuple[str, str, str]]:
    """Yield the cells to compile: first SFT, the smallest models first.

    These are new cells, and those that do not fit and were not tried with `WIDER_MODEL`.
    """
    for method, model, place in itertools.product(METHODS, MODELS, SLICES):
        cell = cells.get(cell_name(model, place, method))
        if cell is None or not (cell["fits"] or WIDER_MODEL[0] in cell["changes"]):
            yield model, place, method


def compile_missing(most: int | None) -> None:
    """Compile missing cells, save each, and print how long the others will take."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(
        git, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    cells = read_cells()
    todo = list(missing_cells(cells))
    for n, (model, place, method) in enumerate(todo[:most], 1):
        name, began = cell_name(model, place, method), time.monotonic()
        print(f"{n}/{len(todo)} {name}", flush=True)
        first = (WIDER_MODEL,) if name in cells else ()
        cells[name] = compile_cell(model, place, method, first) | {
            "commit": commit,
            "compile_seconds": round(time.monotonic() - began),
        }
        NUMBERS.write_text(json.dumps(cells, indent=1) + "\n")
        of_method = [c["compile_seconds"] for k, c in cells.items() if k.endswith(method)]
        left = (len(todo) - n) * sum(of_method) / len(of_method)
        print(
            f"  took {cells[name]['compile_seconds']} s, about {left / 60:.0f} min left", flush=True
        )


def read_cells() -> dict[str, Cell]:
    return json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {}


# ---- the section ---------------------------------------------------------------------------------


def cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "not compiled"
    gib = f"{cell['peak'] / 2**30:.1f} GiB"
    if not cell["fits"]:
        return f"does not fit: {cell['program']} {gib}"
    numbers = f"{gib}, {cell['step_seconds']:.3g} s, {cell['mfu']:.0%}, {cell['sent'] / 1e9:.0f} GB"
    return numbers + "".join(f"<br>{change}" for change in cell["changes"])


def growth_text(cells: Mapping[str, Cell], model: str, method: str) -> str:
    """Write the growth of the bytes that a chip sends, where both slices take equal settings."""
    found = []
    for small, large in GROWTH:
        a, b = (cells.get(cell_name(model, place, method)) for place in (small, large))
        if a and b and a["fits"] and b["fits"] and a["changes"] == b["changes"]:
            found.append(f"{small.split('-')[0]} x {b['sent'] / a['sent']:.2f}")
    return ", ".join(found)


def render_table(cells: Mapping[str, Cell], method: str) -> str:
    rows = [
        [
            model,
            *(cell_text(cells.get(cell_name(model, place, method))) for place in SLICES),
            growth_text(cells, model, method),
        ]
        for model in MODELS
        if any(cell_name(model, place, method) in cells for place in SLICES)
    ]
    return markdown_table((method.upper(), *SLICES, "16 to 256 chips"), rows)


def commits_text(cells: Mapping[str, Cell]) -> str:
    """Say which code the cells were compiled from."""
    by_commit: dict[str, list[str]] = {}
    for name, cell in cells.items():
        model, _, method = name.split(", ")
        row = f"{method.upper()} of {model}"
        if row not in by_commit.setdefault(cell["commit"], []):
            by_commit[cell["commit"]].append(row)
    most = max(by_commit, key=lambda commit: len(by_commit[commit]), default="")
    parts = [f"{', '.join(rows)} at {c}" for c, rows in by_commit.items() if c != most]
    return f"The cells were compiled at commit {'; '.join([most, *parts])}."


def render_section(cells: Mapping[str, Cell]) -> str:
    limits = {name: cell["limit"] / 2**30 for name, cell in cells.items()}
    usable = {
        chip: next((f"{v:.1f}" for k, v in limits.items() if f", {chip}-" in k), "?")
        for chip in ("v5e", "v6e")
    }
    intro = (
        "Plans of the settings of `configs/cpt7.py` (remat=block, mesh.model=4, prompts of 4,096 "
        "tokens, with an image of 1 megapixel except for Llama) with a fixed batch per chip: "
        "one conversation for SFT; two prompts with eight responses of 1,024 tokens and four "
        "updates for GRPO. A cell says, per chip: the peak of memory "
        f"(of {usable['v5e']} GiB on v5e and {usable['v6e']} GiB on v6e); the least seconds of a "
        "step; the most model FLOPs utilisation; and the bytes that the updates of a step send. "
        "Below are the changes that make the run fit, each tried after the ones before it: one "
        "conversation or prompt per batch shard in a device pass, Adam moments in "
        "bfloat16, weights in bfloat16, LoRA of rank 64; for rollouts `rollout.slots` and int8 "
        "weights; where all of them are not enough, the same again with mesh.model=8. The last "
        "column is the growth of the bytes that a chip sends, where both slices take the same "
        "settings. The numbers are those of the compiler and of "
        f"`cptjax/planning/timeline.py`; nothing was run. {commits_text(cells)}"
    )
    compiled = [m for m in METHODS if any(name.endswith(f", {m}") for name in cells)]
    parts = [intro, *(render_table(cells, method) for method in compiled)]
    if missing := [f"{model} {method}" for model, _, method in missing_cells(cells)]:
        counts = ", ".join(f"{name} {n}" for name, n in collections.Counter(missing).items())
        parts.append(
            f"{len(missing)} of {len(METHODS) * len(MODELS) * len(SLICES)} cells are not compiled, "
            f"or not with mesh.model=8 ({counts}); `python -m tests.readme_plans --compile` compiles them."
        )
    return "\n\n".join(parts) + "\n"


def render_part() -> str:
    return render_section(read_cells())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_missing(int(sys.argv[2]) if sys.argv[2:] else None)
    else:
        print_or_write("plans", render_part)
