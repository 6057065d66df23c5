"""Score short answers as text: the VQA benchmarks, yes/no questions, document reading."""

import functools
import json
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from cptjax.tasks.scoring.choice import as_strings

NUMBER_WORDS = dict(
    zip(
        "zero one two three four five six seven eight nine ten".split(),
        map(str, range(11)),
        strict=True,
    ),
    none="0",
)
ARTICLES = {"a", "an", "the"}
PUNCTUATION_MARKS = ';/[]"{}()=+\\_->@<`,?!'
# The contractions that EvalAI completes where one apostrophe is missing.
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've 'ow's'at you'd you'd've you'll
you're you've""".split()


# The forms that lack one apostrophe: `they'dve` and `theyd've` for `they'd've`.
COMPLETED_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTIONS
    for i, character in enumerate(word)
    if character == "'"
} | {"hed": "he'd", "somebody'd": "somebodyd"}
LAST_PERIOD = re.compile(r"\.(?!\d)")


# The ten answers of a row are compared with every response of its group.
@functools.lru_cache(maxsize=1 << 16)
def normalise_vqa_answer(text: str) -> str:
    """Normalise a VQA answer as EvalAI does, quirks included.

    "Yes." -> "yes", "U.S.A." -> "usa", "none" -> "0", "it's" -> "it 's"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    # Quirk: a mark next to a space anywhere is deleted everywhere, else it becomes a space.
    next_to_space = {mark: f"{mark} " in text or f" {mark}" in text for mark in PUNCTUATION_MARKS}
    for mark, delete in next_to_space.items():
        text = text.replace(mark, "" if delete else " ")
    # Quirk: the original passes a flag where the count belongs, so only 32 periods go;
    # one after a digit goes too ("5." -> "5").
    text = LAST_PERIOD.sub("", text, count=32)
    words = [NUMBER_WORDS.get(word, word) for word in text.split()]
    return " ".join(
        COMPLETED_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES
    )


def normalise_text(text: str) -> str:
    """Convert to lower case, remove punctuation and repeated spaces."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def gold_answers(answer: Any) -> list[str]:
    """Convert one gold answer or several, of any type, to a list of strings."""
    if hasattr(answer, "tolist"):  # a parquet column is an array
        answer = answer.tolist()
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        return [str(a) for a in answer]
    return [str(answer)]


def score_exact(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if the prediction is exactly one of the answers, except for space at the ends."""
    return float(prediction.strip() in [a.strip() for a in gold_answers(answer)])


def score_lower_exact_match(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 for equality, ignoring case and space at the ends.

    Paper A scores its SFT models so, but on teacher-forced tokens.
    """
    golds = [a.strip().lower() for a in gold_answers(answer)]
    return float(prediction.strip().lower() in golds)


def score_contains(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if one of the answers occurs in the prediction, ignoring case."""
    return float(
        any(a.strip().lower() in prediction.lower() for a in gold_answers(answer) if a.strip())
    )


def fold_accents(text: str) -> str:
    """Remove accents, and write each apostrophe as in ASCII: "Brasília" -> "Brasilia"."""
    if text.isascii():
        return text
    # One character at a time, since a long run of accents takes quadratic time.
    parts = (unicodedata.normalize("NFKD", character) for character in text)
    return "".join(c for c in "".join(parts) if not unicodedata.combining(c)).replace("’", "'")


def has_words(text: str, words: str) -> bool:
    """Return whether a text contains some words, not as a part of longer ones.

    Case, accents and the form of apostrophes are ignored.
    """
    text, words = fold_accents(text), fold_accents(words)
    return re.search(rf"(?<![\w-]){re.escape(words)}(?![\w-])", text, re.IGNORECASE) is not None


def score_contains_words(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if one of the answers occurs in the prediction as whole words; see has_words."""
    return float(any(has_words(prediction, a.strip()) for a in gold_answers(answer) if a.strip()))


def score_only_option(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if the prediction contains the answer and none of the row's other `options`."""
    options, answer = as_strings((meta or {}).get("options") or ()), str(answer)
    if answer not in options:
        raise ValueError(
            f"scorer only_option: expected the column `options` with the answer {answer!r} in it, "
            f"got {options!r}"
        )
    return float([o for o in options if has_words(prediction, o)] == [answer])


def score_json(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if the prediction is JSON, without other text, and equals the answer's JSON.

    The answer is JSON as text, or an object or list.
    """
    gold = json.loads(answer) if isinstance(answer, str) else answer
    try:
        return float(json.loads(prediction) == gold)
    except (ValueError, RecursionError):  # a thousand open brackets exceed the recursion limit
        return 0.0


def score_likelihood(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return the probability of the answer per byte; the prediction is its log-probability."""
    return math.exp(float(prediction) / len(str(answer).encode()))


def score_gqa_strict(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 for equality, ignoring case and punctuation but not space (lmms-eval's GQA)."""
    remove = str.maketrans("", "", string.punctuation)
    golds = [a.lower().translate(remove) for a in gold_answers(answer)]
    return float(prediction.lower().translate(remove) in golds)


def score_exact_match(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 for equality, ignoring case, punctuation and repeated or outer space."""
    return float(normalise_text(prediction) in [normalise_text(a) for a in gold_answers(answer)])


def score_vqa_soft(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return the VQA accuracy: the mean over annotators of min(1, matches among the *others* / 3).

    3 of 10 -> 0.9, 4 of 10 -> 1. A row with fewer than four answers cannot reach 3 matches among
    the others, so matching all others is enough. Where a task trains on one answer, its rows keep
    all answers in the column `annotators`.
    """
    normal = [normalise_vqa_answer(a) for a in gold_answers((meta or {}).get("annotators", answer))]
    matches = [normalise_vqa_answer(prediction) == a for a in normal]
    if len(normal) == 1:
        return float(matches[0])
    enough = min(3, len(normal) - 1)
    return sum(min(1.0, (sum(matches) - m) / enough) for m in matches) / len(matches)


def score_vqa_em_modal(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 for equality with the most frequent answer, the first one of a tie."""
    counts = Counter(normalise_vqa_answer(a) for a in gold_answers(answer))
    return float(normalise_vqa_answer(prediction) == counts.most_common(1)[0][0])


def parse_yes_no(text: str) -> str | None:
    """Return the "yes" or "no" that a text starts with, or the only one it contains, else None."""
    words = re.findall(r"[a-z']+", text.lower())
    stated = {"yes", "no"} & set(words)
    if words and words[0] in stated:
        return words[0]
    return stated.pop() if len(stated) == 1 else None


def parse_pope(text: str) -> str:
    """Return "no" if the first sentence has the word No, no or not, else "yes" (LLaVA's rule)."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score_pope(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if LLaVA's rule reads the gold answer in the prediction."""
    return float(parse_pope(prediction) == gold_yes_no(answer))


def parse_mme(text: str) -> str:
    """Return the "yes" or "no" that MME's rule reads in a prediction, else "other".

    It accepts yes, no, y and n, and otherwise looks for yes or no in the first four characters.
    """
    text = text.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def score_mme(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if MME's rule reads the gold answer in the prediction."""
    return float(parse_mme(prediction) == gold_yes_no(answer))


def score_yes_no(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return 1 if the prediction's yes or no is the gold answer.

    A prediction with neither scores 0.
    """
    return float(parse_yes_no(prediction) == gold_yes_no(answer))


def gold_yes_no(answer: Any) -> str:
    """Return "yes" or "no" for a gold answer, which may be a Boolean."""
    truth = {"true": "yes", "false": "no"}.get(str(answer).strip().lower())
    gold = truth or parse_yes_no(str(answer))
    if gold is None:
        raise ValueError(f"a yes/no task: expected the answer yes or no, got {answer!r}")
    return gold


def token_overlap(prediction: str, answer: str) -> tuple[float, float]:
    """Return the recall and F1 of the gold answer's words, without case and punctuation."""
    predicted = Counter(normalise_text(prediction).split())
    gold = Counter(normalise_text(answer).split())
    common = (predicted & gold).total()
    recall = common / max(1, gold.total())
    return recall, 2 * common / max(1, gold.total() + predicted.total())


def score_anls(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return the normalised Levenshtein similarity to the nearest answer.

    A similarity below one half counts as 0.
    """
    predicted = " ".join(prediction.lower().split())
    golds = [" ".join(gold.lower().split()) for gold in gold_answers(answer)]
    best = max(
        1.0 - Levenshtein.distance(predicted, gold) / max(len(predicted), len(gold), 1)
        for gold in golds
    )
    return best if best >= 0.5 else 0.0
