"""Responses to train on from another run's rollouts file: matched to the stage's rows, checked, graded or relabelled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cptjax.common import console, files
from cptjax.data.prompts import EncodedExample
from cptjax.tasks.rewards import is_correct
from cptjax.training import rollouts
from cptjax.training.stage_context import StageContext

CORPUS_ANSWERS = ("own", "gold")


RowResponse = tuple[int, int, str]  # source, row, response


def _conversation(ctx: StageContext, source: int, row: int, response: str) -> list[dict[str, Any]]:
    example = ctx.sources[source][row]
    return [
        *ctx.builder.prompted_tasks[example.task].build_prompt(example),
        {"role": "assistant", "content": response},
    ]


def load_corpus(ctx: StageContext) -> list[RowResponse]:
    path, gold = Path(ctx.config.method.corpus), ctx.config.method.corpus_answer == "gold"
    if not path.is_file():
        raise ValueError(
            f"method.corpus={str(path)!r} does not exist; expected the rollouts/*.jsonl of another run"
        )
    rows = _check_keys(files.read_jsonl(path), str(path))
    with console.progress_bar(
        "match the corpus to its rows", total=sum(map(len, ctx.sources))
    ) as bar:
        places = {}
        for s, source in enumerate(ctx.sources):
            for row in range(len(source)):
                places[source[row].id] = (s, row)
                bar.advance()
    lost = [r["id"] for r in rows if r["id"] not in places]
    if lost:
        raise ValueError(
            f"method.corpus={str(path)!r}: {len(lost)} of its ids are not in the stage's data, the first {lost[0]!r}"
        )
    chosen = [(*places[r["id"]], r["response"]) for r in rows]
    pairs = (
        [(s, i, _relabel(ctx, s, i, text)) for s, i, text in chosen]
        if gold
        else _correct_responses(ctx, rows, chosen)
    )
    pairs = list(dict.fromkeys(pairs))
    if not pairs:
        raise ValueError(
            f"method.corpus={str(path)!r}: none of its {len(rows)} answers is correct; there is nothing to learn from"
        )
    console.print_message(f"{path}: {len(pairs)} answers of {len(rows)} to learn from")
    _check_lengths(ctx, pairs)
    return pairs


def _check_lengths(ctx: StageContext, pairs: Sequence[RowResponse]) -> None:
    """Refuse answers that are too long, before the first step."""
    model_ctx, t = ctx.builder.training_ctx, ctx.builder
    with console.progress_bar("measure the corpus", total=len(pairs)) as bar:
        for pair in pairs:
            tokens = model_ctx.processor.measure(_conversation(ctx, *pair))[0]
            if tokens > max(model_ctx.buckets):
                raise ValueError(
                    f"method.corpus={t.method.corpus!r}: {ctx.sources[pair[0]][pair[1]].id} with its answer has {tokens} tokens, over "
                    f"the {max(model_ctx.buckets)} of a prompt and rollout.max_new_tokens={t.sampling.max_new_tokens}: raise that, or drop the row"
                )
            bar.advance()


def _check_keys(rows: Sequence[dict[str, Any]], where: str) -> Sequence[dict[str, Any]]:
    if not rows or {"id", "response"} - rows[0].keys():
        came = "no lines" if not rows else f"the keys {', '.join(rows[0])}"
        raise ValueError(
            f"method.corpus={where!r}: expected lines with id, response and, where known, rewards; got {came}"
        )
    return rows


def _correct_responses(
    ctx: StageContext, rows: Sequence[dict[str, Any]], chosen: Sequence[RowResponse]
) -> list[RowResponse]:
    """The correct answers that came to their end: by the rewards that the file holds, else by the task's own."""
    whole = [i for i, r in enumerate(rows) if r.get("finished") is not False]
    if len(whole) < len(rows):
        console.print_message(
            f"{ctx.config.method.corpus}: {len(rows) - len(whole)} of {len(rows)} answers met their length limit and are left out"
        )
    rows, chosen = [rows[i] for i in whole], [chosen[i] for i in whole]
    known = [
        r.get("rewards") or ({"reward": r["reward"]} if r.get("reward") is not None else None)
        for r in rows
    ]
    todo = [i for i, parts in enumerate(known) if parts is None]
    items = [EncodedExample(ctx.sources[chosen[i][0]][chosen[i][1]], None) for i in todo]
    for i, parts in zip(
        todo,
        rollouts.grade_responses(ctx.builder, items, [chosen[i][2] for i in todo]) if todo else [],
        strict=True,
    ):
        known[i] = parts
    return [pair for pair, parts in zip(chosen, known, strict=True) if is_correct(parts)]


def _relabel(ctx: StageContext, source: int, row: int, response: str) -> str:
    """A response up to its answer, and then the correct one; without an answer of the template's form it stays whole before it."""
    example = ctx.sources[source][row]
    form = ctx.builder.prompted_tasks[example.task].template
    opening = {"boxed": "\\boxed{", "answer_tag": "<answer>"}.get(form.extract)
    if opening is None:
        raise ValueError(
            f"method.corpus_answer='gold' needs a boxed or tagged answer, which template {form.name!r} does not ask for"
        )
    closing = {"boxed": "}", "answer_tag": "</answer>"}[form.extract]
    before = (
        response[: response.rfind(opening)] if opening in response else f"{response.rstrip()}\n"
    )
    return f"{before}{opening}{example.answer}{closing}"
