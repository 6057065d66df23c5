"""Score captions against references as coco-caption does: BLEU, ROUGE-L and CIDEr-D.

Texts are split into words by rules close to those of the Penn Treebank tokenizer, without
punctuation. METEOR is left out: its public scorer is a Java program with a table of paraphrases.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import LCSseq

from cptjax.tasks.scoring.text import gold_answers

MAX_ORDER = 4  # words of the longest n-gram
ROUGE_BETA = 1.2  # weight of recall
CIDER_SIGMA = 6.0  # words; width of the penalty on a difference of length
CLITIC = r"n't\b|'(?:s|re|ve|ll|d|m)\b"
WORDS = re.compile(rf"{CLITIC}|[^\W_]+(?:[-.,:][^\W_]+)*")
TINY, SMALL = 1e-15, 1e-9  # of the public BLEU: 0 / 0 is 0


def split_caption(text: str) -> list[str]:
    """Return the words of a caption in lower case: "A man's dog." -> a man 's dog."""
    return WORDS.findall(re.sub(f"({CLITIC})", r" \1", text.lower()))


def rouge_l(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the F of the best precision and recall of the longest common subsequences."""
    common = [LCSseq.similarity(words, reference) for reference in references]
    precision = max(common) / max(1, len(words))
    recall = max(c / max(1, len(r)) for c, r in zip(common, references, strict=True))
    square = ROUGE_BETA**2
    if not precision or not recall:
        return 0.0
    return (1 + square) * precision * recall / (recall + square * precision)


def score_caption(prediction: str, answer: Any, meta: Any = None) -> float:
    """Return the ROUGE-L of a caption."""
    return rouge_l(split_caption(prediction), [split_caption(a) for a in gold_answers(answer)])


def count_ngrams(words: Sequence[str]) -> list[Counter]:
    """Return how often each n-gram occurs, for n = 1 to 4."""
    return [
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        for n in range(1, MAX_ORDER + 1)
    ]


def bleu_scores(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[float]:
    """Return BLEU-1 to BLEU-4 of a corpus, with the closest reference length of each caption."""
    matched, guessed = np.zeros(MAX_ORDER), np.zeros(MAX_ORDER)
    length = reference_length = 0
    for words, golds in zip(captions, references, strict=True):
        length += len(words)
        reference_length += min((abs(len(g) - len(words)), len(g)) for g in golds)[1]
        most = [Counter() for _ in range(MAX_ORDER)]
        for gold in golds:
            most = [a | b for a, b in zip(most, count_ngrams(gold), strict=True)]
        for n, counts in enumerate(count_ngrams(words)):
            matched[n] += (counts & most[n]).total()
            guessed[n] += counts.total()
    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = math.exp(min(0.0, 1 - 1 / ratio))
    precisions = (matched + TINY) / (guessed + SMALL)
    orders = np.arange(1, MAX_ORDER + 1)
    return list(np.exp(np.cumsum(np.log(precisions)) / orders) * brevity)


def cider_scores(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[float]:
    """Return the CIDEr-D of each caption.

    An n-gram weighs the less, the more images have it in their references.
    """
    counts = [[count_ngrams(gold) for gold in golds] for golds in references]
    images = Counter(
        ngram for golds in counts for ngram in {g for gold in golds for c in gold for g in c}
    )
    total = math.log(len(captions))

    def weigh(ngrams: Counter) -> dict[tuple, float]:
        return {g: n * (total - math.log(max(1, images[g]))) for g, n in ngrams.items()}

    def similarity(caption: Counter, gold: Counter) -> float:
        a, b = weigh(caption), weigh(gold)
        norms = math.hypot(*a.values()) * math.hypot(*b.values())
        return sum(min(a[g], b[g]) * b[g] for g in a.keys() & b.keys()) / norms if norms else 0.0

    scores = []
    for words, golds in zip(captions, counts, strict=True):
        own = count_ngrams(words)
        values = []
        for gold in golds:
            difference = own[1].total() - gold[1].total()
            penalty = math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
            pairs = zip(own, gold, strict=True)
            values.append(penalty * np.mean([similarity(a, b) for a, b in pairs]))
        scores.append(10 * float(np.mean(values)))
    return scores


def distinct_rouge_l(words: Sequence[str], gold: Sequence[str]) -> float:
    """Return ROUGE-L as the package `rouge` does: F of the distinct words in the subsequence."""
    removed = {op.src_pos for op in LCSseq.editops(words, gold) if op.tag == "delete"}
    common = len({word for i, word in enumerate(words) if i not in removed})
    precision, recall = common / max(1, len(set(words))), common / max(1, len(set(gold)))
    return 2 * precision * recall / (precision + recall) if common else 0.0
