"""Golden vectors of the rules for short answers."""

import pytest

from cptjax.tasks.scoring import text


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("Yes.", "yes"),
        ("1,000", "1000"),
        ("it's", "it 's"),
        ("Coca-Cola", "coca cola"),
        ("U.S.A.", "usa"),
        ("none", "0"),
        ("dont", "don't"),
        ("a.b", "ab"),
        ("5:4", "5:4"),
        ("3.5", "3.5"),
        ("$5.00", "$5.00"),
        ("Ten", "10"),
        ("The  cat\n", "cat"),
        ("a -b-c", "bc"),
        ("they'dve", "they'd've"),
        ("somebody'd", "somebodyd"),
        (".5", ".5"),
        ("5.", "5"),
        ("." * 40, "." * 8),
    ],
)
def test_evalai_normaliser(raw, normal):
    assert text.normalise_vqa_answer(raw) == normal


def test_vqa_soft_leaves_the_compared_annotator_out():
    answers = ["red"] * 3 + ["blue"] * 7
    assert text.score_vqa_soft("Red.", answers) == pytest.approx(
        0.9
    )  # 7 see 3 matches -> 1, 3 see 2 matches -> 2/3; the plain rule gives 1
    assert text.score_vqa_soft("red", ["red"] * 4 + ["blue"] * 6) == 1.0
    assert text.score_vqa_soft("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    assert text.score_vqa_soft("red", ["red"] * 2 + ["blue"] * 8) == pytest.approx(0.6)
    assert text.score_vqa_soft("green", answers) == 0.0
    assert (
        text.score_vqa_soft("the Red", "red") == 1.0
        and text.score_vqa_soft("red", ["red", "red"]) == 1.0
    )


def test_modal_answer():
    answers = ["unanswerable"] * 4 + ["Dog", "dog", "a dog", "DOG.", "dog"] + ["cat"]
    assert (
        text.score_vqa_em_modal("dog", answers) == 1.0
    )  # only after normalisation is "dog" the most frequent
    assert text.score_vqa_em_modal("unanswerable", answers) == 0.0
    assert text.score_vqa_em_modal("two", "2") == 1.0


def test_exact_rules_differ_where_they_should():
    cases = {"blue": (1, 1, 1), "Blue.": (0, 1, 1), "it is blue": (0, 0, 1), "blu": (0, 0, 0)}
    for said, expected in cases.items():
        assert (
            text.score_exact(said, "blue"),
            text.score_exact_match(said, "blue"),
            text.score_contains(said, "blue"),
        ) == expected
    assert text.score_exact_match("on", "no") == 0.0
    assert text.score_exact("b", ["a", "b"]) == 1.0
    assert text.score_contains("anything", "") == 0.0


def test_anls():
    assert text.score_anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert text.score_anls("Kitten ", ["dog", "kitten"]) == 1.0
    assert text.score_anls("abcd", ["abxy"]) == 0.5 and text.score_anls("abcd", ["axyz"]) == 0.0
    assert text.score_anls("a" * 20_000, ["a"]) == 0.0


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("No, yes is wrong", "no"),
        ("yes and no", "yes"),
        ("is it yes or no", None),
        ("nothing", None),
    ],
)
def test_yes_or_no(said, found):
    assert text.parse_yes_no(said) == found


def llava_pope(said):
    """Read yes or no as LLaVA's evaluation of POPE does."""
    first = said.split(".")[0] if "." in said else said
    words = first.replace(",", "").split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


@pytest.mark.parametrize(
    "said",
    ["Yes", "yes.", "No", "no.", "NO", "No, there is not", "There is not a dog", "There is a dog",
     "Yes, there is no doubt", "Yes. There is no dog", "no\ndog", "Yes\nno", "nothing", "", "no!"],
)  # fmt: skip
def test_pope_is_llavas_rule(said):
    assert text.parse_pope(said) == llava_pope(said)
    assert text.score_pope(said, "yes") == float(llava_pope(said) == "yes")
    assert text.score_pope(said, "no") == float(llava_pope(said) == "no")


@pytest.mark.parametrize(
    ("said", "strict", "lenient"),
    [
        ("No.", 1, 1),
        ("NO", 1, 1),
        ("n-o", 1, 1),
        (" no", 0, 1),
        ("no ", 0, 1),
        ("no way", 0, 0),
        ("yes", 0, 0),
        ("", 0, 0),
        ("n o", 0, 0),
    ],
)
def test_gqa_strict_beside_lenient(said, strict, lenient):
    assert text.score_gqa_strict(said, "no") == strict
    assert text.score_exact_match(said, "no") == lenient


@pytest.mark.parametrize(
    ("said", "read"),
    [("Yes.", "yes"), ("n", "no"), ("Y", "yes"), ("It is no", "other"), ("nope", "no"),
     ("not sure, yes", "no"), ("", "other"), ("x", "other"), ("  Yes, it is", "yes")],
)  # fmt: skip
def test_mme_looks_at_the_first_four_characters(said, read):
    assert text.parse_mme(said) == read


def test_lower_exact_match_ignores_case_and_outer_space_only():
    score = text.score_lower_exact_match
    assert score(" Nokia 3310 ", "nokia 3310") == 1.0
    assert score("nokia 3310.", "nokia 3310") == score("nokia  3310", "nokia 3310") == 0.0


@pytest.mark.parametrize(
    ("said", "words", "is_in"),
    [("It is Port-au-Prince.", "port-au-prince", True), ("the symbol Na", "Na", True),
     ("Nagoya", "Na", False), ("pre-Na", "Na", False), ("(Na)", "Na", True), ("", "Na", False),
     ("New  Delhi", "New Delhi", False), ("a.b", "a?b", False)],
)  # fmt: skip
def test_words_are_whole_and_case_is_ignored(said, words, is_in):
    assert text.score_contains_words(said, words) == is_in
    assert text.score_contains_words(said, [words, "nothing"]) == is_in


@pytest.mark.parametrize(
    ("said", "words"),
    [("It is Brasília", "Brasilia"), ("Yaounde", "Yaoundé"), ("Bogota\N{COMBINING ACUTE ACCENT}",
     "Bogota"), ("Chișinău", "CHISINAU"), ("N’Djamena", "N'Djamena"), ("N'Djamena", "N’Djamena")],
)  # fmt: skip
def test_words_are_found_with_or_without_accents(said, words):
    assert text.score_contains_words(said, words) == 1.0
    assert text.score_contains_words(f"{said}x", words) == 0.0
    assert text.score_only_option(said, words, {"options": [words, "Rome"]}) == 1.0


def test_one_option_alone_is_right():
    row = {"options": ["Tom", "Anna"]}
    score = lambda said: text.score_only_option(said, "Tom", row)
    assert [score(s) for s in ("Tom", "tom has it.", "Tom, not Anna", "Anna", "Tommy")] == [
        1, 1, 0, 0, 0
    ]  # fmt: skip
    for numbers in ([12, 13], "[12, 13]"):
        assert text.score_only_option("12", 12, {"options": numbers}) == 1.0
        assert text.score_only_option("12 or 13", "12", {"options": numbers}) == 0.0
    for options in ({}, {"options": ["Anna"]}):
        with pytest.raises(ValueError, match="expected the column `options` with the answer 'Tom'"):
            text.score_only_option("Tom", "Tom", options)


def test_json_is_compared_by_value_and_stands_alone():
    gold = '{"name": "Tom", "age": 7}'
    assert text.score_json('{\n  "age": 7,\n  "name": "Tom"\n}\n', gold) == 1
    for said in ('{"name": "Tom", "age": "7"}', f"{gold}\n```", f"Here: {gold}", "[" * 10_000, "{"):
        assert text.score_json(said, gold) == 0, said
