"""What a method needs in a stage: other models, log-probabilities, arrays of its loss."""

import dataclasses
from typing import Any

from cptjax.training.algorithms.continual_learning.table import continual_methods


@dataclasses.dataclass(frozen=True)
class MethodNeeds:
    """What the steps of a method compute and keep in addition to the policy and its update."""

    # A copy of the weights of the stage's start: "" = none, rounded = in the type of the
    # arithmetic, exact = in the type of the parameters.
    start: str
    reference: str  # the model of the KL term: "" = none | base | stage | a model's folder
    # "" = none, start = the model of the stage's start, follower = weights of its own, in float32,
    # that follow the student's, model = another model, of a folder
    teacher: str
    demonstrations: bool  # the teacher's prompts show them
    kl_in_reward: bool
    drift: bool  # of the policy from the stage's start, on the sampled responses
    policy_logps: bool  # of the policy that sampled a step's responses
    # The first update of a step needs them too. It does not where its ratios are those of a policy
    # to itself, 1, and no later update trains on the same responses.
    first_policy_logps: bool
    greedy_samples: bool  # one greedy response to each prompt
    # The settings of sampling that the offline filter changes; {} = it samples nothing.
    filter_sampling: dict[str, Any]
    self_samples: int  # responses to each prompt of a Self-SFT window; 0 = none
    # By name in `Batch.extra`, with the letters of its shape: B rows, A targets of a row, D width
    # of the model, V vocabulary.
    arrays: dict[str, str]

    @property
    def other_reference(self) -> bool:
        """Whether the reference is a model of a folder."""
        return self.reference not in ("", "base", "stage")


def method_needs(method: Any, ahead: int = 0) -> MethodNeeds:
    """Return what `config.method` of a stage needs, with rollouts as old as `rollout.ahead`."""
    methods = continual_methods(method)
    samples = method.source == "rollouts"
    several_updates = method.updates_per_batch * method.passes > 1
    needs_ratio = several_updates or (ahead > 0 and method.ratio != "none")
    reference = method.kl_reference if method.kl_coef else ""
    kl_in_reward = bool(reference) and method.kl_place == "reward"
    teacher = ""
    if method.objective == "distill":
        kinds = {"frozen": "start", "ema": "follower", "current": "follower"}
        teacher = kinds.get(method.distill.teacher, "model")
    elif any(m.needs_teacher for m in methods):
        teacher = "start"
    drift = any(m.needs_drift for m in methods)
    start = ""
    if any(m.needs_start for m in methods):
        start = "exact"
    elif reference == "stage" or teacher == "start" or drift:
        start = "rounded"
    arrays = {
        "advantages": ("B", samples),
        "sampler_logps": ("B A", samples),
        "behaviour_logps": ("B A", samples and method.tis_cap is not None),
        "old_logps": ("B A", needs_ratio),
        "ref_logps": ("B A", reference and not kl_in_reward),
        "teacher_hidden": ("B A D", teacher),
        "teacher_unembed": ("D V", teacher),
    }
    return MethodNeeds(
        start=start,
        reference=reference,
        teacher=teacher,
        demonstrations=method.objective == "distill" and teacher != "model",
        kl_in_reward=kl_in_reward,
        drift=drift,
        policy_logps=needs_ratio or kl_in_reward or drift,
        first_policy_logps=kl_in_reward
        or drift
        or (needs_ratio and (ahead > 0 or method.passes > 1)),
        greedy_samples=samples and method.advantage == "remax",
        filter_sampling=_filter_sampling(dict(method.filter or {})),
        self_samples=method.self_samples if method.source == "self" else 0,
        arrays={name: letters for name, (letters, needed) in arrays.items() if needed},
    )


def _filter_sampling(filter: dict[str, Any]) -> dict[str, Any]:
    if "samples" not in filter or filter.get("corpus"):
        return {}
    top_p = filter.get("top_p")
    return {"group": filter["samples"]} | ({} if top_p is None else {"top_p": top_p})
