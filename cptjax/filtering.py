"""The offline filter before a stage (RIF-RFT): K answers a prompt, keep the prompts inside a window of success counts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cptjax import console, filters, lessons, metrics, multihost
from cptjax.batches import pieces
from cptjax.classroom import prepare
from cptjax.drafts import Drafts
from cptjax.lessons import Spent, Tutor
from cptjax.settings import Stage
from cptjax.tasks.validate import Chosen
from cptjax.types import Example


def kept(current: Any, which: Stage, tutor: Tutor, sources: Sequence[Sequence[Example]]) -> list[Sequence[Example]]:
    """The examples that stay; judged once, and read back by a resumed run."""
    out = []
    for name, examples in zip(which.tasks, sources, strict=True):
        path = file_of(current.workdir, which, name)
        drafts = Drafts(path, which, tutor.rt.mesh)
        if not drafts.made():
            rows, spent = judged(current, which, tutor, name, examples, drafts)
            if multihost.first():
                lessons.write_cost(path, spent, drafts.mark, drafts.seconds)
                metrics.write_text(path, "".join(metrics.json.dumps(r) + "\n" for r in rows))
        multihost.gather(True)  # nobody reads before it is written
        drafts.clear()
        rows = metrics.read_lines(path)
        tell(current, which, name, rows, path)
        out.append(Chosen(examples, [r["row"] for r in rows if r["kept"]]))
    return out


def file_of(workdir: Path, which: Stage, name: str) -> Path:
    return workdir / "filters" / f"stage{which.number}_{name}.jsonl"


def judged(
    current: Any, which: Stage, tutor: Tutor, name: str, examples: Sequence[Example], drafts: Drafts
) -> tuple[list[dict[str, Any]], Spent]:  # fmt: skip
    """A line for every example: how often it was solved, where that was counted, and whether it stays."""
    window, seed = dict(which.config.method.filter), current.config.seed
    like = window.pop("like", "")
    lines = [{"row": i, "id": examples[i].id} for i in range(len(examples))]
    if like:
        keep = filters.random_control(len(lines), as_many(Path(like), which, name, len(lines)), seed)
        return [line | {"kept": k} for line, k in zip(lines, keep.tolist(), strict=True)], Spent()
    correct, spent = counts(current, which, tutor, name, examples, window["samples"], drafts)
    found = zip(lines, correct.tolist(), filters.offline(correct, seed=seed, **window).tolist(), strict=True)
    return [line | {"correct": n, "samples": window["samples"], "kept": k} for line, n, k in found], spent


def as_many(folder: Path, which: Stage, name: str, prompts: int) -> int:
    """How many prompts the filter of another run kept of this stage's task."""
    path = file_of(folder, which, name)
    rows = metrics.read_lines(path)
    if len(rows) != prompts:
        came = f"has {len(rows)} prompts" if rows else "is not there or empty"
        raise ValueError(f"method.filter.like: {path} {came}; expected the {prompts} prompts of the same stage in a run with a filter")
    return sum(r["kept"] for r in rows)


def tell(current: Any, which: Stage, name: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """What the filter did to a task: on the console and, once, in metrics.jsonl."""
    window, stay = which.config.method.filter, sum(r["kept"] for r in rows)
    shares = {"filter/kept": stay / len(rows)}
    if "correct" in rows[0]:
        shares["filter/never"] = sum(r["correct"] == 0 for r in rows) / len(rows)
        shares["filter/always"] = sum(r["correct"] == r["samples"] for r in rows) / len(rows)
    said = ", ".join(f"{share:.0%} {key.removeprefix('filter/')}" for key, share in shares.items())
    console.say(f"filter {window['name']} on {name}: {stay} of {len(rows)} prompts stay ({said})")
    if current.log and current.entering:
        spent, seconds = lessons.read_cost(path)
        cost = spent.logged() | {"seconds": seconds}
        current.log.step(which.number, 0, {"event": "filter", "task": name, "filter/rows": stay, **shares, **cost})


def counts(
    current: Any, which: Stage, tutor: Tutor, name: str, examples: Sequence[Example], samples: int, drafts: Drafts
) -> tuple[np.ndarray, Spent]:
    """How many of K answers of the current model are right, for every example; each process answers its share."""
    build = prepare(tutor.rt, tutor.courses, False, max(tutor.rt.ladder))
    share = -(-len(examples) // jax.process_count())
    mine = [min(i, len(examples) - 1) for i in range(jax.process_index() * share, (jax.process_index() + 1) * share)]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(current.config.seed), which.number), 2**30)
    found: list[int] = []
    spent = Spent()
    with console.progress(f"filter {name}: {samples} answers a prompt", total=len(mine)) as bar:
        for p in pieces(len(mine), tutor.batch // jax.process_count()):
            items = [build(examples[i]) for i in mine[p]]
            right, cost = lessons.own_answers(tutor, current.params, items, samples, key, bar, drafts, unfinished=True)
            spent += cost
            found += np.bincount([i for i, _ in right], minlength=len(items)).tolist()
    everyone = multihost.gather(dict(zip(mine, found, strict=True)))
    by_row = {i: n for part in everyone for i, n in part.items()}
    return np.array([by_row[i] for i in range(len(examples))]), sum(multihost.gather(spent), Spent())
