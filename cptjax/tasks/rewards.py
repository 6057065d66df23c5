r"""What a response earns: parts by name, of which "reward" is learned from and the others are logged.

    reward = weight(accuracy) * scorer(extracted answer) + weight(format) * (does the whole response have the form?)

The papers' weights are 0.9 and 0.1. A template that asks for no form has no format term, and there the reward is the accuracy.
The jigsaw's reward is hit + accuracy + format, unweighted (arXiv 2506.23508). A user's function replaces all of this: as
`file.py:function` it runs in worker processes under a time limit, as a function of a task or config in this process, without one.
Departure: `<think>...</think><answer>...</answer>` must hold each tag once, so that a response can not hide a second answer.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cptjax.tasks.prompt_templates import PromptTemplate
from cptjax.tasks.scoring import scorers
from cptjax.tasks.scoring.extract import boxed_answer
from cptjax.tasks.scoring.puzzles import jigsaw_hit_rate
from cptjax.tasks.scoring.sandbox import (
    SandboxCall,
    SandboxPool,
    call_in_process,
    shared_sandbox_pool,
    split_target,
)
from cptjax.tasks.scoring.scorers import Scorer

RewardParts = dict[str, float]
THINK_ANSWER_PATTERN = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)


def has_box(response: str) -> bool:
    r"""Is there a `\boxed{}` whose braces close?"""
    return boxed_answer(response) is not None


def thinks_then_boxes(response: str) -> bool:
    r"""Is the whole response `<think>...</think>...\boxed{...}...`? Space around `<`, `>` and `/` is squeezed out first."""
    rest = re.sub(r"\s*([<>/])\s*", r"\1", response)
    # Searched mark by mark, in linear time: as a pattern of `.*` a degenerate response of repeated tags would take minutes.
    for mark in ("</think>", "\\boxed{", "}"):
        before, found, rest = rest.partition(mark)
        if not found or (mark == "</think>" and not before.startswith("<think>")):
            return False
    return True


def thinks_then_answers(response: str) -> bool:
    """Is the whole response `<think>...</think><answer>...</answer>`, each tag once?"""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    return (
        all(response.count(tag) == 1 for tag in tags)
        and THINK_ANSWER_PATTERN.fullmatch(response.strip()) is not None
    )


FORMAT_CHECKS: dict[str, Callable[[str], bool]] = {
    "boxed": has_box,
    "think_boxed": thinks_then_boxes,
    "think_answer": thinks_then_answers,
}


@dataclasses.dataclass(frozen=True)
class Reward:
    """How a task's responses are rewarded: by its scorer and template, by the jigsaw's sum, or by a user's function."""

    name: str
    template: PromptTemplate
    scorer: Scorer
    accuracy: float = 0.9  # weights
    format: float = 0.1
    target: str | Callable = (
        ""  # a user's: file.py:function, or a function (completion, answer, **columns)
    )
    on_error: str = "stop"  # stop | zero: a user's function (or scorer) that raises, hangs or gives no finite number
    extraction: str = ""  # "" = the template's

    def __call__(
        self,
        completions: Sequence[str],
        answers: Sequence[Any],
        metas: Sequence[Mapping[str, Any]],
        ids: Sequence[str],
        pool: SandboxPool | None = None,
    ) -> list[RewardParts]:
        """The parts of each completion; `pool` gives the time limit for what runs in worker processes."""
        if self.target:
            return _user_parts(self, completions, answers, metas, ids, pool)
        how = self.extraction or self.template.extract
        records = scorers.score_responses(
            self.scorer,
            completions,
            answers,
            metas,
            ids,
            extraction=how,
            pool=pool,
            on_error=self.on_error,
        )
        combine = _jigsaw_parts if self.name == "jigsaw" else _weighted_parts
        return [
            combine(self, completion, record)
            for completion, record in zip(completions, records, strict=True)
        ]


def find_reward(
    name: str | Callable,
    template: PromptTemplate,
    scorer: Scorer,
    *,
    accuracy: float = 0.9,
    format: float = 0.1,
    on_error: str = "stop",
    extraction: str = "",
    pool: SandboxPool | None = None,
) -> Reward:
    """The reward of a task: "" or "default" = its scorer's, "jigsaw", another scorer, `file.py:function` (loaded now), a function."""
    if on_error not in ("stop", "zero"):
        raise ValueError(f"rewards.on_error must be stop or zero; got {on_error!r}")
    if min(accuracy, format) < 0 or accuracy + format == 0:
        raise ValueError(
            f"reward weights must be >= 0 and not both 0; got accuracy={accuracy}, format={format}"
        )
    settings = {
        "template": template,
        "accuracy": accuracy,
        "format": format,
        "on_error": on_error,
        "extraction": extraction,
    }
    if callable(name):
        return Reward(name.__name__, scorer=scorer, target=name, **settings)
    if ".py:" in name:
        path, function = split_target(name)
        target = f"{path.resolve()}:{function}"
        (pool or shared_sandbox_pool()).load(target)
        return Reward(f"{path.name}:{function}", scorer=scorer, target=target, **settings)
    if name == "jigsaw":
        return Reward(name, scorer=scorers.SCORERS["jigsaw"], **settings)
    chosen = scorer if name in ("", "default") else scorers.find_scorer(name)
    return Reward(chosen.name, scorer=chosen, **settings)


def _weighted_parts(reward: Reward, completion: str, record: scorers.ScoreRecord) -> RewardParts:
    parts = {"accuracy": record.score, "extracted": float(record.prediction is not None)}
    if record.error:
        parts["error"] = 1.0
    if not reward.template.format:
        return {"reward": record.score, **parts}
    form = float(FORMAT_CHECKS[reward.template.format](completion))
    return {
        "reward": reward.accuracy * record.score + reward.format * form,
        **parts,
        "format": form,
    }


def _jigsaw_parts(reward: Reward, completion: str, record: scorers.ScoreRecord) -> RewardParts:
    hit = jigsaw_hit_rate(record.prediction or "", record.answer)
    form = (
        float(FORMAT_CHECKS[reward.template.format](completion)) if reward.template.format else 0.0
    )
    return {
        "reward": hit + record.score + form,
        "hit": hit,
        "accuracy": record.score,
        "format": form,
    }


def _user_parts(
    reward: Reward,
    completions: Sequence[str],
    answers: Sequence[Any],
    metas: Sequence[Mapping[str, Any]],
    ids: Sequence[str],
    pool: SandboxPool | None,
) -> list[RewardParts]:
    calls = [
        SandboxCall((c, a), scorers.keyword_columns(m))
        for c, a, m in zip(completions, answers, metas, strict=True)
    ]
    here = callable(reward.target)
    outcomes = (
        [call_in_process(reward.target, c) for c in calls]
        if here
        else (pool or shared_sandbox_pool()).map(reward.target, calls)
    )
    name = reward.name if here else Path(reward.target).parent / reward.name
    parts = []
    for row_id, outcome in zip(ids, outcomes, strict=True):
        value = outcome.value if isinstance(outcome.value, Mapping) else {"reward": outcome.value}
        error = outcome.error or _describe_wrong_parts(value)
        if error and reward.on_error == "stop":
            hint = "correct the function, or set rewards.on_error=zero to score such rows 0"
            raise ValueError(f"reward {name} failed on row {row_id}: {error}; {hint}")
        parts.append(
            {"reward": 0.0, "error": 1.0} if error else {k: float(v) for k, v in value.items()}
        )
    return parts


def _describe_wrong_parts(value: Mapping[str, Any]) -> str:
    """What is wrong with the parts of a user's reward; "" for finite numbers with "reward" among them."""
    if "reward" not in value:
        return f"returned the parts {', '.join(map(str, value)) or 'none'}; expected one named 'reward'"
    wrong = [
        f"{key}: {message}"
        for key, v in value.items()
        if (message := scorers.describe_non_number(v))
    ]
    return wrong[0] if wrong else ""


def is_correct(parts: dict[str, float]) -> bool:
    """Fully right: by accuracy where there is one, else by reward."""
    return parts.get("accuracy", parts.get("reward", 0.0)) >= 1.0
