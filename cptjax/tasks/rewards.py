r"""The reward of a response: named parts; "reward" is trained on, the others are logged.

    reward = accuracy weight * scorer(extracted answer) + format weight * (1 if the form is right)

The papers' weights are 0.9 and 0.1. A template without a form has no format term: the reward is
the accuracy. A response of few words can be made to lose a part of its reward (short_words). The
jigsaw's reward is hit + accuracy + format, unweighted (arXiv 2506.23508). A user's function
replaces all of this: given as `file.py:function`, it runs in worker processes with a time limit;
given as a function object, it runs in this process without one. Departure:
`<think>...</think><answer>...</answer>` must contain each tag once, so that a response cannot hide
a second answer.
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
    r"""Return whether a response has a `\boxed{}` whose braces close."""
    return boxed_answer(response) is not None


def squeeze_around_tags(text: str) -> str:
    """Remove the space around each `<`, `>` and `/`, in linear time."""
    pieces = re.split(r"([<>/])", text)
    last = len(pieces) - 1
    for i in range(0, len(pieces), 2):  # the marks are at odd places
        pieces[i] = pieces[i] if i == 0 else pieces[i].lstrip()
        pieces[i] = pieces[i] if i == last else pieces[i].rstrip()
    return "".join(pieces)


def thinks_then_boxes(response: str) -> bool:
    r"""Return whether the whole response is `<think>...</think>...\boxed{...}...`.

    Space around `<`, `>` and `/` is ignored.
    """
    rest = squeeze_around_tags(response)
    # One mark after the other takes linear time; a regular expression with `.*` takes minutes on a
    # response of repeated tags.
    for mark in ("</think>", "\\boxed{", "}"):
        before, match, rest = rest.partition(mark)
        if not match or (mark == "</think>" and not before.startswith("<think>")):
            return False
    return True


def thinks_then_answers(response: str) -> bool:
    """Return whether the response is `<think>...</think><answer>...</answer>`, each tag once."""
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
    """The rule that rewards responses: a scorer, the jigsaw's sum or a user's function."""

    name: str
    template: PromptTemplate
    scorer: Scorer
    accuracy: float = 0.9  # weight
    format: float = 0.1  # weight
    # a user's file.py:function, or function (completion, answer, **columns)
    target: str | Callable = ""
    # stop | zero: what to do where a user's function or scorer raises, hangs or returns no finite
    # number
    on_error: str = "stop"
    extraction: str = ""  # "" = the template's
    short_words: int = 0  # a response of fewer words loses short_penalty
    short_penalty: float = 0.5

    def __call__(
        self,
        completions: Sequence[str],
        answers: Sequence[Any],
        metas: Sequence[Mapping[str, Any]],
        ids: Sequence[str],
        pool: SandboxPool | None = None,
    ) -> list[RewardParts]:
        """Compute the reward parts of each completion.

        `pool` holds the worker processes and their time limit.
        """
        if self.target:
            return _user_parts(self, completions, answers, metas, ids, pool)
        extraction = self.extraction or self.template.extract
        records = scorers.score_responses(
            self.scorer,
            completions,
            answers,
            metas,
            ids,
            extraction=extraction,
            pool=pool,
            on_error=self.on_error,
        )
        combine = _jigsaw_parts if self.name == "jigsaw" else _weighted_parts
        parts = [
            combine(self, completion, record)
            for completion, record in zip(completions, records, strict=True)
        ]
        return [_subtract_short(self, c, p) for c, p in zip(completions, parts, strict=True)]


def check_weights(accuracy: float, format: float, on_error: str) -> None:
    """Refuse settings of `config.rewards` that make no sense."""
    if on_error not in ("stop", "zero"):
        raise ValueError(f"rewards.on_error: expected stop or zero, got {on_error!r}")
    if not (min(accuracy, format) >= 0 and accuracy + format > 0):
        raise ValueError(
            "reward weights: expected >= 0 and not both 0, "
            f"got accuracy={accuracy}, format={format}"
        )


def find_reward(
    name: str | Callable,
    template: PromptTemplate,
    scorer: Scorer,
    *,
    accuracy: float = 0.9,
    format: float = 0.1,
    on_error: str = "stop",
    extraction: str = "",
    short_words: int = 0,
    short_penalty: float = 0.5,
    pool: SandboxPool | None = None,
) -> Reward:
    """Return the reward of a task.

    `name` is "" or "default" (reward by the task's scorer), "jigsaw", another scorer, a
    `file.py:function` (loaded immediately), or a function.
    """
    check_weights(accuracy, format, on_error)
    if short_words < 0 or short_penalty < 0:
        raise ValueError(
            "rewards: expected short_words and short_penalty >= 0, "
            f"got {short_words} and {short_penalty}"
        )
    settings = {
        "short_words": short_words,
        "short_penalty": short_penalty,
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
    if name not in ("", "default"):
        scorer = scorers.find_scorer(name)
    return Reward(scorer.name, scorer=scorer, **settings)


def _weighted_parts(reward: Reward, completion: str, record: scorers.ScoreRecord) -> RewardParts:
    parts = {"accuracy": record.score, "extracted": float(record.prediction is not None)}
    if record.error:
        parts["error"] = 1.0
    if not reward.template.format:
        return {"reward": record.score, **parts}
    form = float(FORMAT_CHECKS[reward.template.format](completion))
    total = reward.accuracy * record.score + reward.format * form
    return {"reward": total, **parts, "format": form}


def _subtract_short(reward: Reward, completion: str, parts: RewardParts) -> RewardParts:
    if not reward.short_words:
        return parts
    short = float(len(completion.split()) < reward.short_words)
    return {**parts, "reward": parts["reward"] - reward.short_penalty * short, "short": short}


def _jigsaw_parts(reward: Reward, completion: str, record: scorers.ScoreRecord) -> RewardParts:
    hit = jigsaw_hit_rate(record.prediction or "", record.answer)
    has_form = FORMAT_CHECKS.get(reward.template.format)
    form = float(has_form(completion)) if has_form else 0.0
    total = hit + record.score + form
    return {"reward": total, "hit": hit, "accuracy": record.score, "format": form}


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
    if callable(reward.target):
        name, outcomes = reward.name, [call_in_process(reward.target, call) for call in calls]
    else:
        name = Path(reward.target).parent / reward.name
        outcomes = (pool or shared_sandbox_pool()).map(reward.target, calls)
    parts = []
    for row_id, outcome in zip(ids, outcomes, strict=True):
        value = outcome.value if isinstance(outcome.value, Mapping) else {"reward": outcome.value}
        error = outcome.error or _describe_wrong_parts(value)
        if error and reward.on_error == "stop":
            hint = "correct the function, or set rewards.on_error=zero to score such rows 0"
            raise ValueError(f"reward {name} failed on row {row_id}: {error}; {hint}")
        if error:
            parts.append({"reward": 0.0, "error": 1.0})
        else:
            parts.append({key: float(v) for key, v in value.items()})
    return parts


def _describe_wrong_parts(value: Mapping[str, Any]) -> str:
    """Describe what is wrong with the parts of a user's reward.

    Return "" if all are finite numbers and one is named "reward".
    """
    if "reward" not in value:
        names = ", ".join(map(str, value)) or "none"
        return f"returned the parts {names}; expected one named 'reward'"
    for key, v in value.items():
        if message := scorers.describe_non_number(v):
            return f"{key}: {message}"
    return ""


def is_correct(parts: dict[str, float]) -> bool:
    """Return whether a response is fully correct, by its accuracy or else by its reward."""
    return parts.get("accuracy", parts.get("reward", 0.0)) >= 1.0
