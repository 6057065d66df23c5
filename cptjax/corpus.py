"""Answers to imitate that are not in the data: the policy's own correct ones, drawn by windows of steps, or another run's.

A window's answers are written to corpus/stage{K}_step{start}.jsonl before they are used, so that a resumed run learns from the same;
beside them lies what drawing them cost (.cost.json) and where they came from (.source.json).
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from cptjax import console, lessons, metrics, multihost
from cptjax.batches import pieces
from cptjax.classroom import Classroom
from cptjax.drafts import Drafts
from cptjax.lessons import Item, Spent, correct
from cptjax.order import Place, passed, permutation, pick
from cptjax.types import Params

ANSWERS = ("own", "gold")
Pair = tuple[int, int, str]  # source, row, response


def own_items(room: Classroom, params: Params, step: int) -> tuple[list[Item], Spent]:
    """Rows of a window's corpus for this step; the corpus is drawn when its window begins."""
    t, window = room.tutor, _window(room)
    start = step // window * window
    pairs, spent = _corpus_of(room, params, start, min(window, room.steps - start))
    spent = spent if step == start else Spent()
    rows = _rows(room, pairs, start, step)
    mine = rows[pieces(len(rows), t.batch // jax.process_count())[jax.process_index()]]
    return _answered(room, mine), spent


def _rows(room: Classroom, pairs: list[Pair], start: int, step: int) -> list[Pair]:
    """The step's answers: every position takes the next one of its lane, lap after lap in an order of the seed, so shares stay exact."""
    order, batch = room.order, room.tutor.batch
    lists = [[p for p in pairs if p[0] in lane.sources] for lane in order.lanes]
    if step == start and not all(lists):
        empty = [room.sources[lane.sources[0]][0].task for lane, own in zip(order.lanes, lists, strict=True) if not own]
        console.warn(f"stage {room.stage.number}: no correct answer in the lane of {', '.join(empty)}; until step {start + _window(room)} "
                     "others take its rows: raise method.self_samples, or the steps of method.refresh")  # fmt: skip
    lists, before = [own or pairs for own in lists], passed(start * batch, order.parts)
    found = []
    for n in range(step * batch, (step + 1) * batch):
        lane, k = pick(n, order.parts)
        lap, at = divmod(k - before[lane], len(lists[lane]))
        found.append(lists[lane][permutation(len(lists[lane]), (room.seed, room.stage.number, start, lane, lap))[at]])
    return found


def _window(room: Classroom) -> int:
    """Steps that learn from the same answers."""
    m = room.config.method
    return {"never": room.steps, "epoch": room.order.steps(1)}.get(m.refresh) or int(m.refresh) if m.source == "self" else room.steps


def draws(room: Classroom, step: int) -> bool:
    """Whether the policy must answer before this step can learn."""
    return room.config.method.source == "self" and step % _window(room) == 0


def _conversation(room: Classroom, source: int, row: int, response: str) -> list[dict[str, Any]]:
    example = room.sources[source][row]
    return [*room.tutor.courses[example.task].messages(example), {"role": "assistant", "content": response}]


def _answered(room: Classroom, pairs: Sequence[Pair]) -> list[Item]:
    rt = room.tutor.learned
    prompts = room.prompts([Place(source, row, 0) for source, row, _ in pairs])
    answered = lambda prompt, text: rt.processor.answered(prompt.encoded, text, limit=max(rt.ladder))
    return [Item(p.example, answered(p, text), row) for p, (_, row, text) in zip(prompts, pairs, strict=True)]


@functools.lru_cache(maxsize=2)
def _read(path: Path) -> list[Pair]:
    return [(r["source"], r["row"], r["response"]) for r in metrics.read_lines(path)]


def _corpus_of(room: Classroom, params: Params, start: int, steps: int) -> tuple[list[Pair], Spent]:
    """A window's answers, and what drawing them cost; drawn now, or found as a killed run left them."""
    path = room.workdir / "corpus" / f"stage{room.stage.number}_step{start}.jsonl"
    drafts = Drafts(path, room.stage, room.tutor.rt.mesh, room.stopping)
    if not drafts.made():
        foreign = room.config.method.source == "corpus"
        pairs, spent = (_foreign(room), Spent()) if foreign else _own(room, params, start, steps, drafts)
        total = sum(multihost.gather(spent), Spent())
        if multihost.first():
            lessons.write_cost(path, total, drafts.mark)
            metrics.write_json(path.with_suffix(".source.json"), _origin(room, start) | {"answers": len(pairs)})
            lines = [{"source": s, "row": r, "id": room.sources[s][r].id, "response": text} for s, r, text in pairs]
            metrics.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        multihost.gather(True)  # nobody reads before it is written
        drafts.clear()
        _read.cache_clear()
    # the file tells the cost of all processes, and a step adds up its processes' costs
    return _read(path), lessons.read_cost(path)[0] if multihost.first() else Spent()


def _origin(room: Classroom, start: int) -> dict[str, Any]:
    """Where a window's answers come from: a file, or the policy after so many steps of a stage."""
    m = room.config.method
    if m.source == "self":
        return {"policy": {"stage": room.stage.number, "step": start}}
    text = Path(m.corpus).read_bytes()
    return {"corpus": str(Path(m.corpus).resolve()), "sha256": hashlib.sha256(text).hexdigest(), "rows": text.count(b"\n")}


def _own(room: Classroom, params: Params, start: int, steps: int, drafts: Drafts) -> tuple[list[Pair], Spent]:
    t, count = room.tutor, jax.process_count()
    places = dict.fromkeys((p.source, p.index) for step in range(start, start + steps) for p in room.order.rows(step))
    mine = list(places)[jax.process_index() :: count]
    mine += mine[-1:] * (-(-len(places) // count) - len(mine))
    with console.progress(f"own answers, stage {room.stage.number}", total=len(mine)) as bar:
        items = room.prompts([Place(*at, 0) for at in mine])
        right, spent = lessons.own_answers(t, params, items, room.config.method.self_samples, room.key(start), bar, drafts)
    ends = lambda i, text: len(items[i].encoded) + len(t.rt.processor.ids(text)) + 2  # tokens, with the end of the turn and of its line
    found = multihost.together(multihost.gather([(*mine[i], text, ends(i, text)) for i, text in right]))
    pairs = sorted({(*at, text) for *at, text, end in found if end <= max(t.learned.ladder)})
    if not pairs:
        raise ValueError(f"none of the policy's own answers to {len(places)} prompts is correct; there is nothing to learn from")
    lost = sum(end > max(t.learned.ladder) for *_, end in found)  # read again, a text may have other tokens than when it was sampled
    more = f"; {lost} more were too long when read again" if lost else ""
    console.say(f"stage {room.stage.number}: {len(pairs)} correct own answers to {len(places)} prompts{more}")
    return pairs, spent


def _foreign(room: Classroom) -> list[Pair]:
    path, gold = Path(room.config.method.corpus), room.config.method.corpus_answer == "gold"
    if not path.is_file():
        raise ValueError(f"method.corpus={str(path)!r} does not exist; expected the rollouts/*.jsonl of another run")
    rows = _checked(metrics.read_lines(path), str(path))
    with console.progress("match the corpus to its rows", total=sum(map(len, room.sources))) as bar:
        places = {}
        for s, source in enumerate(room.sources):
            for row in range(len(source)):
                places[source[row].id] = (s, row)
                bar.advance()
    lost = [r["id"] for r in rows if r["id"] not in places]
    if lost:
        raise ValueError(f"method.corpus={str(path)!r}: {len(lost)} of its ids are not in the stage's data, the first {lost[0]!r}")
    chosen = [(*places[r["id"]], r["response"]) for r in rows]
    pairs = [(s, i, _relabelled(room, s, i, text)) for s, i, text in chosen] if gold else _right(room, rows, chosen)
    pairs = list(dict.fromkeys(pairs))
    if not pairs:
        raise ValueError(f"method.corpus={str(path)!r}: none of its {len(rows)} answers is correct; there is nothing to learn from")
    console.say(f"{path}: {len(pairs)} answers of {len(rows)} to learn from")
    _measured(room, pairs)
    return pairs


def _measured(room: Classroom, pairs: Sequence[Pair]) -> None:
    """Refuse answers that are too long, before the first step."""
    rt, t = room.tutor.learned, room.tutor
    with console.progress("measure the corpus", total=len(pairs)) as bar:
        for pair in pairs:
            tokens = rt.processor.measure(_conversation(room, *pair))[0]
            if tokens > max(rt.ladder):
                raise ValueError(
                    f"method.corpus={t.settings.corpus!r}: {room.sources[pair[0]][pair[1]].id} with its answer has {tokens} tokens, over "
                    f"the {max(rt.ladder)} of a prompt and rollout.max_new_tokens={t.sampling.max_new_tokens}: raise that, or drop the row"
                )
            bar.advance()


def _checked(rows: Sequence[dict[str, Any]], where: str) -> Sequence[dict[str, Any]]:
    if not rows or {"id", "response"} - rows[0].keys():
        came = "no lines" if not rows else f"the keys {', '.join(rows[0])}"
        raise ValueError(f"method.corpus={where!r}: expected lines with id, response and, where known, rewards; got {came}")
    return rows


def _right(room: Classroom, rows: Sequence[dict[str, Any]], chosen: Sequence[Pair]) -> list[Pair]:
    """The correct answers that came to their end: by the rewards that the file holds, else by the task's own."""
    whole = [i for i, r in enumerate(rows) if r.get("finished") is not False]
    if len(whole) < len(rows):
        console.say(f"{room.config.method.corpus}: {len(rows) - len(whole)} of {len(rows)} answers met their length limit and are left out")
    rows, chosen = [rows[i] for i in whole], [chosen[i] for i in whole]
    known = [r.get("rewards") or ({"reward": r["reward"]} if r.get("reward") is not None else None) for r in rows]
    todo = [i for i, parts in enumerate(known) if parts is None]
    items = [Item(room.sources[chosen[i][0]][chosen[i][1]], None) for i in todo]
    for i, parts in zip(todo, lessons.grade(room.tutor, items, [chosen[i][2] for i in todo]) if todo else [], strict=True):
        known[i] = parts
    return [pair for pair, parts in zip(chosen, known, strict=True) if correct(parts)]


def _relabelled(room: Classroom, source: int, row: int, response: str) -> str:
    """A response up to its answer, and then the correct one; without an answer of the template's form it stays whole before it."""
    example = room.sources[source][row]
    form = room.tutor.courses[example.task].template
    opening = {"boxed": "\\boxed{", "answer_tag": "<answer>"}.get(form.extract)
    if opening is None:
        raise ValueError(f"method.corpus_answer='gold' needs a boxed or tagged answer, which template {form.name!r} does not ask for")
    closing = {"boxed": "}", "answer_tag": "</answer>"}[form.extract]
    before = response[: response.rfind(opening)] if opening in response else f"{response.rstrip()}\n"
    return f"{before}{opening}{example.answer}{closing}"
