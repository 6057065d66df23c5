"""Countdown: reach a target from given numbers with + - * /, each number used exactly once.

Training has 10,000 and testing 1,000 rows of Countdown-Tasks-3to4. With `paper_c` the targets are
0 to 99, an expression needs no box, and the prompt asks to reason; paper C's own puzzles and its
question are not public. `synthetic=True` generates puzzles instead, without a download.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from cptjax.tasks import hub
from cptjax.tasks.scoring.retain_answers import LARGEST_TARGET
from cptjax.tasks.synthetic.random_streams import hash_key
from cptjax.tasks.task import Examples, Task, user_turn
from cptjax.types import Example

DATASET = "Jiayi-Pan/Countdown-Tasks-3to4"
SOURCES = {
    "train": hub.HubSource(DATASET, "train", part=(0.0, 0.9), most=10_000),
    "test": hub.HubSource(DATASET, "train", part=(0.9, 1.0), most=1_000),
}


def has_small_target(rows: hub.ArrowRows) -> np.ndarray:
    """Return a mask of the rows whose target is in paper C's range."""
    targets = np.array(rows.column("target").to_pylist())
    return (targets >= 0) & (targets <= LARGEST_TARGET)


PAPER_C_SOURCES = {
    split: dataclasses.replace(source, keep=has_small_target) for split, source in SOURCES.items()
}
INSTRUCTION = "The final answer is the expression alone."
PAPER_C_INSTRUCTION = (
    "Reason about it, and put the final expression, without an equals sign, in \\boxed{}."
)
PUZZLE_COUNTS = {"train": 10_000, "validation": 500, "test": 1_000}
QUESTION = (
    "Use the numbers {numbers} to make an expression that equals {target}. "
    "You may use +, -, *, / and brackets, and every number exactly once."
)


def build_example(row: dict[str, Any]) -> Example:
    numbers, target = [int(n) for n in row["nums"]], int(row["target"])
    question = QUESTION.format(numbers=", ".join(map(str, numbers)), target=target)
    return Example(
        "", user_turn(question), target, row.get("expression", ""), meta={"nums": numbers}
    )


def make_puzzle(split: str, seed: int, index: int, count: int, largest: int) -> dict[str, Any]:
    """Generate a solvable puzzle.

    The sum of its numbers modulo 3 decides the split, so that no puzzle is in two splits.
    """
    rng = np.random.default_rng([int(hash_key("countdown", split, seed)), index])
    while True:
        numbers = [int(n) for n in rng.integers(1, largest + 1, count)]
        value, expression = numbers[0], str(numbers[0])
        for number in numbers[1:]:
            value, expression = _extend_expression(rng, value, expression, number)
        if 0 < value <= 10 * largest and sum(numbers) % 3 == ("train", "validation", "test").index(
            split
        ):
            return {
                "nums": [numbers[i] for i in rng.permutation(count)],
                "target": value,
                "expression": expression,
            }


def _extend_expression(
    rng: np.random.Generator, value: int, expression: str, number: int
) -> tuple[int, str]:
    """Append one operation whose result is a whole number."""
    wrapped = f"({expression})" if any(sign in expression for sign in "+-") else expression
    choices = [
        (value + number, f"{expression} + {number}"),
        (value - number, f"{expression} - {number}"),
        (value * number, f"{wrapped} * {number}"),
    ]
    if value % number == 0:
        choices.append((value // number, f"{wrapped} / {number}"))
    return choices[rng.integers(len(choices))]


def load_generated_split(
    name: str,
    count: int,
    largest: int,
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Examples:
    hub.pick_source(name, PUZZLE_COUNTS, split)
    size = PUZZLE_COUNTS[split] if limit is None else limit
    return Examples(
        name, split, range(size), functools.partial(_build_generated, split, seed, count, largest)
    )


def _build_generated(split: str, seed: int, count: int, largest: int, index: int) -> Example:
    return build_example(make_puzzle(split, seed, index, count, largest))


def make_task(
    name: str = "countdown",
    synthetic: bool = False,
    paper_c: bool = False,
    count: int = 3,
    largest: int = 20,
    **fields: Any,
) -> Task:
    """Return the task.

    Synthetic puzzles have `count` numbers from 1 to `largest`; their SFT target is a solution.
    """
    sources = PAPER_C_SOURCES if paper_c else SOURCES
    load = (
        functools.partial(load_generated_split, name, count, largest)
        if synthetic
        else functools.partial(hub.load_hub_split, name, sources, build_example)
    )
    own = {"scorer": "countdown", "answer_instruction": INSTRUCTION}
    if paper_c:
        own = {
            "scorer": "retain_countdown",
            "answer_instruction": PAPER_C_INSTRUCTION,
            "template": "none",
        }
    return Task(name, load, **{**own, **fields})
