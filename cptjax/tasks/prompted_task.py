"""One task with one prompt template: its prompts, gold responses, rewards and scores."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.common import files
from cptjax.tasks import prompt_templates, rewards, template_worker
from cptjax.tasks.prompt_templates import PromptTemplate
from cptjax.tasks.scoring import scorers
from cptjax.tasks.scoring.sandbox import SandboxPool, split_target
from cptjax.tasks.task import Task, content_text, place_media
from cptjax.types import Example


@dataclasses.dataclass(frozen=True)
class PromptedTask:
    """A task with its template, its reward and its scorers."""

    task: Task
    template: PromptTemplate
    scorer: scorers.Scorer
    reward: rewards.Reward
    sandbox: SandboxPool  # where symbolic algebra and a user's functions run
    extra_scorers: tuple[scorers.Scorer, ...] = ()  # reported in addition to `scorer`

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def forced_prefix(self) -> str:
        return self.task.forced_prefix or self.template.forced_prefix

    def build_prompt(self, example: Example) -> list[dict[str, Any]]:
        """Return an example's conversation with the instructions in the last turn."""
        *before, last = example.messages
        text = self.template.render(*self._template_arguments(example))
        parts = [] if isinstance(last["content"], str) else last["content"]
        images = [part["image"] for part in parts if part["type"] == "image"]
        videos = [part["video"] for part in parts if part["type"] == "video"]
        return [*before, *place_media([{**last, "content": text}], images, videos)]

    def _template_arguments(self, example: Example) -> tuple[str, Mapping[str, Any], str]:
        of_row = example.meta.get("answer_instruction")
        instructions = [str(text) for text in (of_row, self.task.answer_instruction) if text]
        content = content_text(example.messages[-1]["content"])
        return content, example.meta, "\n".join(instructions)

    def refuse_unbounded_prompts(self, examples: Sequence[Example], rows: Sequence[int]) -> None:
        """Refuse a user's template that takes too much time or memory for one of these rows."""
        size = template_worker.ROWS_PER_CALL
        for start in range(0, 0 if self.template.is_built_in else len(rows), size):
            variables = []
            for row in rows[start : start + size]:
                with contextlib.suppress(ValueError):  # the row itself is bad
                    variables.append(
                        self.template.variables(*self._template_arguments(examples[row]))
                    )
            template_worker.refuse_unbounded_prompts(
                self.template.name, self.template.source, variables, f"{rows[start]}"
            )

    def gold_response(self, example: Example) -> str:
        """Return the response that SFT trains on: the target, in the template's form."""
        if not example.target:
            raise ValueError(
                f"{example.id}: task {self.name} has no gold answers to train on; "
                "use a method with source='rollouts'"
            )
        if self.template.extract == "whole" or self.template.answer(example.target) is not None:
            return example.target
        return self.template.wrap_target(example.target)

    def gold_continuation(self, example: Example) -> tuple[str, str]:
        """Return the forced prefix and the gold answer that continues it."""
        prefix, answer = self.forced_prefix, str(example.answer)
        if prefix and answer.startswith(prefix):  # such as the "{" of JSON
            return prefix, answer.removeprefix(prefix)
        space = " " if prefix[-1:].isalnum() or prefix.endswith(":") else ""
        return prefix, f"{space}{answer}"

    def compute_rewards(
        self, completions: Sequence[str], examples: Sequence[Example]
    ) -> list[rewards.RewardParts]:
        """Compute the reward of each completion, by parts."""
        if self.reward.scorer.reads != "response" and not self.reward.target:
            raise ValueError(
                f"task {self.name} is scored by a {self.reward.scorer.reads}, which only "
                "evaluates; to train on it, give it a reward"
            )
        return self.reward(completions, *_scoring_columns(examples), pool=self.sandbox)

    def check_answer(self, example: Example, rewarded: bool) -> None:
        """Raise the error of a built-in scorer that cannot use the row's answer or columns.

        `rewarded` checks for the reward's scorer, else for those that evaluate. Scorers in worker
        processes are left out, since they are slow.
        """
        used = (self.reward.scorer,) if rewarded else (self.scorer, *self.extra_scorers)
        for scorer in () if rewarded and self.reward.target else used:
            is_plain = scorers.SCORERS.get(scorer.name) is scorer and callable(scorer.rule)
            if is_plain and scorer.reads == "response":
                scorer.rule("", example.answer, example.meta)

    def score(
        self, responses: Sequence[str], examples: Sequence[Example], forced: bool = False
    ) -> list[scorers.ScoreRecord]:
        """Score each response; with `forced`, the responses continue the forced prefix."""
        extraction = self.task.extraction or self.template.extract
        if forced and self.task.forced_prefix:
            responses = [f"{self.forced_prefix} {response.strip()}" for response in responses]
        elif forced:
            responses = [self.template.forced_response(response) for response in responses]
            extraction = self.template.forced_extract
        return scorers.score_responses(
            self.scorer,
            responses,
            *_scoring_columns(examples),
            extraction=extraction,
            pool=self.sandbox,
        )


def make_prompted_task(
    task: Task, template: str, settings: Any, sandbox: SandboxPool
) -> PromptedTask:
    """Combine a task with a prompt template.

    The task's own template takes precedence; `settings` are `config.rewards`.
    """
    loaded = prompt_templates.load_template(task.template or template)
    scorer, *extra = (_load_scorer(each, sandbox) for each in (task.scorer, *task.also))
    _check_judge(task, scorer, sandbox)
    reward = rewards.find_reward(
        task.reward,
        loaded,
        scorer,
        accuracy=settings.accuracy,
        format=settings.format,
        on_error=settings.on_error,
        extraction=task.extraction,
        short_words=settings.short_words,
        short_penalty=settings.short_penalty,
        pool=sandbox,
    )
    return PromptedTask(task, loaded, scorer, reward, sandbox, tuple(extra))


def _check_judge(task: Task, scorer: scorers.Scorer, sandbox: SandboxPool) -> None:
    """Refuse a task without the judge that its scorer needs, and load a judge that is a file."""
    if scorer.reads == "judge" and not task.judge:
        raise ValueError(
            f"task {task.name}: its scorer {scorer.name} needs a judge; set judge in "
            f"tasks.{task.name} to the folder or hub id of a model, or to file.py:function"
        )
    if task.judge and scorer.reads != "judge":
        raise ValueError(
            f"task {task.name}: a judge belongs to the scorer refusal, not to {scorer.name}"
        )
    if ".py:" in task.judge:
        path, function = split_target(task.judge)
        sandbox.load(f"{path.resolve()}:{function}")
    elif task.judge and not Path(task.judge).is_dir() and files.find_hub_id(task.judge) is None:
        raise ValueError(
            f"task {task.name}: judge={task.judge!r} is neither the Hugging Face folder of a model "
            "nor a hub id nor file.py:function"
        )


def _load_scorer(scorer: str | Callable, sandbox: SandboxPool) -> scorers.Scorer:
    """Return a scorer by name.

    A user's file is loaded immediately, so that its errors appear before step 0.
    """
    if not isinstance(scorer, str):
        return scorers.Scorer(scorer.__name__, scorer)
    by_name = scorers.find_scorer(scorer)
    if by_name.is_users:
        sandbox.load(by_name.rule)
    return by_name


def _scoring_columns(
    examples: Sequence[Example],
) -> tuple[list[Any], list[Mapping[str, Any]], list[str]]:
    return [e.answer for e in examples], [e.meta for e in examples], [e.id for e in examples]
