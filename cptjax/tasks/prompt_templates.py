r"""Prompt templates: the instruction around a row's text, and how to read the answer.

A template is a jinja file. In it, `content` is the text of the row, `answer_instruction` the task's
statement of which answers are accepted ("" if it has none), and the row's columns are variables.
All built-in templates contain both texts. `released_cot` and `released_nocot` are worded as in the
released code of arXiv 2507.05386. Constants at the top say how to read the responses:

    {% set extract = "boxed" %}            how to find the answer, see scoring/extract.py
    {% set format = "think_boxed" %}       the form to reward, see rewards.py; "" = none
    {% set forced_prefix = "\\boxed{" %}   a forced start of the response, for evaluation
    {% set forced_extract = "boxed" %}     `extract` for forced_prefix + completion
    {{ content }}
    {{ answer_instruction }}
    Write the final answer inside \boxed{}.

Without `extract`, the answer is the whole response; without `forced_extract`, it is `extract`. A
forced prefix separates what the model knows from whether it responds in the right form.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from cptjax.common import files
from cptjax.tasks import template_worker
from cptjax.tasks.scoring.extract import EXTRACTIONS, extract_answer

TEMPLATE_FOLDER = Path(__file__).with_name("templates")
BUILT_IN_TEMPLATES = (
    "cot",
    "boxed",
    "steps",
    "direct",
    "letter",
    "answer",
    "none",
    "released_cot",
    "released_nocot",
)
FORMAT_NAMES = ("", "boxed", "think_boxed", "think_answer")
# What closes a response whose forced prefix opens a box or an answer tag.
FORCED_ENDS = {"boxed": "}", "answer_tag": "</answer>"}
TEMPLATE_SETTINGS = {"extract": "whole", "format": "", "forced_prefix": "", "forced_extract": ""}


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """A prompt template and the form of response that it asks for."""

    name: str
    source: str
    extract: str
    format: str
    forced_prefix: str
    forced_extract: str

    @property
    def is_built_in(self) -> bool:
        return self.name in BUILT_IN_TEMPLATES

    def render(
        self, content: str, columns: Mapping[str, Any] | None = None, answer_instruction: str = ""
    ) -> str:
        """Return the text of the prompt; placeholders such as <image> in `content` are kept."""
        variables = self.variables(content, columns, answer_instruction)
        try:
            text = _compile_template(self.source).render(variables).strip()
        except jinja2.UndefinedError as error:
            known = ", ".join(map(str, variables))
            raise ValueError(
                f"template {self.name}: {error.message}; the row has {known}"
            ) from error
        # Raised for an attribute that the sandbox forbids, or a column of the wrong type.
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"template {self.name}: {error}") from error
        except Exception as error:
            raise ValueError(f"template {self.name}: {files.describe_error(error)}") from error
        if not text:
            raise ValueError(
                f"template {self.name}: gives an empty prompt; write {{{{ content }}}}"
            )
        return text

    def variables(
        self, content: str, columns: Mapping[str, Any] | None = None, answer_instruction: str = ""
    ) -> dict[str, Any]:
        """Return the variables of the template for a row."""
        own = {"content": content, "answer_instruction": answer_instruction}
        return own | {k: v for k, v in (columns or {}).items() if k not in own}

    def answer(self, response: str) -> str | None:
        """Return the final answer of a response, or None if the response lacks the form."""
        return extract_answer(response, self.extract)

    def forced_response(self, completion: str) -> str:
        """Return the forced prefix followed by its sampled completion.

        An open box or answer tag is closed at the end of its line.
        """
        response = self.forced_prefix + completion
        is_open = (
            extract_answer(response, "boxed") is None
            if self.forced_extract == "boxed"
            else "</answer>" not in completion
        )
        if is_open and self.forced_extract in FORCED_ENDS:
            line = completion.split("\n")[0]
            return f"{self.forced_prefix}{line}{FORCED_ENDS[self.forced_extract]}"
        return response

    def wrap_target(self, target: str) -> str:
        """Return the forced prefix, the whole target, and the end of its box or answer tag."""
        return f"{self.forced_prefix}{target}{FORCED_ENDS.get(self.forced_extract, '')}"


_jinja_environment = functools.cache(template_worker.make_environment)


@functools.cache
def _compile_template(source: str) -> jinja2.Template:
    return _jinja_environment().from_string(source)


@functools.cache
def load_template(name: str) -> PromptTemplate:
    """Load a built-in template by name, or a user's by the path of its `.jinja` file."""
    path = TEMPLATE_FOLDER / f"{name}.jinja" if name in BUILT_IN_TEMPLATES else Path(name)
    if path.suffix != ".jinja":
        raise ValueError(
            f"unknown template {name!r}; expected {', '.join(BUILT_IN_TEMPLATES)} "
            "or the path of a .jinja file"
        )
    if not path.is_file():
        raise ValueError(f"template {name!r}: there is no file {path}")
    try:
        source = path.read_text(encoding="utf-8")
        settings = TEMPLATE_SETTINGS | _read_settings(source)
        if name not in BUILT_IN_TEMPLATES:
            template_worker.refuse_unbounded_template(path.name, source)
        _compile_template(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"template {path}, line {error.lineno}: {error.message}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"template {path}: not UTF-8 ({error})") from error
    except RecursionError:
        raise ValueError(f"template {path}: its blocks or brackets are nested too deep") from None
    settings["forced_extract"] = settings["forced_extract"] or settings["extract"]
    _check_template(path, settings)
    return PromptTemplate(name if name in BUILT_IN_TEMPLATES else path.name, source, **settings)


def _read_settings(source: str) -> dict[str, str]:
    """Return the constants of TEMPLATE_SETTINGS that a template sets."""
    settings = {}
    for node in _jinja_environment().parse(source).body:
        if (
            isinstance(node, jinja2.nodes.Assign)
            and getattr(node.target, "name", None) in TEMPLATE_SETTINGS
        ):
            if not isinstance(node.node, jinja2.nodes.Const):
                raise jinja2.TemplateSyntaxError(
                    f"{node.target.name}: expected a constant text", node.lineno
                )
            settings[node.target.name] = node.node.value
    return settings


def _check_template(path: Path, settings: Mapping[str, Any]) -> None:
    if not isinstance(settings["forced_prefix"], str):
        raise ValueError(
            f"template {path}: forced_prefix: expected a text, got {settings['forced_prefix']!r}"
        )
    allowed = {
        "extract": tuple(EXTRACTIONS),
        "forced_extract": tuple(EXTRACTIONS),
        "format": FORMAT_NAMES,
    }
    for key, values in allowed.items():
        if settings[key] not in values:
            raise ValueError(
                f"template {path}: {key}: expected {', '.join(map(repr, values))}; "
                f"got {settings[key]!r}"
            )
