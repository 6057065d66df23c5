"""Render templates of users and of model folders in a worker process first, with limits.

A template is a program: its loops may be endless and its texts larger than the memory. What a
worker process has rendered within its limits of time and memory is then rendered by the caller.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cptjax.tasks.scoring.sandbox import SandboxCall, SandboxPool

MAX_CHARACTERS = 2**24  # of a rendered prompt
ROWS_PER_CALL = 256  # rendered within one time limit
TIME_LIMIT, MEMORY_LIMIT = 10.0, 2 << 30  # seconds, bytes of address space


@functools.cache
def _worker_pool() -> SandboxPool:
    return SandboxPool(processes=1, timeout=TIME_LIMIT, memory=MEMORY_LIMIT)


def make_environment() -> ImmutableSandboxedEnvironment:
    """Return the environment of prompt templates."""
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, optimized=False
    )
    environment.globals.pop("lipsum")  # random text
    return environment


def render_rows(source: str, rows: Sequence[Mapping[str, Any]]) -> int:
    """Render a prompt template for some rows; return the largest number of characters.

    A row that cannot be rendered counts 0: the caller finds its error.
    """
    template, longest = make_environment().from_string(source), 0
    for row in rows:
        try:
            longest = max(longest, len(template.render(row)))
        except MemoryError:
            raise
        except Exception:
            continue
    return longest


def render_chat(source: str, messages: list[dict[str, Any]]) -> int:
    """Render a chat template as transformers does; return the number of characters."""
    from transformers.utils import chat_template_utils

    texts, _ = chat_template_utils.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True
    )
    return len(texts[0])


def refuse_unbounded_template(name: str, source: str) -> None:
    """Refuse a template that needs too much time or memory before it is rendered.

    jinja2 computes constant expressions when it compiles a template.
    """
    _refuse_unbounded(f"template {name}", "render_rows", source, [])


def refuse_unbounded_prompts(
    name: str, source: str, rows: Sequence[Mapping[str, Any]], first: str
) -> None:
    """Refuse a prompt template that needs too much time or memory for some rows.

    `first` names the first of the rows.
    """
    _refuse_unbounded(
        f"template {name} on row {first} or one after it", "render_rows", source, rows
    )


def refuse_unbounded_chat(name: str, source: str, messages: list[dict[str, Any]]) -> None:
    """Refuse a chat template that needs too much time or memory for a conversation.

    Other errors are left to the caller, who renders it.
    """
    _refuse_unbounded(f"the chat template of {name}", "render_chat", source, messages)


def _refuse_unbounded(what: str, function: str, *args: Any) -> None:
    target = f"{__file__}:{function}"
    outcome = _worker_pool().map(target, [SandboxCall(args)])[0]
    error = outcome.error or ""
    if outcome.late or error.startswith(("MemoryError", "its process died")):
        raise ValueError(f"{what}: {error.partition(';')[0]}; simplify the template")
    if not error and outcome.value > MAX_CHARACTERS:
        raise ValueError(
            f"{what}: gives {outcome.value} characters, more than {MAX_CHARACTERS}; simplify it"
        )
