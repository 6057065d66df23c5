r"""Score computed answers: numbers, boxes, Countdown expressions and jigsaws.

The convention of jigsaws, also used in `cptjax/tasks/datasets/jigsaw.py`: the *shown* tiles are
numbered 1, 2, ... in reading order. The answer lists, for each place of the *original* image in
reading order, which shown tile belongs there:

    original      shown
      A B          C A  (1 2)    A is shown as tile 2, B as 4, C as 1, D as 3
      C D          D B  (3 4)    answer = 2 4 1 3

so that shown[answer[p] - 1] == original[p].
"""

import ast
import math
import operator
import re
from collections.abc import Mapping
from typing import Any

ARITHMETIC_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
MAX_EXPRESSION_LENGTH = 200  # characters; six numbers need fewer than 50
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
FLOAT_PATTERN = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
# Runs of spaces are replaced by one, so that the patterns after it take linear time.
NUMBER_SPELLINGS = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        ("\N{MINUS SIGN}", "-"),
        (r"\\(?=[$%])|\\[,;! ]", ""),
        (r"\\(?:text|mathrm)\{([^{}]*)\}", r" \1"),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"(?<=[-+]) ?\$ ?", ""),  # -$5
        (r"\$", " "),
        (r"\s+", " "),
        (r"(?<=\d) ?(?=\\[dt]?frac)", " "),
        (r"\\[dt]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r"\1/\2"),
        (r"\^ ?\{ ?", "^"),
        (r"((?:^|[=:(]) ?-) (?=[\d.])", r"\1"),  # - 5
        (r"(\d ?[A-Za-z/]*[A-DF-WYZa-df-wyz])(?:\^-?\d+|[23]\b)", r"\1"),  # cm^2, m2
    )
)
UNSIGNED_PATTERN = r"(?:\d+(?:\.\d*)?|\.\d+)"
NUMBER_PATTERN = re.compile(
    r"(?P<sign>(?<![\w)}])[-+])?"  # the "-" of Room-5 is none
    r"(?:(?P<whole>\d+) (?=\d+ ?/ ?\d))?"
    rf"(?P<number>{UNSIGNED_PATTERN})"
    r"(?:[eE](?P<e>[-+]?\d+)|\^(?P<power>[-+]?\d+)"
    r"| ?(?:\\times|\\cdot|[×·*x]) ?10\^(?P<ten>[-+]?\d+))?"
    rf"(?: ?/ ?(?P<below>[-+]?{UNSIGNED_PATTERN}))?"
)
MAX_TILE_DIGITS = 9
BOX_PATTERN = re.compile(
    rf"[\[(]\s*({FLOAT_PATTERN})\s*,\s*({FLOAT_PATTERN})\s*(?:\)\s*,?\s*\(|,)"
    rf"\s*({FLOAT_PATTERN})\s*,\s*({FLOAT_PATTERN})\s*[\])]"
)


def parse_number(text: str) -> float | None:
    r"""Return the number in a text such as "1,234", "-$.5", "3e2", "50%", "1 1/2" or "3 cm^2".

    LaTeX is read too: "\frac{1}{2}", "3 \times 10^5". Return None if the text has no number or
    several.
    """
    for pattern, plain in NUMBER_SPELLINGS:
        text = pattern.sub(plain, text)
    numbers = list(NUMBER_PATTERN.finditer(text.strip()))
    return _number_value(numbers[0].groupdict("")) if len(numbers) == 1 else None


def _number_value(parts: Mapping[str, str]) -> float | None:
    try:
        value = float(f"{parts['number']}e{parts['ten'] or parts['e'] or 0}")
        value **= float(parts["power"] or 1)
        value = float(parts["whole"] or 0) + value / float(parts["below"] or 1)
    except (OverflowError, ZeroDivisionError):
        return None
    return -value if parts["sign"] == "-" else value


def score_numeric(prediction: str, answer: Any, meta: Mapping[str, Any] | None = None) -> float:
    """Return 1 if the numbers are equal within a relative tolerance.

    The tolerance is the row's column `tolerance`, or 1e-6 where that is missing or empty.
    """
    predicted, gold = parse_number(prediction), parse_number(str(answer))
    if gold is None:
        raise ValueError(f"scorer numeric: expected a number as the answer, got {answer!r}")
    if predicted is None:
        return 0.0
    given = (meta or {}).get("tolerance")
    tolerance = 1e-6 if given in (None, "") else float(given)
    return float(math.isclose(predicted, gold, rel_tol=tolerance, abs_tol=1e-12))


def parse_box(value: Any) -> tuple[float, ...] | None:
    """Return (x1, y1, x2, y2) from four numbers, or from the first box in a text.

    A box is "[x1, y1, x2, y2]", "(x1,y1),(x2,y2)", JSON, or four bare numbers.
    """
    if not isinstance(value, str):
        return tuple(float(v) for v in value) if len(value) == 4 else None
    box = BOX_PATTERN.search(value)
    numbers = box.groups() if box else re.findall(FLOAT_PATTERN, value)
    return tuple(map(float, numbers)) if len(numbers) == 4 else None


def score_iou(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return the intersection over union of two boxes (x1, y1, x2, y2).

    A box with swapped corners is empty.
    """
    predicted, gold = parse_box(prediction), parse_box(answer)
    if gold is None or gold[2] <= gold[0] or gold[3] <= gold[1]:
        raise ValueError(f"a box: expected x1, y1, x2, y2 with x1 < x2 and y1 < y2, got {answer!r}")
    if predicted is None or predicted[2] <= predicted[0] or predicted[3] <= predicted[1]:
        return 0.0
    width = max(0.0, min(predicted[2], gold[2]) - max(predicted[0], gold[0]))
    height = max(0.0, min(predicted[3], gold[3]) - max(predicted[1], gold[1]))
    intersection = width * height
    return intersection / (_box_area(predicted) + _box_area(gold) - intersection)


def _box_area(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def score_iou50(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if the intersection over union is at least one half (RefCOCO's accuracy)."""
    return float(score_iou(prediction, answer) >= 0.5)


def evaluate_arithmetic(text: str) -> tuple[int, list[int]] | None:
    """Return the value of an expression and the numbers in it, or None if it is not valid.

    An expression consists of whole numbers, + - * / and brackets; each division must be exact.
    """
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
            quotient, remainder = divmod(left, right)
            if remainder:
                raise ValueError("the division is not exact")
            return quotient
        return ARITHMETIC_OPERATORS[type(node.op)](left, right)
    raise ValueError("not a number, nor one of + - * /")


def score_countdown(prediction: str, answer: Any, meta: Mapping[str, Any]) -> float:
    """Return 1 if the expression uses each of `nums` exactly once and equals the answer."""
    nums = meta.get("nums", meta.get("numbers"))
    if nums is None:
        raise ValueError(
            "a Countdown row: expected the column `nums`, "
            f"got {', '.join(map(str, meta)) or 'no columns'}"
        )
    result = evaluate_arithmetic(prediction)
    if result is None:
        return 0.0
    value, used = result
    return float(value == int(answer) and sorted(used) == sorted(parse_tiles(nums)))


def parse_tiles(value: Any) -> list[int]:
    """Return the numbers of an answer, given as a list or as a text with any separators.

    A number of more digits than a tile has becomes 0.
    """
    if not isinstance(value, str):
        return [int(n) for n in value]
    return [int(n) if len(n) < MAX_TILE_DIGITS else 0 for n in re.findall(r"\d+", value)]


def _gold_tiles(answer: Any) -> list[int]:
    gold = parse_tiles(answer)
    if not gold or sorted(gold) != list(range(1, len(gold) + 1)):
        raise ValueError(f"a jigsaw's answer: expected each tile 1..n once, got {answer!r}")
    return gold


def jigsaw_hit_rate(prediction: str, answer: Any) -> float:
    """Return the share of places whose tile is right, of all places of the puzzle (paper B).

    The k-th number of the response is for place k; places without a number are wrong.
    """
    gold = _gold_tiles(answer)
    return sum(map(operator.eq, parse_tiles(prediction), gold)) / len(gold)


def score_jigsaw(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if the response is the right tile of every place and nothing more."""
    return float(parse_tiles(prediction) == _gold_tiles(answer))


def score_moves(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return the share of the gold path's moves before the first wrong one; 0 for a longer path."""
    golds, moves = ([m.strip() for m in t.split(",") if m.strip()] for t in (answer, prediction))
    right = 0
    while right < min(len(golds), len(moves)) and golds[right] == moves[right]:
        right += 1
    return 0.0 if right == len(golds) < len(moves) else right / max(1, len(golds))
