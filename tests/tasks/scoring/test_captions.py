"""Caption scores against hand-computed values and their defining properties."""

import math
from types import SimpleNamespace

import pytest

from cptjax.tasks.scoring import captions, summaries
from cptjax.tasks.scoring.captions import split_caption


def test_words_are_those_of_the_penn_treebank_without_punctuation():
    said = "A man's t-shirt, 3.5 m long; it DOESN'T \"fit\" (he'll see)..."
    assert split_caption(said) == ("a man 's t-shirt 3.5 m long it does n't fit he 'll see".split())
    assert split_caption("?!") == []


def test_rouge_l_combines_the_best_precision_and_recall():
    # The subsequence "a dog runs" is 3 of 4 words of the caption, and 3 of 3 of the second gold.
    words, golds = "a big dog runs".split(), ["a dog sat on a mat".split(), "a dog runs".split()]
    precision, recall, beta = 3 / 4, 1.0, 1.2**2
    expected = (1 + beta) * precision * recall / (recall + beta * precision)
    assert captions.rouge_l(words, golds) == pytest.approx(expected)
    assert captions.rouge_l([], golds) == 0.0 == captions.rouge_l(["x"], golds)


def test_bleu_clips_counts_and_penalises_short_captions():
    (unigram, *_) = captions.bleu_scores([["the"] * 7], [["the cat is on the mat".split()]])
    assert unigram == pytest.approx(2 / 7)  # "the" is twice in the reference
    (unigram, *_) = captions.bleu_scores([["the"] * 2], [[["the", "cat"], ["the", "dog"]]])
    assert unigram == pytest.approx(1 / 2)  # and once in each of these
    words, gold = "a b c".split(), "a b c d".split()
    for n, value in enumerate(captions.bleu_scores([words], [[gold]])[:3]):
        assert value == pytest.approx(math.exp(1 - 4 / 3)), n  # all n-grams match
    one, two = ["a b c d e".split()], ["v w x y z".split()]
    scores = captions.bleu_scores([one[0], "v w q q q".split()], [one, two])
    assert scores[:2] == pytest.approx([7 / 10, math.sqrt(7 / 10 * 5 / 8)])


def test_cider_is_10_for_the_only_reference_and_0_for_words_that_every_image_has():
    golds = [["red cats run home now".split()], ["blue dogs sit here today".split()]]
    same = [g[0] for g in golds]
    assert captions.cider_scores(same, golds) == pytest.approx([10.0, 10.0])
    assert captions.cider_scores(same[::-1], golds) == pytest.approx([0.0, 0.0])
    everywhere = [[["a", "cat"]], [["a", "cat"]]]
    assert captions.cider_scores([["a", "cat"]] * 2, everywhere) == [0.0, 0.0]


def test_cider_weighs_counts_rarity_and_length():
    golds = [["x y".split()], ["z z".split()], ["x w".split()]]
    (score, *_) = captions.cider_scores(["x y y".split(), ["q"], ["q"]], golds)
    x, y = math.log(3 / 2), math.log(3)  # "x" is in two of three images
    one = (x * x + y * y) / (math.hypot(x, 2 * y) * math.hypot(x, y))  # counts are clipped
    two = 1 / math.sqrt(2)  # "x y" of "x y", "y y", all as rare
    assert score == pytest.approx(10 * math.exp(-1 / 72) * (one + two) / 4)


def test_the_summary_has_the_mean_of_all_scores():
    said = ["Red cats run home now.", "A dog"]
    golds = [["red cats run home now"], ["blue dogs sit here today", "a dog sleeps here now"]]
    records = [
        SimpleNamespace(prediction=p, answer=a, score=captions.score_caption(p, a))
        for p, a in zip(said, golds, strict=True)
    ]
    found = summaries.summarise_captions(records)
    parts = [found[name].value for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider")]
    rouge = sum(r.score for r in records) / 2
    assert found["average"].value == pytest.approx((sum(parts) + rouge) / 6)
    assert found["cider"].n == 2 and math.isnan(found["average"].stderr)


def test_rouge_l_of_distinct_words():
    words, gold = "the cat the cat sat".split(), "the cat sat sat".split()
    assert captions.distinct_rouge_l(words, gold) == 1.0
    assert captions.distinct_rouge_l("a b c".split(), "a c d e".split()) == pytest.approx(
        2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    )
    assert captions.distinct_rouge_l(["x"], gold) == 0.0
