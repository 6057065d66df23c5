"""Each extraction finds the final answer of its form, and nothing else."""

import time

import pytest

from cptjax.tasks.scoring.extract import extract_answer


@pytest.mark.parametrize(
    ("response", "how", "answer"),
    [
        ("  blue \n", "whole", "blue"),
        (" \n", "whole", None),
        (r"\boxed{1} then \boxed{\frac{1}{2}} end", "boxed", r"\frac{1}{2}"),
        (r"\boxed{7} and cut off \boxed{\frac{1}{", "boxed", "7"),
        (r"\boxed{\boxed{5}}", "boxed", "5"),
        (r"\boxed{a \} b}", "boxed", r"a \} b"),
        (r"\boxed {\{1, 2\}}", "boxed", r"\{1, 2\}"),
        (r"\\boxed{5}", "boxed", "5"),
        (r"stray } and { here \boxed{5}", "boxed", "5"),
        (r"\boxed{cut", "boxed", None),
        ("blue", "boxed", None),
        ("<answer>1</answer> <answer> 2\n3 </answer>", "answer_tag", "2\n3"),
        ("<answer>1", "answer_tag", None),
        ("The answer is 3.5. It was easy", "answer_is", "3.5"),
        ("answer is a. Answer: b", "answer_is", "b"),
        ("Answer: a\nThe answer is: the cat.\n", "answer_is", "the cat"),
        ("I do not know", "answer_is", None),
        ("(B).", "letter", "B"),
        ("b", "letter", "B"),
        ("**C**", "letter", "C"),
        ("B. cat", "letter", "B"),
        ("The answer is B.", "letter", "B"),
        ("so the answer is (D) a dog", "letter", "D"),
        ("The answer is B, since A is red", "letter", "B"),
        ("The answer is B because it fits", "letter", "B"),
        ("A. is red, B is not. The answer is: C", "letter", "C"),
        ("The answer is A cat", "letter", None),
        ("A picture of a cat", "letter", None),
        ("cat", "letter", None),
    ],
)
def test_extraction(response, how, answer):
    assert extract_answer(response, how) == answer


@pytest.mark.parametrize(
    "response",
    ["Option B", "The correct option is B.", "The answer is option B.", "b) cat", "B - cat",
     "The correct answer is option (B).", "The answer is B (cat)", "The answer is B (cat), as A is",
     "The answer is B - cat", "The answer is **B**: cat", "The final answer is: $\\boxed{B}$",
     "B\n\nThe picture shows", "B (cat)", "**Answer:**\n\nB. cat", "\\boxed{\\text{B}}",
     "A is red, so \\boxed{B. cat}", 'The answer is "B".', "The answer is \\(B\\).",
     "The answer is B. The other option is wrong.", "The answer is B. No answer is in the picture"],
)  # fmt: skip
def test_an_option_letter_in_the_forms_of_chat_models(response):
    assert extract_answer(response, "letter") == "B"


@pytest.mark.parametrize(
    "response",
    ["Answer: I. think", "I. think it is B", "I: guess so", "A cat sits", "A (big) cat sits",
     "The answer is A (big) cat", "A\nB\nC\nD", "A, B", "The answer is B or C.", "A-level",
     "Option A shows a cat", "The answer is I don't know"],
)  # fmt: skip
def test_words_and_lists_of_letters_are_no_option(response):
    assert extract_answer(response, "letter") is None


def test_extraction_is_linear_in_degenerate_responses():
    start = time.perf_counter()
    extract_answer("\\boxed{" * 20_000, "boxed")
    extract_answer("<answer>" * 20_000, "answer_tag")
    extract_answer("<think>" * 20_000, "whole")
    for repeated in ("answer is B (x ", "answer: \n", "answer is option: ", "B\n", "B (cat ("):
        extract_answer(repeated * 10_000, "letter")
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    "thought", ["<think>\n\n</think>\n\n", "\n<think>A? The answer is A.</think>"]
)
def test_a_leading_thought_is_not_part_of_the_answer(thought):
    for how, response in (
        ("whole", "blue"), ("raw", "blue\n"), ("letter", "B. cat"), ("answer_is", "Answer: blue"),
        ("letter", "<think> B"),
    ):  # fmt: skip
        assert extract_answer(thought + response, how) == extract_answer(response, how)
    assert extract_answer(thought, "whole") is None and extract_answer(thought, "raw") == ""
    later = f"blue {thought}"
    assert extract_answer(later, "raw") == extract_answer(later, "verbatim") == later
    assert extract_answer(thought + "blue", "verbatim") == thought + "blue"
    assert extract_answer("<think> A", "whole") == "<think> A"


def test_unknown_extraction_names_the_known_ones():
    with pytest.raises(
        ValueError,
        match="whole, boxed, boxed_option, answer_tag, answer_is, letter, raw, verbatim; got 'box'",
    ):
        extract_answer("x", "box")


def test_a_boxed_option_falls_back_on_the_whole_response():
    for text, answer in (
        ("so \\boxed{B: cat}", "B"),
        ("so \\boxed{B}", "B"),
        ("\\boxed{} is C", "\\boxed{} is C"),
        ("C: dog", "C"),
        ("The ratio is 1:2", "The ratio is 1:2"),
        ("1: dog", "1: dog"),
        (" ", None),
    ):
        assert extract_answer(text, "boxed_option") == answer
