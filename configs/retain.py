"""Paper C, Retaining by Doing (arXiv 2510.18874): train one text task, evaluate the others.

    python launch/train.py --config=configs/retain.py:grpo,countdown,3b --workdir=runs/retain_grpo

The argument names an arm, a task to train and a size, in any order:

    sft                        SFT on gold answers (MMLU only; the other tasks have none)
    teacher_sft                the paper's SFT, on the correct responses of a larger model;
                               method.corpus = a jsonl file with id and response
    self_sft                   SFT on the correct ones of 5 own responses, sampled once
    iterative_sft              the same, sampled again in each epoch
    rl_traces                  SFT on the responses of a GRPO run; method.corpus = its rollouts file
    sft_kl                     SFT on gold answers with a KL term (MMLU only)
    grpo grpo_nokl reinforce   GRPO | GRPO without KL | REINFORCE
    ifeval mmlu countdown      the task to train
    3b 7b tiny                 the model

Splits, group size 5, KL 0.05 (k2), the RL batch of 32, the learning rates of 7B and the rule that a
truncated response is wrong are those of the paper's scripts; the SFT batches are those of its
appendix A.3 (the scripts have 256). The prompts of Countdown and MATH ask for a final \\boxed{};
MMLU and IFEval have their own prompts. The reward is 1 or 0.
"""

from configs.base import METHODS
from configs.base import get_config as base

TASKS = {"ifeval": "retain_ifeval", "mmlu": "retain_mmlu", "countdown": "countdown"}
SIZES = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct", "tiny": ""}
GOLD = ("mmlu",)
BATCH = dict(ifeval=128, mmlu=128, countdown=64)
RL = dict(kl_coef=0.05, kl_estimator="k2", normalise="sequence", truncated="zero")
ARMS = {
    "sft": METHODS["sft"],
    "teacher_sft": {**METHODS["corpus_sft"], "name": "teacher_sft"},
    "self_sft": METHODS["self_sft"],
    "iterative_sft": METHODS["iterative_sft"],
    "rl_traces": {**METHODS["corpus_sft"], "name": "rl_traces"},
    "sft_kl": {**METHODS["sft"], "kl_coef": 0.05, "kl_estimator": "k2", "name": "sft + KL"},
    "grpo": {**METHODS["grpo"], **RL},
    "grpo_nokl": {**METHODS["grpo"], **RL, "kl_coef": 0.0, "name": "grpo w/o KL"},
    "reinforce": {**METHODS["reinforce"], **RL},
}


def get_config(arg="grpo,countdown,3b"):
    names = [a for a in arg.split(",") if a]
    unknown = [n for n in names if n not in (*ARMS, *TASKS, *SIZES)]
    if unknown:
        raise ValueError(
            f"configs/retain.py:{arg}: {unknown[0]!r} is none of "
            f"{', '.join((*ARMS, *TASKS, *SIZES))}"
        )
    pick = lambda known, default: next((n for n in names if n in known), default)
    arm, task, size = pick(ARMS, "grpo"), pick(TASKS, "countdown"), pick(SIZES, "3b")
    if ARMS[arm]["source"] == "gold" and task not in GOLD:
        raise ValueError(
            f"configs/retain.py:{arg}: {task} has no gold answers for {arm}; "
            "choose mmlu, teacher_sft or self_sft"
        )
    c = base()
    c.name = f"retain_{arm}_{task}_{size}"
    c.model.update(path=SIZES[size], remat="block")
    c.stages = (dict(task=TASKS[task], epochs=2),)
    c.data.template = "boxed"
    c.rewards.update(accuracy=1.0, format=0.0)
    c.method.update(ARMS[arm])
    c.method.self_samples = 5
    c.train.update(b2=0.95, weight_decay=0.0, clip=1.0, micro_batch=32)
    if ARMS[arm]["objective"] == "sft":
        c.train.update(batch=BATCH[task], lr=5e-5, schedule="cosine", warmup=0.03)
    else:
        c.train.update(batch=32, lr=5e-6)
    c.rollout.update(group=5, temperature=0.8, max_new_tokens=3000, gather=True)
    c.eval.update(
        general=tuple(t for name, t in TASKS.items() if name != task) + ("math",),
        max_new_tokens=3000,
    )
    return c.lock()
