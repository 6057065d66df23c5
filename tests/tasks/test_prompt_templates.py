"""Prompt templates state the expected form, and find the answer in that form."""

import pytest

from cptjax.tasks import prompt_templates
from cptjax.tasks.rewards import FORMAT_CHECKS
from cptjax.tasks.scoring.extract import extract_answer

GOOD = {  # a response in the form that each template asks for
    "cot": "<think>because</think> The result is \\boxed{blue}.",
    "boxed": "So \\boxed{blue}",
    "steps": "First this, so \\boxed{blue}",
    "answer": "<think>because</think>\n<answer>blue</answer>",
    "letter": "Red is wrong. The answer is: B",
    "direct": "blue",
    "none": "blue",
    "released_cot": "<think>because</think> \\boxed{blue}",
    "released_nocot": "blue",
}
FORCED = {  # a completion of the forced prefix
    "cot": "blue} and more",
    "boxed": "blue",  # cut before the brace
    "steps": "blue} and more",
    "answer": "blue\nmore",
    "letter": " B. It",
    "direct": " blue.",
    "none": " blue. It is",
    "released_cot": "blue} and more",
    "released_nocot": " blue.",
}


def forced_answer(template, completion):
    return extract_answer(template.forced_response(completion), template.forced_extract)


@pytest.mark.parametrize("name", prompt_templates.BUILT_IN_TEMPLATES)
def test_built_in_templates_find_the_answer_they_ask_for(name):
    template = prompt_templates.load_template(name)
    answer = "B" if name == "letter" else "blue"
    assert template.answer(GOOD[name]) == answer
    assert forced_answer(template, FORCED[name]) == answer
    assert not template.format or FORMAT_CHECKS[template.format](GOOD[name])
    prompt = template.render("<image>What colour?")
    assert prompt.startswith("<image>What colour?") and (name == "none") == (
        prompt == "<image>What colour?"
    )


def test_templates_name_the_marks_they_extract():
    assert all(
        mark in prompt_templates.load_template("cot").render("q")
        for mark in ("<think>", "</think>", "\\boxed{}")
    )
    assert all(
        mark in prompt_templates.load_template("answer").render("q")
        for mark in ("<think>", "</think>", "<answer>", "</answer>")
    )
    assert "think" not in prompt_templates.load_template("direct").render("q")


def test_formats_agree_with_rewards():
    assert set(prompt_templates.FORMAT_NAMES) - {""} == set(FORMAT_CHECKS)


def write(tmp_path, source, name="mine.jinja"):
    (tmp_path / name).write_text(source, encoding="utf-8")
    return prompt_templates.load_template(str(tmp_path / name))


def test_a_users_template_sees_columns_and_states_its_form(tmp_path):
    settings = '{% set extract = "answer_tag" %}\n{% set forced_prefix = "<answer>" %}\n'
    template = write(
        tmp_path,
        settings + "{{ hint }}: {{ content }} {% for o in options %}{{ o }};{% endfor %}\n",
    )
    assert (
        template.render("q?", {"hint": "H", "options": ["a", "b"], "content": "another"})
        == "H: q? a;b;"
    )
    assert (template.extract, template.format, template.forced_extract) == (
        "answer_tag",
        "",
        "answer_tag",
    )
    assert template.name == "mine.jinja" and forced_answer(template, "7</answer>") == "7"


def test_content_is_text_not_a_template():
    assert (
        prompt_templates.load_template("none").render("{{ 7 * 7 }} {% set x = 1 %}")
        == "{{ 7 * 7 }} {% set x = 1 %}"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ content }} {{ hnt }}",
            r"mine\.jinja: 'hnt' is undefined; the row has content, answer_instruction, hint",
        ),
        ("{{ content.__class__.__mro__ }}", r"mine\.jinja: access to attribute '__class__'"),
        ("{% for i in range(10**9) %}x{% endfor %}", r"mine\.jinja: Range too big"),
        ("{{ content + 1 }}", r"mine\.jinja: can only concatenate"),
    ],
)
def test_rendering_errors_name_the_template(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, source).render("q", {"hint": "h"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ content", r"mine\.jinja, line 1: unexpected end"),
        ('{% set extract = "box" %}', r"extract: expected 'whole', 'boxed', .*; got 'box'"),
        ('{% set format = "cot" %}', r"format: expected '', 'boxed', .*; got 'cot'"),
        ("\n{% set extract = content %}", r"line 2: extract: expected a constant text"),
        ("{% set forced_prefix = 3 %}", r"forced_prefix: expected a text, got 3"),
    ],
)
def test_loading_errors_name_the_file(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, source)


def test_unknown_names():
    with pytest.raises(
        ValueError,
        match=r"unknown template 'cott'; expected cot, boxed, steps, direct, letter, answer, none, .* or the path",
    ):
        prompt_templates.load_template("cott")
    with pytest.raises(ValueError, match=r"there is no file nowhere\.jinja"):
        prompt_templates.load_template("nowhere.jinja")
