"""Build and encode the prompts of examples: alone, with the gold response or a demonstration."""

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
    """A training row as the data pipeline returns it."""

    example: Example
    encoded: EncodedConversation
    row: int = -1  # index in the task's training rows


# The text before and after the demonstration.
DEMONSTRATION_HINT = (
    "\n\nHere is how someone answered this well:\n",
    "\n\nNow answer in your own words.",
)


def demonstration_prompt(prompted: PromptedTask, example: Example) -> list[dict[str, Any]]:
    """Return the prompt with the gold response as a demonstration.

    It ends with a request to answer in the model's own words.
    """
    if not example.target:
        raise ValueError(
            f"{example.id}: task {prompted.name} has no gold answers to demonstrate, which "
            "method.objective='distill' needs"
        )
    *before, last = prompted.build_prompt(example)
    demonstration = prompted.gold_response(example).join(DEMONSTRATION_HINT)
    parts = last["content"]
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    return [*before, {**last, "content": [*parts, {"type": "text", "text": demonstration}]}]


def extra_demonstration_tokens(processor: Processor, max_new_tokens: int) -> int:
    """Return the most tokens that a demonstration adds: a response and the text around it."""
    return max_new_tokens + sum(len(processor.ids(part)) for part in DEMONSTRATION_HINT)


def make_example_encoder(
    model_ctx: ModelContext, prompted_tasks: dict[str, PromptedTask], with_gold: bool, limit: int
) -> Callable[..., EncodedExample]:
    """Return a function (example, row=-1) -> EncodedExample, which can be sent to worker processes.

    with_gold: encode the gold response after the prompt.
    """
    # A sandbox owns processes and does not pickle.
    sendable = {
        name: dataclasses.replace(prompted, sandbox=None)
        for name, prompted in prompted_tasks.items()
    }
    processor = model_ctx.processor

    def encode_example(example: Example, row: int = -1) -> EncodedExample:
        prompted = sendable[example.task]
        messages = prompted.build_prompt(example)
        if with_gold:
            response = prompted.gold_response(example)
            messages = [*messages, {"role": "assistant", "content": response}]
        return EncodedExample(example, processor.encode(messages, limit=limit), row)

    return encode_example
