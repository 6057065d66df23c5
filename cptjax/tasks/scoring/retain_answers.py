r"""Read answers to MMLU, MATH and Countdown as paper C's released code does.

All three read the whole response, without removing space at its ends:

    MMLU       the word after "The ... answer is", in the first line that has both
    MATH       the last \boxed{}, else the last $...$, else the last number, else the response;
               normalised as in Minerva (Lewkowycz et al., 2022, appendix D) and compared as text
    Countdown  the last \boxed{}, else the response, as an expression with + - * / and //

Every step takes time linear in the length of the response.
"""

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from cptjax.tasks.scoring.text import gold_answers

THE = re.compile(r"\bthe", re.IGNORECASE)
OPTION_AFTER_ANSWER_IS = re.compile(r"(?=answer is(?: option)?:?\s*(\w+))", re.IGNORECASE)
BOX_OF_TWO_LEVELS = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
BETWEEN_DOLLARS = re.compile(r"\$([^$]+)\$")
NUMBER_ALONE = re.compile(r"(?:^|[^\d])(\d+(?:\.\d+)?|\.\d+)(?:[^\d]|$)")

MINERVA_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
MINERVA_REMOVED = (
    *"square ways integers dollars mph inches ft hours km units \\ldots sue points feet minutes "
    "digits cents degrees cm gm pounds meters meals edges students childrentickets multiples "
    "\\text{s} \\text{.}".split(" "),
    "\\text{\ns}",
    *"\\text{}^2 \\text{}^3".split(" "),
    "\\text{\n}",
    *'\\text{} \\mathrm{th} ^\\circ ^{\\circ} \\; ,\\! {,} " \\dots'.split(" "),
)
SPELLINGS = (("\\dfrac", "\\frac"), ("\\left", ""), ("\\right", ""))

LARGEST_TARGET = 99
MAX_EXPRESSION_LENGTH = 2_000  # characters; longer texts are not parsed
OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
}


def parse_retain_mmlu(text: str) -> str | None:
    """Return the word after the last "answer is" in the first line that has "the" before it."""
    text = text.replace("*", "")
    # The word itself may be in the next line.
    stated = [(m.start(), m[1]) for m in OPTION_AFTER_ANSWER_IS.finditer(text)]
    start, k = 0, 0
    for line in text.split("\n"):
        first, found = THE.search(line), None
        stop = start + len(line)
        while k < len(stated) and stated[k][0] < stop:
            if first and stated[k][0] >= start + first.end():
                found = stated[k][1]
            k += 1
        if found:
            return found.upper()
        start = stop + 1
    return None


def score_retain_mmlu(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if the response states the gold letter in the asked-for sentence."""
    return float(parse_retain_mmlu(prediction) in gold_answers(answer))


def parse_retain_math(text: str) -> str:
    """Return the answer that a solution or a response states."""
    text = _respell(text)
    for pattern in (BOX_OF_TWO_LEVELS, BETWEEN_DOLLARS, NUMBER_ALONE):
        if found := pattern.findall(text):
            return found[-1].strip()
    return text


def _respell(text: str) -> str:
    for old, new in SPELLINGS:
        text = text.replace(old, new)
    return text


def _unwrap(text: str, opening: str, greedy: bool = False) -> str:
    r"""Replace each `\text{inside}` of a line by its inside, up to the first brace that closes.

    `greedy` takes the last brace of the line.
    """
    lines = []
    for line in text.split("\n"):
        pieces, place = [], 0
        while (start := line.find(opening, place)) >= 0:
            inside = start + len(opening)
            stop = line.rfind("}", inside) if greedy else line.find("}", inside)
            if stop < 0:
                break
            pieces += [line[place:start], line[inside:stop]]
            place = stop + 1
        lines.append("".join([*pieces, line[place:]]))
    return "\n".join(lines)


def _keep_dollars(line: str) -> str:
    """Reduce a line with two dollar signs to the part between them, with the signs."""
    parts = line.split("$", 2)
    return f"${parts[1]}$" if len(parts) == 3 else line


def normalise_minerva(text: str) -> str:
    r"""Normalise an answer: `x = \frac12` -> `\frac{1}{2}`, `1,000 cm` -> `1000`."""
    text = text.split("=")[-1]
    for old, new in MINERVA_REPLACED:
        text = text.replace(old, new)
    for removed in MINERVA_REMOVED:
        text = text.replace(removed, "")
    text = "\n".join(map(_keep_dollars, text.split("\n")))
    for opening in ("\\text{", "\\textbf{", "\\overline{"):
        text = _unwrap(text, opening)
    text = _unwrap(text, "\\boxed{", greedy=True)
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text).replace("$", "")
    bare = text.replace(",", "")
    return bare if bare.isdigit() else text


def score_retain_math(prediction: str, answer: Any, meta: Any = None) -> float:
    r"""Return 1 if the normalised answers are the same text.

    The gold answer is a solution with a `\boxed{}`, or its answer alone.
    """
    golds = [parse_retain_math(g) if "\\boxed" in g else g for g in gold_answers(answer)]
    predicted, *golds = (
        _respell(normalise_minerva(text)) for text in (parse_retain_math(prediction), *golds)
    )
    return float(predicted in golds)


def evaluate_expression(text: str) -> tuple[int, Counter] | None:
    """Return the value of an expression and the numbers in it, or None if it is not valid."""
    if len(text) > MAX_EXPRESSION_LENGTH:
        return None
    used: Counter = Counter()
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, used), used
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError, OverflowError):
        return None


def _value(node: ast.AST, used: Counter) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        used[node.value] += 1
        return node.value
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
        raise ValueError("not a number, nor one of + - * / //")
    left, right = _value(node.left, used), _value(node.right, used)
    apply = OPERATORS[type(node.op)]
    if apply is operator.floordiv and (right == 0 or left % right):
        raise ValueError("the division is not exact")
    return apply(left, right)


def score_retain_countdown(prediction: str, answer: Any, meta: Mapping[str, Any]) -> float:
    """Return 1 if the expression uses each of `nums` once and equals the answer, in 0..99."""
    nums = next((meta[name] for name in ("nums", "numbers", "x") if name in meta), None)
    if nums is None:
        raise ValueError(
            "a Countdown row: expected the column `nums`, "
            f"got {', '.join(map(str, meta)) or 'no columns'}"
        )
    boxes = BOX_OF_TWO_LEVELS.findall(prediction)
    result = evaluate_expression(boxes[-1] if boxes else prediction)
    if result is None:
        return 0.0
    value, used = result
    in_range = 0 <= value <= LARGEST_TARGET
    return float(in_range and value == int(answer) and used == Counter(int(n) for n in nums))
