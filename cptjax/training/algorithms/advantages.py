"""Advantages [Q, G] from rewards [Q, G]: GRPO, RLOO, ReMax, REINFORCE and relatives; length rules.

Example: two groups of three, rewards [[1, 0, 0], [1, 1, 0]], greedy rewards [0, 1]. The batch mean
is 1/2; the unbiased standard deviations are sqrt(1/3) in both groups and sqrt(3/10) in the batch.

    reinforce    [[1,      0,       0      ], [1,      1,      0      ]]  reward
    reinforce01  [[1,      0,       0      ], [1,      1,      0      ]]  1 if accuracy > .5, else 0
    remax        [[1,      0,       0      ], [0,      0,      -1     ]]  reward - greedy reward
    dr_grpo      [[2/3,    -1/3,    -1/3   ], [1/3,    1/3,    -2/3   ]]  reward - group mean
    rloo         [[1,      -1/2,    -1/2   ], [1/2,    1/2,    -1     ]]  reward - mean of others
    grpo         [[1.1547, -.57735, -.57735], [.57735, .57735, -1.1547]]  dr_grpo / group sd
    batch        [[1.2172, -.60858, -.60858], [.60858, .60858, -1.2172]]  dr_grpo / batch sd
    reinforce++  [[.91287, -.91287, -.91287], [.91287, .91287, -.91287]]  (r - mean) / sd, per batch

`batch` and `reinforce++` need the rewards of the whole batch, of all hosts. `reinforce01` is given
accuracies (or rewards where there are none), since a reward with a format part, or the jigsaw's
reward of up to 3, can exceed 1/2 for a wrong answer.

Departures from the papers: 1. Excluded responses get advantage 0 and count in no mean. 2. A group
whose rewards are all equal gets exactly 0, not rounding noise divided by 1e-6. 3. The length rules
also apply to ReMax's greedy response, but its reward has no KL term where kl_place is "reward", and
a response that `mask` would leave out keeps its reward as the baseline. 4. REINFORCE++ gives every
token the KL of the whole response, not only of the tokens after it.
"""

from typing import Any

import numpy as np

from cptjax.types import Array

ADVANTAGES = (
    "grpo",
    "dr_grpo",
    "rloo",
    "remax",
    "reinforce",
    "reinforce01",
    "reinforce++",
    "batch",
)
GROUP_ADVANTAGES = ("grpo", "dr_grpo", "rloo", "batch")
TRUNCATION_RULES = ("score", "zero", "mask")
STD_EPS = 1e-6


def check_names(advantage: str, truncated: str) -> None:
    """Refuse the names of an advantage and of a truncation rule that do not exist."""
    if advantage not in ADVANTAGES:
        raise ValueError(f"method.advantage={advantage!r}: choose one of {', '.join(ADVANTAGES)}")
    if truncated not in TRUNCATION_RULES:
        raise ValueError(
            f"method.truncated={truncated!r}: choose one of {', '.join(TRUNCATION_RULES)}"
        )


def check_advantage(
    advantage: str, group: int, *, truncated: str, overlong: int, max_new_tokens: int
) -> None:
    """Refuse settings that give no training signal or make no sense."""
    check_names(advantage, truncated)
    if group < 1:
        raise ValueError(f"rollout.group={group}: expected at least 1 response per prompt")
    if group == 1 and advantage in GROUP_ADVANTAGES:
        others = ", ".join(n for n in ADVANTAGES if n not in GROUP_ADVANTAGES)
        raise ValueError(
            f"method.advantage={advantage!r} compares the responses of a group: set rollout.group "
            f">= 2, or choose one of {others}"
        )
    if not 0 <= overlong <= max_new_tokens:
        raise ValueError(
            f"method.overlong={overlong}: expected tokens between 0 and "
            f"rollout.max_new_tokens={max_new_tokens}"
        )


def compute_advantages(
    rewards: Array, name: str, *, greedy: Array | None = None, keep: Array | None = None
) -> Array:
    """Compute advantages [Q, G] from rewards [Q, G].

    `greedy` [Q] is ReMax's baseline; `keep` [Q, G] is False for responses to leave out.
    """
    if (name == "remax") != (greedy is not None):
        raise ValueError(
            f"method.advantage={name!r} {'needs' if greedy is None else 'takes no'} greedy "
            "rewards, one per prompt"
        )
    xp = rewards.__array_namespace__()
    keep = xp.ones(rewards.shape, bool) if keep is None else keep
    rewards = xp.where(keep, rewards, 0).astype(xp.float32)
    return xp.where(keep, _formula(xp, rewards, name, greedy, keep), 0).astype(xp.float32)


def _formula(xp: Any, rewards: Array, name: str, greedy: Array | None, keep: Array) -> Array:
    match name:
        case "reinforce":
            return rewards
        case "reinforce01":
            return (rewards > 0.5).astype(xp.float32)
        case "remax":
            return rewards - greedy[:, None]
        case "reinforce++":
            return _centred(xp, rewards, keep, None) / (_std(xp, rewards, keep, None) + STD_EPS)
        case "batch":
            return _centred(xp, rewards, keep, 1) / (_std(xp, rewards, keep, None) + STD_EPS)
    centred = _centred(xp, rewards, keep, 1)
    if name == "grpo":
        return centred / (_std(xp, rewards, keep, 1) + STD_EPS)
    n = keep.sum(1, keepdims=True)
    return centred * n / xp.maximum(n - 1, 1) if name == "rloo" else centred


def _centred(xp: Any, rewards: Array, keep: Array, axis: int | None) -> Array:
    """Subtract the mean of the kept rewards.

    The largest reward is subtracted first, so that equal rewards give exactly 0.
    """
    distance = rewards - xp.where(keep, rewards, -xp.inf).max(axis, keepdims=True)
    distance = xp.where(keep, distance, 0)
    return distance - distance.sum(axis, keepdims=True) / xp.maximum(
        keep.sum(axis, keepdims=True), 1
    )


def _std(xp: Any, rewards: Array, keep: Array, axis: int | None) -> Array:
    squares = xp.where(keep, _centred(xp, rewards, keep, axis) ** 2, 0)
    return xp.sqrt(
        squares.sum(axis, keepdims=True) / xp.maximum(keep.sum(axis, keepdims=True) - 1, 1)
    )


def overlong_penalty(lengths: Array, limit: int, window: int) -> np.ndarray:
    """Return DAPO's length penalty: 0 up to limit - window tokens, then linear to -1 at limit."""
    over = np.asarray(lengths, np.float32) - (limit - window)
    return -np.clip(over / window, 0, 1) if window else np.zeros(np.shape(lengths), np.float32)


def trained_responses(finished: np.ndarray, truncated: str) -> np.ndarray:
    """Return a mask of the responses to train on; see `shape_rewards`."""
    return finished if truncated == "mask" else np.ones_like(finished)


def shape_rewards(
    rewards: np.ndarray,
    lengths: np.ndarray,
    finished: np.ndarray,
    *,
    limit: int,
    truncated: str,
    overlong: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return rewards [Q, G] after the length rules, and a mask [Q, G] of the responses to train on.

    `lengths` are in tokens; `finished` is False where the length limit cut a response. `truncated`
    says what such a response gets: its own reward (score), reward 0 (zero), or exclusion from
    baselines and loss (mask).
    """
    keep = trained_responses(finished, truncated)
    scored = np.where(finished, rewards, 0) if truncated == "zero" else rewards
    return (scored + overlong_penalty(lengths, limit, overlong)).astype(np.float32), keep


def group_metrics(accuracy: np.ndarray) -> dict[str, float]:
    """Return the shares of groups whose accuracies [Q, G] are all 1 or all 0."""
    equal = np.ptp(accuracy, axis=1) <= 1e-6
    return {
        "all_right": float((equal & (accuracy[:, 0] > 1 - 1e-6)).mean()),
        "all_wrong": float((equal & (accuracy[:, 0] < 1e-6)).mean()),
    }
