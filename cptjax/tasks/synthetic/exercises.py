"""Short text exercises that a program can check, generated from a seed without any download.

    owner           Anna has the map and Tom has the key. Who has the key?
    odd             Which of these is not an animal: pear, horse, lion?
    larger          Which number is larger, 73 or 66?
    json            Write as JSON with the keys name and city: Anna lives in Rome.
    instructions    Write one sentence about rain without commas.

The first three name their options; a response is right if it names the answer and no other option.
JSON must be alone. The instructions have IFEval's constraints and no gold answer. A hash of the
question decides which split it is in, so no question is in two splits.

`style` is the form of the gold responses: "bare" is the answer alone, "chat" a sentence (or
indented JSON) like those of an instruction-tuned model.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cptjax.tasks.synthetic.random_streams import hash_key
from cptjax.tasks.task import Examples, Task, did_you_mean, user_turn
from cptjax.types import Example

SIZES = {"train": 10_000, "validation": 500, "test": 500}  # without a limit
STYLES = ("bare", "chat")
NAMES = """Adam Alice Anna Ben Carol Clara Daniel David Ella Emma Eric Frank Grace Helen Henry Ivan
Jack Jane Julia Kevin Laura Leo Lucy Maria Mark Martin Nina Oscar Paul Paula Peter Robert Rose Ruth
Sam Sarah Simon Sophie Tom Victor""".split()
THINGS = """apple bag ball bell book bottle bowl box brush camera candle card chain clock coat coin
cup drum flag flute glove guitar hammer hat key kite knife lamp letter map mirror pen pencil phone
plate ring rope shoe spoon ticket""".split()
CITIES = """Athens Berlin Boston Cairo Chicago Dublin Lima Lisbon London Madrid Miami Milan Moscow
Oslo Paris Prague Rome Seoul Sydney Tokyo Toronto Vienna""".split()
JOBS = """actor artist baker doctor driver farmer lawyer nurse painter pilot plumber singer teacher
waiter writer""".split()
CATEGORIES = {
    "an animal": "bear cat cow dog fox goat horse lion monkey mouse pig rabbit sheep tiger wolf",
    "a fruit": "apple banana cherry grape lemon mango melon orange peach pear plum strawberry",
    "a vehicle": "bicycle boat bus car ferry helicopter motorcycle plane ship taxi train truck van",
    "a tool": "axe chisel drill hammer hoe pliers rake saw screwdriver shovel spade wrench",
    "clothing": "blouse coat dress glove hat jacket scarf shirt shoe skirt sock sweater",
    "furniture": "armchair bed bench bookcase cabinet chair couch desk drawer sofa stool table",
}
TOPICS = """autumn bees birds books bread bridges castles cats clouds coffee dogs farms fish
flowers forests friends gardens horses islands lakes libraries markets milk mountains music oceans
rain rivers roads schools ships snow spring stars storms summer tea trains trees winter""".split()
KEYWORDS = """always blue bright cold dark gentle green happy important large light morning often
people quiet small strong warm water world""".split()


@dataclasses.dataclass(frozen=True)
class Exercise:
    """A question with its gold answer, and the answer in the form of a chat."""

    question: str
    answer: Any
    chat: str = ""
    options: tuple[str, ...] = ()


def _choose(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    return [words[i] for i in rng.choice(len(words), count, replace=False)]


def _owner(rng: np.random.Generator) -> Exercise:
    names, things, k = _choose(rng, NAMES, 2), _choose(rng, THINGS, 2), rng.integers(2)
    facts = [f"{name} has the {thing}" for name, thing in zip(names, things, strict=True)]
    question = f"{' and '.join(facts)}. Who has the {things[k]}?"
    return Exercise(question, names[k], f"{facts[k]}.", tuple(names))


def _odd(rng: np.random.Generator) -> Exercise:
    category, other = _choose(rng, list(CATEGORIES), 2)
    (odd,) = _choose(rng, CATEGORIES[other].split(), 1)
    words = [*_choose(rng, CATEGORIES[category].split(), 2), odd]
    options = tuple(_choose(rng, words, 3))
    question = f"Which of these is not {category}: {', '.join(options)}?"
    return Exercise(question, odd, f"{odd.capitalize()} is not {category}.", options)


def _larger(rng: np.random.Generator) -> Exercise:
    a, b = (str(n) for n in rng.choice(np.arange(10, 100), 2, replace=False))
    larger = max(a, b)
    return Exercise(
        f"Which number is larger, {a} or {b}?", larger, f"The larger number is {larger}.", (a, b)
    )


def _json(rng: np.random.Generator) -> Exercise:
    (name,), (city,), (job,) = (_choose(rng, words, 1) for words in (NAMES, CITIES, JOBS))
    age, kind = int(rng.integers(18, 80)), rng.integers(3)
    key, value, fact = (
        ("city", city, f"lives in {city}"),
        ("job", job, f"works as a {job}"),
        ("age", age, f"is {age} years old"),
    )[kind]
    record = {"name": name, key: value}
    return Exercise(
        f"Write as JSON with the keys name and {key}: {name} {fact}.",
        json.dumps(record),
        json.dumps(record, indent=2),
    )


def _instructions(rng: np.random.Generator) -> Exercise:
    (topic,), (word,), n = _choose(rng, TOPICS, 1), _choose(rng, KEYWORDS, 1), rng.integers(8, 15)
    existence, length = "keywords:existence", "length_constraints:number_words"
    question, constraint = (
        (f'Write a sentence with the word "{word}".', {"id": existence, "keywords": [word]}),
        (
            f'Write a sentence with the words "{topic}" and "{word}".',
            {"id": existence, "keywords": [topic, word]},
        ),
        (f"Write one sentence about {topic} without commas.", {"id": "punctuation:no_comma"}),
        (
            f"Write a short sentence of less than {n} words about {topic}.",
            {"id": length, "relation": "less than", "num_words": int(n)},
        ),
        (
            f"Write a sentence of at least {n} words about {topic}.",
            {"id": length, "relation": "at least", "num_words": int(n)},
        ),
    )[rng.integers(5)]
    return Exercise(question, [constraint])


MAKERS: dict[str, Callable[[np.random.Generator], Exercise]] = {
    "owner": _owner,
    "odd": _odd,
    "larger": _larger,
    "json": _json,
    "instructions": _instructions,
}
SCORERS_OF_KINDS = {"json": "json", "instructions": "ifeval"}  # the others: only_option


def split_of_question(question: str) -> str:
    """Return the split that a question is in: one eighth each for validation and testing."""
    bucket = zlib.crc32(question.encode()) % 8
    return {1: "validation", 2: "test"}.get(bucket, "train")


def build_exercise(kind: str, style: str, split: str, seed: int, index: int) -> Example:
    """Generate questions until one is in the split."""
    rng = np.random.default_rng([int(hash_key("exercise", kind, split, seed)), index])
    exercise = MAKERS[kind](rng)
    while split_of_question(exercise.question) != split:
        exercise = MAKERS[kind](rng)
    has_gold = bool(exercise.chat)
    target = exercise.chat if style == "chat" else exercise.answer
    return Example(
        str(index),
        user_turn(exercise.question),
        exercise.answer,
        target if has_gold else "",
        meta={"options": list(exercise.options)} if exercise.options else {},
    )


def load_exercises(
    name: str,
    kind: str,
    style: str,
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Examples:
    """Return the first `limit` exercises of a split; no file is read."""
    if split not in SIZES:
        raise ValueError(
            f"task {name}: no split {split!r}{did_you_mean(split, SIZES)}; "
            f"it has {', '.join(SIZES)}"
        )
    size = SIZES[split] if limit is None else limit
    return Examples(
        name, split, range(size), functools.partial(build_exercise, kind, style, split, seed)
    )


def make_task(
    name: str = "exercise", kind: str = "owner", style: str = "bare", **fields: Any
) -> Task:
    for setting, value, known in (("kind", kind, MAKERS), ("style", style, STYLES)):
        if value not in known:
            raise ValueError(
                f"task {name}: no {setting} {value!r}{did_you_mean(value, known)}; "
                f"there are {', '.join(known)}"
            )
    own = {"template": "none", "scorer": SCORERS_OF_KINDS.get(kind, "only_option")}
    if kind == "json":
        own["forced_prefix"] = '{"name":'
    return Task(name, functools.partial(load_exercises, name, kind, style), **{**own, **fields})
