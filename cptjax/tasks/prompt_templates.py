r"""Prompt templates: what is asked around a question, and where the answer is then expected.

A template is a jinja file. The text of the row is `content`, the row's columns are variables, and what the rest of cptjax must know
stands in the file itself, as constants at its top:

    {% set extract = "boxed" %}            how the answer is found (cptjax/tasks/scoring/extract.py); "whole" where it is not set
    {% set format = "think_boxed" %}       what the format reward asks for (cptjax/tasks/rewards.py); "" = no format term
    {% set forced_prefix = "\\boxed{" %}   what the response is made to begin with when knowledge is scored apart from form
    {% set forced_extract = "boxed" %}     how the answer is found in forced_prefix + completion; as `extract` where it is not set
    {{ content }}
    Write the final answer inside \boxed{}.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cptjax.tasks.scoring.extract import EXTRACTIONS, extract_answer

TEMPLATE_FOLDER = Path(__file__).with_name("templates")
BUILT_IN_TEMPLATES = ("cot", "boxed", "direct", "letter", "answer", "none")
FORMAT_NAMES = ("", "boxed", "think_boxed", "think_answer")
TEMPLATE_SETTINGS = {"extract": "whole", "format": "", "forced_prefix": "", "forced_extract": ""}


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """A prompt template and the form of answer that it asks for."""

    name: str
    source: str
    extract: str
    format: str
    forced_prefix: str
    forced_extract: str

    def render(self, content: str, columns: Mapping[str, Any] | None = None) -> str:
        """The prompt's text; placeholders such as <image> inside `content` pass through."""
        try:
            return (
                _compile_template(self.source)
                .render({**(columns or {}), "content": content})
                .strip()
            )
        except jinja2.UndefinedError as error:
            known = ", ".join(["content", *map(str, columns or {})])
            raise ValueError(
                f"template {self.name}: {error.message}; the row has {known}"
            ) from error
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
        ) as error:  # forbidden, or of a wrong type
            raise ValueError(f"template {self.name}: {error}") from error

    def answer(self, response: str) -> str | None:
        """The final answer of a response, None where the response does not have the form."""
        return extract_answer(response, self.extract)

    def forced_response(self, completion: str) -> str:
        """The forced prefix with its completion; a box or answer tag that the completion left open is closed at the end of its line."""
        if (
            self.forced_extract == "boxed"
            and extract_answer(self.forced_prefix + completion, "boxed") is None
        ):
            completion = completion.split("\n")[0] + "}"
        if self.forced_extract == "answer_tag" and "</answer>" not in completion:
            completion = completion.split("\n")[0] + "</answer>"
        return self.forced_prefix + completion


@functools.cache
def _jinja_environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@functools.cache
def _compile_template(source: str) -> jinja2.Template:
    return _jinja_environment().from_string(source)


@functools.cache
def load_template(name: str) -> PromptTemplate:
    """A built-in template by name, or a user's by the path of its `.jinja` file."""
    path = TEMPLATE_FOLDER / f"{name}.jinja" if name in BUILT_IN_TEMPLATES else Path(name)
    if path.suffix != ".jinja":
        raise ValueError(
            f"unknown template {name!r}; expected {', '.join(BUILT_IN_TEMPLATES)} or the path of a .jinja file"
        )
    if not path.is_file():
        raise ValueError(f"template {name!r}: there is no file {path}")
    source = path.read_text(encoding="utf-8")
    try:
        settings = TEMPLATE_SETTINGS | _read_settings(source)
        _compile_template(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"template {path}, line {error.lineno}: {error.message}") from error
    settings["forced_extract"] = settings["forced_extract"] or settings["extract"]
    _check_template(path, settings)
    return PromptTemplate(name if name in BUILT_IN_TEMPLATES else path.name, source, **settings)


def _read_settings(source: str) -> dict[str, str]:
    """The constants that a template sets under the names of SETTINGS."""
    found = {}
    for node in _jinja_environment().parse(source).body:
        if (
            isinstance(node, jinja2.nodes.Assign)
            and getattr(node.target, "name", None) in TEMPLATE_SETTINGS
        ):
            try:
                found[node.target.name] = node.node.as_const()
            except jinja2.nodes.Impossible as error:
                raise jinja2.TemplateSyntaxError(
                    f"{node.target.name} must be a constant text", node.lineno
                ) from error
    return found


def _check_template(path: Path, settings: Mapping[str, Any]) -> None:
    if not isinstance(settings["forced_prefix"], str):
        raise ValueError(
            f"template {path}: forced_prefix must be a text; got {settings['forced_prefix']!r}"
        )
    allowed = {
        "extract": tuple(EXTRACTIONS),
        "forced_extract": tuple(EXTRACTIONS),
        "format": FORMAT_NAMES,
    }
    for key, values in allowed.items():
        if settings[key] not in values:
            raise ValueError(
                f"template {path}: {key} must be one of {', '.join(map(repr, values))}; got {settings[key]!r}"
            )
