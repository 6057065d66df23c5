"""Load the responses of a corpus file as training data: provenance, match, check, grade.

A corpus is a jsonl file with a line per response: its `id` (of the task's row), `response`, and
where known `rewards` and `finished`. It is the rollouts/*.jsonl of a run, or has its provenance in
FILE.source.json beside FILE.jsonl, where launch/generate.py writes it.

Equal responses to a row are trained on once: lines that repeat a response are dropped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cptjax.common import console, files
from cptjax.data.model_context import ModelContext
from cptjax.data.prompts import EncodedExample
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.tasks.rewards import is_correct
from cptjax.training import rollouts
from cptjax.types import Example

CORPUS_ANSWERS = ("own", "gold")

CORPUS_SOURCES = ("corpus", "gold+corpus")  # values of method.source that read a corpus


class RowResponse(NamedTuple):
    """A response to a row of a stage's data."""

    source: int
    row: int
    text: str
    gold: bool = False  # the row's gold answer, in a mixture with a corpus


PromptedTasks = Mapping[str, PromptedTask]


def load_corpus(
    method: Any,
    sources: Sequence[Sequence[Example]],
    prompted_tasks: PromptedTasks,
    model_ctx: ModelContext,
) -> list[RowResponse]:
    """Load the responses in `method.corpus` to the rows of a stage.

    `model_ctx` must be the one for prompts with their responses.
    """
    path = Path(method.corpus)
    lines = read_corpus_lines(path, "method.corpus")
    find_provenance(path, "method.corpus")
    places = {}
    with console.progress_bar("match the corpus to its rows", total=sum(map(len, sources))) as bar:
        for s, source in enumerate(sources):
            for row in range(len(source)):
                places[source[row].id] = (s, row)
                bar.advance()
    unknown = [line["id"] for line in lines if line["id"] not in places]
    if unknown:
        raise ValueError(
            f"method.corpus={str(path)!r}: {len(unknown)} of its ids are not in the stage's data, "
            f"the first is {unknown[0]!r}"
        )
    responses = [RowResponse(*places[line["id"]], line["response"]) for line in lines]
    if method.corpus_answer == "gold":
        pairs = [
            RowResponse(s, row, _put_gold_answer(prompted_tasks, sources[s][row], text))
            for s, row, text, _ in responses
        ]
    else:
        pairs = _correct_responses(path, lines, responses, sources, prompted_tasks)
    pairs, reserved_tokens = list(dict.fromkeys(pairs)), model_ctx.processor.reserved
    usable = [pair for pair in pairs if not reserved_tokens.search(pair.text)]
    if reserved := len(pairs) - len(usable):
        console.print_message(f"{path}: {reserved} responses spell a special token: left out")
    pairs = usable
    if not pairs:
        raise ValueError(
            f"method.corpus={str(path)!r}: none of its {len(lines)} responses is correct; "
            "there is nothing to train on"
        )
    console.print_message(f"{path}: {len(pairs)} of {len(lines)} responses to train on")
    _check_lengths(path, pairs, sources, prompted_tasks, model_ctx)
    return pairs


def read_corpus_lines(path: Path, setting: str) -> list[dict[str, Any]]:
    """Read a corpus; refuse a file that is missing or has no responses."""
    if not path.is_file():
        raise ValueError(
            f"{setting}={str(path)!r} does not exist; "
            "expected the rollouts/*.jsonl of another run, or a file of launch/generate.py"
        )
    lines = files.read_jsonl(path)
    wrong = next((line for line in lines if not _is_response(line)), None)
    if not lines or wrong is not None:
        got = "no lines" if wrong is None else f"{str(wrong):.200}"
        raise ValueError(
            f"{setting}={str(path)!r}: expected lines with id, response (texts) and, where known, "
            f"rewards (numbers by name) and reward (a number); got {got}"
        )
    return lines


def _is_response(line: dict[str, Any]) -> bool:
    """Return whether a line of a corpus has the keys that are needed, with values of their kind."""
    rewards = line.get("rewards") or {}
    numbers = [*rewards.values(), line.get("reward") or 0] if isinstance(rewards, dict) else [""]
    return all(isinstance(line.get(key), str) for key in ("id", "response")) and all(
        isinstance(number, int | float) for number in numbers
    )


def provenance_path(path: Path) -> Path:
    """Return where the provenance of a corpus stands."""
    return path.with_suffix(".source.json")


def find_provenance(path: Path, setting: str) -> dict[str, Any]:
    """Return what a corpus was made of; refuse one of unknown origin."""
    source, run = provenance_path(path), path.absolute().parent.parent
    if source.is_file():
        return files.read_json(source, dict)
    if path.absolute().parent.name == "rollouts" and (run / "config.json").is_file():
        return {"run": str(run)}
    raise ValueError(
        f"{setting}={str(path)!r} has no provenance: expected {source.name} beside it, which "
        "launch/generate.py writes, or the rollouts/ folder of a run; for a file of your own "
        f'write {{"model": "..."}} to {source.name}'
    )


def count_correct_responses(file: str, ids: Sequence[str], samples: int) -> np.ndarray:
    """Count for each row how many of the first `samples` responses of a graded corpus are right."""
    path, setting = Path(file), "method.filter.corpus"
    lines = read_corpus_lines(path, setting)
    find_provenance(path, setting)
    correct: dict[str, list[bool]] = {}
    for line in lines:
        if not line.get("rewards"):
            raise ValueError(f"{setting}={file!r}: {line['id']!r} has a response without rewards")
        correct.setdefault(line["id"], []).append(is_correct(line["rewards"]))
    few = [row for row in ids if len(correct.get(row, ())) < samples]
    if few:
        raise ValueError(
            f"{setting}={file!r}: expected {samples} responses to each row, got "
            f"{len(correct.get(few[0], ()))} to {few[0]!r} ({len(few)} rows have too few)"
        )
    return np.array([sum(correct[row][:samples]) for row in ids])


def _correct_responses(
    path: Path,
    lines: Sequence[dict[str, Any]],
    responses: Sequence[RowResponse],
    sources: Sequence[Sequence[Example]],
    prompted_tasks: PromptedTasks,
) -> list[RowResponse]:
    """Return the correct responses that ended before the length limit.

    The rewards in the file decide; responses without them are graded by the task's reward.
    """
    finished = [i for i, line in enumerate(lines) if line.get("finished") is not False]
    if len(finished) < len(lines):
        console.print_message(
            f"{path}: {len(lines) - len(finished)} of {len(lines)} responses reached the length "
            "limit and are left out"
        )
    rewards: dict[int, dict[str, float]] = {}
    ungraded = []
    for i in finished:
        if lines[i].get("rewards"):
            rewards[i] = lines[i]["rewards"]
        elif lines[i].get("reward") is not None:
            rewards[i] = {"reward": lines[i]["reward"]}
        else:
            ungraded.append(i)
    if ungraded:
        places = [responses[i] for i in ungraded]
        items = [EncodedExample(sources[place.source][place.row], None) for place in places]
        texts = [place.text for place in places]
        graded = rollouts.grade_responses(prompted_tasks, items, texts)
        rewards |= dict(zip(ungraded, graded, strict=True))
    return [responses[i] for i in finished if is_correct(rewards[i])]


def _put_gold_answer(prompted_tasks: PromptedTasks, example: Example, response: str) -> str:
    """Replace the answer of a response by the gold answer, or append it if there is none."""
    template = prompted_tasks[example.task].template
    opening = {"boxed": "\\boxed{", "answer_tag": "<answer>"}.get(template.extract)
    if opening is None:
        raise ValueError(
            "method.corpus_answer='gold' needs a boxed or tagged answer, which template "
            f"{template.name!r} does not ask for"
        )
    closing = {"boxed": "}", "answer_tag": "</answer>"}[template.extract]
    before = f"{response.rstrip()}\n"
    if opening in response:
        before = response[: response.rfind(opening)]
    if not example.target:
        raise ValueError(f"method.corpus_answer='gold': {example.id} has no gold answer to insert")
    return f"{before}{opening}{example.target}{closing}"


def _check_lengths(
    path: Path,
    pairs: Sequence[RowResponse],
    sources: Sequence[Sequence[Example]],
    prompted_tasks: PromptedTasks,
    model_ctx: ModelContext,
) -> None:
    """Refuse responses that are too long, before the first step."""
    limit = max(model_ctx.buckets)
    with console.progress_bar("measure the corpus", total=len(pairs)) as bar:
        for source, row, response, _ in pairs:
            example = sources[source][row]
            prompt = prompted_tasks[example.task].build_prompt(example)
            conversation = [*prompt, {"role": "assistant", "content": response}]
            tokens = model_ctx.processor.measure(conversation)[0]
            if tokens > limit:
                raise ValueError(
                    f"method.corpus={str(path)!r}: {example.id} with its response has {tokens} "
                    f"tokens, over the {limit} of a prompt and rollout.max_new_tokens: "
                    "raise rollout.max_new_tokens, or remove the row"
                )
            bar.advance()
