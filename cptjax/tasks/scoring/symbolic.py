r"""Decide whether two answers are mathematically equal; runs in worker processes only.

Any of this code may loop forever, so only `cptjax/tasks/scoring/sandbox.py` calls it. There are two
graders:

`equal_by_math_verify` calls the package math-verify.

`equal_by_mathruler` is a re-implementation of the grader of arXiv 2507.05386, the package
mathruler, written from its behaviour; grades may differ in rare cases. It ignores letter case,
spaces, `$`, `%` and the names of units anywhere ("football" = "ball"); it reads "or" and "and" as a
comma, and multiplies letters ("on" = "no"). It is strict in other cases: "A." is not "A", "two" is
not "2", and integers must be literally equal. Known difference: LaTeX commands outside the table
below are removed, where mathruler has a larger table.
"""

import functools
import logging
import re
from collections.abc import Callable

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy.parsing import sympy_parser

UNIT_NAMES = (
    "degree cm centimeter meter mile second minute hour day week month year foot feet inch yard"
).split()
POWER_WORDS = {"million": "*10^6", "billion": "*10^9", "trillion": "*10^12"}
LATEX_COMMANDS = {
    "pi": "pi",
    "cdot": "*",
    "times": "*",
    "infty": "inf",
    "cup": "U",
    **{
        c: c
        for c in "sin cos tan log ln exp alpha beta gamma theta phi angle triangle circ".split()
    },
}
# Characters; the parser needs minutes for a degenerate answer of a thousand open brackets.
MAX_ANSWER_LENGTH = 400
LATEX_GROUP = r"\{([^{}]*)\}"
BRACKETS = "()[]"
# math-verify warns at each call that its own time limit is off.
logging.getLogger("math_verify").setLevel(logging.ERROR)
PARSER_TRANSFORMATIONS = (
    *sympy_parser.standard_transformations,
    sympy_parser.implicit_multiplication_application,
)


def any_equal(prediction: str, answers: list[str]) -> bool:
    """Return whether the prediction equals one of the answers by math-verify."""
    return any(equal_by_math_verify(prediction, answer) for answer in answers)


def any_lenient(prediction: str, answers: list[str]) -> bool:
    """Return whether the prediction equals one of the answers by the rules of mathruler."""
    return any(equal_by_mathruler(prediction, answer) for answer in answers)


def equal_by_math_verify(prediction: str, answer: str) -> bool:
    """Return whether two answers, read as LaTeX or as plain expressions, are equal by math-verify.

    Words, and answers that math-verify cannot read, must be literally equal.
    """
    predicted, gold_text = (
        " ".join(t.lower().strip().strip("$").rstrip(".").split()) for t in (prediction, answer)
    )
    if predicted == gold_text:
        return True
    if re.fullmatch(r"[a-z][a-z ]+", gold_text):  # as a product of letters, "on" would equal "no"
        return False
    if len(predicted) > MAX_ANSWER_LENGTH:
        return False
    gold = _parse_math(answer)
    return bool(gold) and verify(gold, _parse_math(prediction), timeout_seconds=None)


@functools.lru_cache(maxsize=1 << 12)  # a gold answer is compared with every response of its group
def _parse_math(text: str) -> list:
    text = text.strip().strip("$").rstrip(".")
    # The pool limits the time; math-verify's own limit is a signal, which C code ignores.
    return parse(
        f"${text}$", [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None
    )


def equal_by_mathruler(prediction: str, answer: str) -> bool:
    """Return whether two answers are equal by the rules of mathruler."""
    if len(" ".join(prediction.split())) > MAX_ANSWER_LENGTH + len(answer):
        return False  # no long text reduces to a short answer
    if normalise_latex(prediction) == normalise_latex(answer):
        return True
    predicted, gold = normalise_loosely(prediction), normalise_loosely(answer)
    if predicted == gold:
        return True
    parts, gold_parts = _split_elements(predicted), _split_elements(gold)
    if not predicted or len(parts) != len(gold_parts):
        return False
    if len(parts) > 1 and (predicted[0], predicted[-1]) != (gold[0], gold[-1]):
        return False
    return all(map(_same_value, parts, gold_parts))


def normalise_latex(text: str) -> str:
    r"""Rewrite simple LaTeX in one spelling.

    `\frac12`, `1/2`, `.5` and `\dfrac{1}{2}` become the same text; "x=5" becomes "5"; degrees,
    percent signs and units are removed.
    """
    text = text.strip()
    if whole := re.search(r"^\\text\{(.+?)\}$", text):
        text = whole[1].strip()
    for old, new in (
        ("\n", ""),
        ("\\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("\\left", ""),
        ("\\right", ""),
    ):
        text = text.replace(old, new)
    for gone in "^{\\circ}", "^\\circ", "\\$":
        text = text.replace(gone, "")
    if text.count("\\text{ ") == 1:
        text = text[: text.index("\\text{ ")]
    text = text.replace("\\%", "").replace("%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    left, equals, right = text.partition("=")
    text = right if equals and "=" not in right and len(left) <= 2 else text
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(
        r"\\frac([^{])(?:([^{])|(?=\{))",
        lambda m: f"\\frac{{{m[1]}}}" + (f"{{{m[2]}}}" if m[2] else ""),
        text,
    )
    if text == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"^(0|-?[1-9]\d*)/(0|-?[1-9]\d*)$", r"\\frac{\1}{\2}", text)


def normalise_loosely(text: str) -> str:
    """Rewrite LaTeX as arithmetic in lower case, without spaces, units, `$`, `%` and braces."""
    if whole := re.search(r"^\\text\{(.+?)\}$", text):
        text = whole[1]
    text = text.replace("\\%", "").replace("\\$", "").replace("$", "").replace("%", "")
    text = text.replace(" or ", " , ").replace(" and ", " , ")
    for word, power in POWER_WORDS.items():
        text = text.replace(word, power)
    for unit in UNIT_NAMES:
        text = re.sub(rf"{unit}(es)?(s)? *(\^[0-9]+)?", "", text)
    text = re.sub(r"\^ *\\circ", "", text)
    text = text[1:-1] if text.startswith("{") and text.endswith("}") else text
    text = re.sub(r",\\! *", "", text)
    text = _write_integer(text, float)
    text = _latex_to_arithmetic(text) if "\\" in text else text
    text = re.sub("- *", "-", text)
    text = re.sub("([0-9]) +([0-9])", r"\1+\2", text)  # 7 3/4 is 7+3/4
    text = re.sub("[ {}]", "", text).lower()
    return _write_integer(text, lambda t: float(_without_commas(t)))


def _write_integer(text: str, number: Callable[[str], float]) -> str:
    """Write a whole number without decimals, "2.0" -> "2"; leave any other text unchanged."""
    try:
        value = number(text)
        return str(round(value)) if abs(value - round(value)) <= 1e-7 else text
    except (ValueError, OverflowError):
        return text


def _without_commas(text: str) -> str:
    """Remove thousands separators, 1,234,567 -> 1234567; keep the comma of a pair."""
    return re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)


def _latex_to_arithmetic(text: str) -> str:
    r"""Rewrite LaTeX as arithmetic: `2\sqrt{3}` -> `2sqrt(3)`, `\frac{1}{2}` -> ` 1/2` (sic)."""
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*([^\s{}])\s*(?=[^\s{}]|\{)", r"\\frac{\1}", text)
    text = re.sub(r"\\(frac\{[^{}]*\}|sqrt)\s*([^\s{}])", r"\\\1{\2}", text)
    before = None
    while before != text:
        before = text
        text = re.sub(rf"\\frac\s*{LATEX_GROUP}\s*{LATEX_GROUP}", r" \1/\2", text)
        text = re.sub(rf"\\sqrt\s*{LATEX_GROUP}", r"sqrt(\1)", text)
        text = re.sub(rf"\\(?:text|mathrm|mathbf)\s*{LATEX_GROUP}", r"\1", text)
    text = re.sub(r"\\([A-Za-z]+) *", lambda m: LATEX_COMMANDS.get(m[1], ""), text)
    return re.sub(r"\\[,;:! ]", "", text).strip()


def _split_elements(text: str) -> list[str]:
    """Return the elements of a tuple or interval."""
    text = _without_commas(text)
    if (
        len(text) > 2
        and text[0] in BRACKETS
        and text[-1] in BRACKETS
        and not set(text[1:-1]) & set(BRACKETS)
    ):
        return text[1:-1].split(",")
    return [text] if text else []


def _same_value(predicted: str, gold: str) -> bool:
    fraction = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?")
    if fraction.fullmatch(predicted) and fraction.fullmatch(gold):
        return predicted == gold  # an unreduced fraction is wrong
    if _is_integer(predicted) != _is_integer(gold):
        return False
    difference = f"({gold})-({predicted})"
    letters = {c for c in difference.replace("sqrt", "").replace("frac", "") if c.isalpha()}
    if len(letters) > 2 or re.search(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]+", difference):
        return False
    try:
        value = sympy_parser.parse_expr(
            difference.replace("^", "**"), transformations=PARSER_TRANSFORMATIONS
        )
        return sympy.simplify(value) == 0
    except Exception:  # the parser raises many errors on prose, which equals no expression
        return False


def _is_integer(text: str) -> bool:
    try:
        value = float(_without_commas(text))
        return abs(value - round(value)) <= 1e-7
    except (ValueError, OverflowError):
        return False
