"""Paper C, Retaining by Doing (arXiv 2510.18874): one text task at a time, gain on it, drop on the others.

    python launch/train.py --config=configs/retain.py:grpo,countdown,3b --workdir=runs/retain_grpo

The argument names an arm, a target task and a size: sft self_sft iterative_sft corpus_sft grpo grpo_nokl reinforce |
ifeval mmlu countdown | 3b 7b tiny. Batch, group 5, KL 0.05, learning rates and truncated = wrong as in the paper's scripts.
"""

from configs.base import METHODS
from configs.base import get_config as base

TASKS = ("ifeval", "mmlu", "countdown")
SIZES = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct", "tiny": ""}
BATCH = dict(ifeval=128, mmlu=128, countdown=64)
RL = dict(kl_coef=0.05, kl_estimator="k2", normalise="sequence", truncated="zero")
ARMS = {
    "sft": METHODS["sft"],
    "self_sft": METHODS["self_sft"],
    "iterative_sft": METHODS["iterative_sft"],
    "corpus_sft": METHODS["corpus_sft"],
    "grpo": {**METHODS["grpo"], **RL},
    "grpo_nokl": {**METHODS["grpo"], **RL, "kl_coef": 0.0, "name": "grpo w/o KL"},
    "reinforce": {**METHODS["reinforce"], **RL},
}


def get_config(arg="grpo,countdown,3b"):
    names = [a for a in arg.split(",") if a]
    unknown = [n for n in names if n not in (*ARMS, *TASKS, *SIZES)]
    if unknown:
        raise ValueError(f"configs/retain.py:{arg}: {unknown[0]!r} is none of {', '.join((*ARMS, *TASKS, *SIZES))}")
    pick = lambda known, default: next((n for n in names if n in known), default)
    arm, task, size = pick(ARMS, "grpo"), pick(TASKS, "countdown"), pick(SIZES, "3b")
    c = base()
    c.name = f"retain_{arm}_{task}_{size}"
    c.model.path = SIZES[size]
    c.stages = (dict(task=task, epochs=2),)
    c.data.template = "none"
    c.method.update(ARMS[arm])
    rl = ARMS[arm].get("objective") != "sft"
    c.train.update(batch=32 if rl else BATCH[task], lr=5e-6 if rl else 5e-5, b2=0.95, weight_decay=0.0, clip=1.0, micro_batch=32)
    c.train.update(schedule="constant" if rl else "cosine", warmup=0.0 if rl else 0.03)
    c.rollout.update(group=5, temperature=0.8, max_new_tokens=3000)
    c.method.self_samples = 5
    c.eval.update(general=tuple(t for t in (*TASKS, "math") if t != task), max_new_tokens=3000)
    c.model.remat = "block"
    return c
