"""A task as one stage or evaluation asks it: the question under a template, its gold answer, its reward and its score."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cptjax.tasks import prompt_templates, rewards
from cptjax.tasks.prompt_templates import PromptTemplate
from cptjax.tasks.scoring import scorers
from cptjax.tasks.scoring.sandbox import SandboxPool
from cptjax.tasks.task import Task, content_text, text_to_parts
from cptjax.types import Example


@dataclasses.dataclass(frozen=True)
class PromptedTask:
    """One task, one template, one way to reward and to score."""

    task: Task
    template: PromptTemplate
    scorer: scorers.Scorer
    reward: rewards.Reward
    pool: SandboxPool
    also: tuple[scorers.Scorer, ...] = ()  # reported beside `scorer`

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def forced_prefix(self) -> str:
        return self.task.forced_prefix or self.template.forced_prefix

    def messages(self, example: Example) -> list[dict[str, Any]]:
        """The conversation with the template's instruction in its last user turn."""
        *before, last = example.messages
        text = content_text(last["content"])
        if self.template.name == "direct":
            suffixes = [
                s for s in (example.meta.get("direct_suffix"), self.task.direct_suffix) if s
            ]
            text = (
                "\n".join([text, *suffixes])
                if suffixes
                else self.template.render(text, example.meta)
            )
        else:
            text = self.template.render(text, example.meta)
        shown = [] if isinstance(last["content"], str) else last["content"]
        images, videos = (
            [p[kind] for p in shown if p["type"] == kind] for kind in ("image", "video")
        )
        return [*before, {**last, "content": text_to_parts(text, images, videos)}]

    def gold(self, example: Example) -> str:
        """What SFT learns: the target as it is where it has the template's form, else the target put into that form."""
        if not example.target:
            raise ValueError(
                f"{example.id}: task {self.name} has no gold answers to learn from; use a method with source='rollouts'"
            )
        if self.template.extract == "whole" or self.template.answer(example.target) is not None:
            return example.target
        return self.template.forced_response(example.target)

    def rewards(
        self, completions: Sequence[str], examples: Sequence[Example]
    ) -> list[dict[str, float]]:
        """The reward's parts of each completion."""
        return self.reward(completions, *_scoring_columns(examples), pool=self.pool)

    def score(
        self, responses: Sequence[str], examples: Sequence[Example], forced: bool = False
    ) -> list[scorers.ScoreRecord]:
        """A record per response; `forced`: the responses follow the forced prefix."""
        how = self.task.extraction or self.template.extract
        if forced and not self.task.forced_prefix:
            responses, how = (
                [self.template.forced_response(r) for r in responses],
                self.template.forced_extract,
            )
        elif forced:
            responses = [f"{self.forced_prefix} {r.strip()}" for r in responses]
        return scorers.score_responses(
            self.scorer, responses, *_scoring_columns(examples), extraction=how, pool=self.pool
        )


def make_prompted_task(task: Task, template: str, settings: Any, pool: SandboxPool) -> PromptedTask:
    """The task under a template ("" = the task's own), with the reward weights of `config.rewards`."""
    chosen = prompt_templates.load_template(task.template or template)
    scorer, *also = (_load_scorer(each, pool) for each in (task.scorer, *task.also))
    weights = dict(accuracy=settings.accuracy, format=settings.format, on_error=settings.on_error)
    reward = rewards.find_reward(
        task.reward, chosen, scorer, pool=pool, extraction=task.extraction, **weights
    )
    return PromptedTask(task, chosen, scorer, reward, pool, tuple(also))


def _load_scorer(scorer: Any, pool: SandboxPool) -> scorers.Scorer:
    """A scorer that is there: a user's file is loaded now."""
    if not isinstance(scorer, str):
        return scorers.Scorer(scorer.__name__, scorer)
    found = scorers.find_scorer(scorer)
    if found.own:
        pool.load(found.rule)
    return found


def _scoring_columns(
    examples: Sequence[Example],
) -> tuple[list, list[Mapping[str, Any]], list[str]]:
    return [e.answer for e in examples], [e.meta for e in examples], [e.id for e in examples]
