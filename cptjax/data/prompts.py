"""Training examples as encoded prompts: alone, with their gold answer, or with a demonstration of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from cptjax.data.collate import EncodedConversation
from cptjax.data.model_context import ModelContext
from cptjax.data.processor import Processor
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.types import Example


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """A training row as it leaves the data pipeline."""

    example: Example
    encoded: EncodedConversation
    row: int = -1  # its place in the task's training rows


DEMONSTRATION_HINT = (
    "\n\nHere is how someone answered this well:\n",
    "\n\nNow answer in your own words.",
)  # around the demonstration


def demonstration_prompt(prompted: PromptedTask, example: Example) -> list[dict[str, Any]]:
    """The question with a demonstration behind it, and the request for an answer of one's own."""
    if not example.target:
        raise ValueError(
            f"{example.id}: task {prompted.name} has no gold answers to demonstrate, which method.objective='distill' needs"
        )
    *before, last = prompted.build_prompt(example)
    content = (
        [{"type": "text", "text": last["content"]}]
        if isinstance(last["content"], str)
        else list(last["content"])
    )
    return [
        *before,
        {
            **last,
            "content": [
                *content,
                {"type": "text", "text": prompted.gold_response(example).join(DEMONSTRATION_HINT)},
            ],
        },
    ]


def extra_demonstration_tokens(processor: Processor, max_new_tokens: int) -> int:
    """Tokens by which a demonstrated question may be longer than the question: an answer, and the words around it."""
    return max_new_tokens + sum(len(processor.ids(part)) for part in DEMONSTRATION_HINT)


def make_example_encoder(
    model_ctx: ModelContext, prompted_tasks: dict[str, PromptedTask], answered: bool, limit: int
) -> Callable[[Example], EncodedExample]:
    """What turns a training example into a row: its prompt, or its prompt and gold answer; safe to send to worker processes."""
    forms = {
        name: dataclasses.replace(prompted, sandbox=None)
        for name, prompted in prompted_tasks.items()
    }
    processor = model_ctx.processor

    def encode_example(example: Example, row: int = -1) -> EncodedExample:
        form = forms[example.task]
        messages = form.build_prompt(example)
        if answered:
            messages = [*messages, {"role": "assistant", "content": form.gold_response(example)}]
        return EncodedExample(example, processor.encode(messages, limit=limit), row)

    return encode_example
