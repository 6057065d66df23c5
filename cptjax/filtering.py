"""The offline filter before a stage (RIF-RFT): K answers a prompt, keep the prompts inside a window of success counts."""

from collections.abc import Sequence
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
    """The examples that stay; counted once, and read back by a resumed run."""
    window = dict(which.config.method.filter)
    samples = window["samples"]
    bounds = dict(name=window["name"], samples=samples, lo=window.get("lo", 1), hi=window.get("hi", samples))
    out = []
    for name, examples in zip(which.tasks, sources, strict=True):
        path = current.workdir / "filters" / f"stage{which.number}_{name}.jsonl"
        drafts = Drafts(path, which, tutor.rt.mesh)
        if not drafts.made():
            correct, spent = counts(current, which, tutor, name, examples, samples, drafts)
            if multihost.first():
                rows = [{"row": i, "id": examples[i].id, "correct": int(n), "samples": samples} for i, n in enumerate(correct)]
                lessons.write_cost(path, spent, drafts.mark, drafts.seconds)
                metrics.write_text(path, "".join(metrics.json.dumps(r) + "\n" for r in rows))
        multihost.gather(True)  # nobody reads before it is written
        drafts.clear()
        correct = np.array([r["correct"] for r in metrics.read_lines(path)])
        keep, report = filters.offline(correct, seed=current.config.seed, **bounds)
        console.say(f"filter {report.name} on {name}: kept {report.kept} of {report.prompts} prompts ({report.fraction:.0%}), "
                    f"{report.never} never solved, {report.always} always")  # fmt: skip
        if current.log and current.entering:
            shares = {"filter/kept": report.fraction, "filter/never": report.never / report.prompts}
            shares["filter/always"] = report.always / report.prompts
            spent, seconds = lessons.read_cost(path)
            cost = spent.logged() | {"seconds": seconds}
            current.log.step(which.number, 0, {"event": "filter", "task": name, "filter/rows": report.kept, **shares, **cost})
        out.append(Chosen(examples, np.flatnonzero(keep).tolist()))
    return out


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
