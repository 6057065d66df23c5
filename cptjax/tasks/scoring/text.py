"""Short answers compared as text: the VQA benchmarks, yes/no questions and document reading."""

import functools
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

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
CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've 'ow's'at you'd you'd've you'll you're you've""".split()


def _without_one_apostrophe(word: str) -> list[str]:
    """The forms of a contraction with exactly one apostrophe missing: `they'dve` and `theyd've` of `they'd've`."""
    return [word[:i] + word[i + 1 :] for i, c in enumerate(word) if c == "'"]


COMPLETED_CONTRACTIONS = {
    form: word for word in CONTRACTIONS for form in _without_one_apostrophe(word)
} | {"hed": "he'd", "somebody'd": "somebodyd"}
LAST_PERIOD = re.compile(r"\.(?!\d)")


@functools.lru_cache(
    maxsize=1 << 16
)  # the ten answers of a question meet every response of its group
def normalise_vqa_answer(text: str) -> str:
    """EvalAI's normaliser of VQA answers, quirks included: "Yes." -> "yes", "U.S.A." -> "usa", "none" -> "0", "it's" -> "it 's"."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    # Quirk: a mark that stands beside a space anywhere is deleted everywhere, else it becomes a space.
    beside_space = {mark: f"{mark} " in text or f" {mark}" in text for mark in PUNCTUATION_MARKS}
    for mark, delete in beside_space.items():
        text = text.replace(mark, "" if delete else " ")
    # Quirk: the original passes a flag where the count belongs, so only 32 periods go; one after a digit goes too ("5." -> "5").
    text = LAST_PERIOD.sub("", text, count=32)
    words = [NUMBER_WORDS.get(word, word) for word in text.split()]
    return " ".join(
        COMPLETED_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES
    )


def normalise_text(text: str) -> str:
    """Lower case without punctuation, single spaces: the GQA rule."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def gold_answers(answer: Any) -> list[str]:
    """The gold answers as a list of strings: one answer or several, of any type."""
    answer = (
        answer.tolist() if hasattr(answer, "tolist") else answer
    )  # parquet columns come as arrays
    return (
        [str(a) for a in answer]
        if isinstance(answer, Sequence) and not isinstance(answer, str)
        else [str(answer)]
    )


def score_exact(prediction: str, answer: Any, meta: Any = None) -> float:
    """Is the prediction one of the answers, letter for letter (outer space aside)?"""
    return float(prediction.strip() in [a.strip() for a in gold_answers(answer)])


def score_contains(prediction: str, answer: Any, meta: Any = None) -> float:
    """Does an answer occur in the prediction, in any case?"""
    return float(
        any(a.strip().lower() in prediction.lower() for a in gold_answers(answer) if a.strip())
    )


def score_exact_match(prediction: str, answer: Any, meta: Any = None) -> float:
    """Equality without case and punctuation (GQA as lmms-eval scores it)."""
    return float(normalise_text(prediction) in [normalise_text(a) for a in gold_answers(answer)])


def score_vqa_soft(prediction: str, answer: Any, meta: Any = None) -> float:
    """VQA accuracy: mean over the annotators of min(1, matches among the *others* / 3); 3 of 10 -> 0.9, 4 of 10 -> 1.

    A file with fewer than four answers can not reach 3 matches among the others: there all of the others suffice. Where a task trains
    on one answer, its rows keep all of them in the column `annotators`.
    """
    normal = [normalise_vqa_answer(a) for a in gold_answers((meta or {}).get("annotators", answer))]
    matches = [normalise_vqa_answer(prediction) == a for a in normal]
    if len(normal) == 1:
        return float(matches[0])
    enough = min(3, len(normal) - 1)
    return sum(min(1.0, (sum(matches) - m) / enough) for m in matches) / len(matches)


def score_vqa_em_modal(prediction: str, answer: Any, meta: Any = None) -> float:
    """Equality with the most frequent answer (the first of those that tie), both through EvalAI's normaliser."""
    return float(
        normalise_vqa_answer(prediction)
        == Counter(normalise_vqa_answer(a) for a in gold_answers(answer)).most_common(1)[0][0]
    )


def parse_yes_no(text: str) -> str | None:
    """ "yes" or "no" if the text starts with it or has only one of the two as a word; else None."""
    words = re.findall(r"[a-z']+", text.lower())
    found = {"yes", "no"} & set(words)
    if words and words[0] in found:
        return words[0]
    return found.pop() if len(found) == 1 else None


def score_yes_no(prediction: str, answer: Any, meta: Any = None) -> float:
    """Is the prediction's yes or no the gold one? Neither is wrong."""
    return float(parse_yes_no(prediction) == gold_yes_no(answer))


def gold_yes_no(answer: Any) -> str:
    """ "yes" or "no" of a gold answer, which may be a truth value."""
    gold = {"true": "yes", "false": "no"}.get(str(answer).strip().lower()) or parse_yes_no(
        str(answer)
    )
    if gold is None:
        raise ValueError(f"a yes/no question needs the answer yes or no; got {answer!r}")
    return gold


def token_overlap(prediction: str, answer: str) -> tuple[float, float]:
    """(recall, F1) of the gold answer's words, after the GQA rule."""
    said, gold = (
        Counter(normalise_text(prediction).split()),
        Counter(normalise_text(answer).split()),
    )
    common = sum((said & gold).values())
    return common / max(1, sum(gold.values())), 2 * common / max(
        1, sum(gold.values()) + sum(said.values())
    )


def score_anls(prediction: str, answer: Any, meta: Any = None) -> float:
    """Average normalised Levenshtein similarity of one question: the best of the answers, 0 below one half."""
    best = max(
        _similarity(" ".join(prediction.lower().split()), " ".join(a.lower().split()))
        for a in gold_answers(answer)
    )
    return best if best >= 0.5 else 0.0


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b), 1)
    if min(len(a), len(b)) < longer / 2 and longer > 1:
        return 0.0  # below one half whatever the letters; saves the table for a rambling response
    return 1.0 - levenshtein_distance(a, b) / longer


def levenshtein_distance(a: str, b: str) -> int:
    """The number of insertions, deletions and replacements that turn a into b."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(row[-1] + 1, previous[j] + 1, previous[j - 1] + (x != y)))
        previous = row
    return previous[-1]
