r"""Answers that are checked by computing: numbers, boxes, Countdown and the jigsaw.

The jigsaw's convention (also what `cptjax/tasks/datasets/jigsaw.py` draws). Number the *shown* tiles 1, 2, ... in reading order. The answer
lists, for each place of the *original* image in reading order, which shown tile belongs there:

    original      shown          shown tile 1 is the original's C, so it belongs in place 3; tile 2 in place 1; tile 3 in 4; tile 4 in 2
      A B          C A  (1 2)
      C D          D B  (3 4)    answer = 2 4 1 3   (A is shown as 2, B as 4, C as 1, D as 3):  shown[answer[p] - 1] == original[p]
"""

import ast
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

ARITHMETIC_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
MAX_EXPRESSION_LENGTH = 200  # characters; six numbers need fewer than fifty
OPERATOR_SPELLINGS = {
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "×": "*",
    "·": "*",
    "÷": "/",
    "−": "-",
    "\\left": "",
    "\\right": "",
    "$": "",
}
FLOAT_PATTERN = r"[-+]?(?:\d+\.?\d*|\.\d+)"
BOX_PATTERN = re.compile(
    rf"[\[(]\s*({FLOAT_PATTERN})\s*,\s*({FLOAT_PATTERN})\s*(?:\)\s*,?\s*\(|,)\s*({FLOAT_PATTERN})\s*,\s*({FLOAT_PATTERN})\s*[\])]"
)


def parse_number(text: str) -> float | None:
    """The number that a text is: "1,234", "-.5", "3e2", "50%", "$3", "1/2", "3 cm"; None when it holds none or several."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip().strip("$").rstrip(".").strip())
    if found := re.fullmatch(rf"({FLOAT_PATTERN})\s*/\s*({FLOAT_PATTERN})", text):
        return float(found[1]) / float(found[2]) if float(found[2]) else None
    found = re.findall(rf"{FLOAT_PATTERN}(?:[eE][-+]?\d+)?", text)
    return float(found[0]) if len(found) == 1 else None


def score_numeric(prediction: str, answer: Any, meta: Mapping[str, Any] | None = None) -> float:
    """Equal numbers within the row's relative `tolerance` (1e-6 where the column is missing)."""
    said, gold = parse_number(prediction), parse_number(str(answer))
    if gold is None:
        raise ValueError(f"the scorer `numeric` needs a number as the answer; got {answer!r}")
    return float(
        said is not None
        and math.isclose(
            said, gold, rel_tol=float((meta or {}).get("tolerance", 1e-6)), abs_tol=1e-12
        )
    )


def parse_box(value: Any) -> tuple[float, ...] | None:
    """(x1, y1, x2, y2) of four numbers or of the first box in a text: [..], (x1,y1),(x2,y2), json, or four bare numbers."""
    if not isinstance(value, str):
        return tuple(float(v) for v in value) if len(value) == 4 else None
    found = BOX_PATTERN.search(value)
    numbers = found.groups() if found else re.findall(FLOAT_PATTERN, value)
    return tuple(map(float, numbers)) if len(numbers) == 4 else None


def score_iou(prediction: str, answer: Any, meta: Any = None) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); a box with its corners swapped is empty."""
    said, gold = parse_box(prediction), parse_box(answer)
    if gold is None or gold[2] <= gold[0] or gold[3] <= gold[1]:
        raise ValueError(f"a box must be x1, y1, x2, y2 with x1 < x2 and y1 < y2; got {answer!r}")
    if said is None or said[2] <= said[0] or said[3] <= said[1]:
        return 0.0
    width, height = (
        max(0.0, min(said[i + 2], gold[i + 2]) - max(said[i], gold[i])) for i in (0, 1)
    )
    area = lambda b: (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area(said) + area(gold) - width * height)


def score_iou50(prediction: str, answer: Any, meta: Any = None) -> float:
    """Is the overlap at least one half (RefCOCO's accuracy)?"""
    return float(score_iou(prediction, answer) >= 0.5)


def evaluate_arithmetic(text: str) -> tuple[int, list[int]] | None:
    """(value, numbers used) of an expression in + - * / and whole numbers, where each division is exact; None for anything else."""
    for spelling, sign in OPERATOR_SPELLINGS.items():
        text = text.replace(spelling, sign)
    if len(text) > MAX_EXPRESSION_LENGTH or not re.fullmatch(r"[\d\s()+*/-]+", text):
        return None
    used: list[int] = []
    try:
        return _evaluate_node(ast.parse(text.strip(), mode="eval").body, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None


def _evaluate_node(node: ast.AST, used: list[int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC_OPERATORS:
        left, right = _evaluate_node(node.left, used), _evaluate_node(node.right, used)
        if isinstance(node.op, ast.Div):
            quotient, rest = divmod(left, right)
            if rest:
                raise ValueError("the division leaves a rest")
            return quotient
        return ARITHMETIC_OPERATORS[type(node.op)](left, right)
    raise ValueError("not a number, nor one of + - * /")


def score_countdown(prediction: str, answer: Any, meta: Mapping[str, Any]) -> float:
    """Does the expression use every one of the row's `nums` exactly once and land on the answer?"""
    nums = meta.get("nums", meta.get("numbers"))
    if nums is None:
        raise ValueError(
            f"a Countdown row needs the column `nums`; it has {', '.join(map(str, meta)) or 'no columns'}"
        )
    found = evaluate_arithmetic(prediction)
    return float(
        found is not None
        and found[0] == int(answer)
        and sorted(found[1]) == sorted(int(n) for n in nums)
    )


def parse_tiles(value: Any) -> list[int] | None:
    """The tile numbers of an answer, given as numbers or as any text that holds them (rows, commas, brackets)."""
    found = [int(n) for n in (re.findall(r"\d+", value) if isinstance(value, str) else value)]
    return found if found and sorted(found) == list(range(1, len(found) + 1)) else None


def jigsaw_hit_rate(prediction: str, answer: Any) -> float:
    """The share of places with the right tile; an answer that does not use every tile once has none (else "1 1 1 1" would score)."""
    said, gold = parse_tiles(prediction), parse_tiles(answer)
    if gold is None:
        raise ValueError(f"a jigsaw's answer must hold each tile 1..n once; got {answer!r}")
    return _share_equal(said, gold) if said and len(said) == len(gold) else 0.0


def _share_equal(said: Sequence[int], gold: Sequence[int]) -> float:
    return sum(map(operator.eq, said, gold)) / len(gold)


def score_jigsaw(prediction: str, answer: Any, meta: Any = None) -> float:
    """Is every tile in its place?"""
    return float(jigsaw_hit_rate(prediction, answer) == 1.0)
