"""Paper C, Retaining by Doing (arXiv 2510.18874): train one text task, evaluate the others.

    python launch/train.py --config=configs/retain.py:grpo,countdown,qwen1.5b \\
        --workdir=runs/retain_grpo

The argument names an arm, a task to train, a model and optionally a protocol, in any order:

    sft                        SFT on gold answers (MMLU only; the other tasks have none)
    teacher_sft                the paper's SFT, on the correct responses of a larger model;
                               method.corpus = a file of launch/generate.py
    self_sft                   SFT on the correct ones of 5 own responses, sampled once
    iterative_sft              the same, sampled again in each epoch
    rl_traces                  SFT on the responses of a GRPO run; method.corpus = its rollouts file
    sft_kl                     SFT on gold answers with a KL term (MMLU only)
    grpo grpo_nokl reinforce   GRPO | GRPO without KL | REINFORCE
    ifeval mmlu countdown      the task to train
    qwen1.5b qwen7b llama1b llama8b   the paper's models
    3b 7b tiny                 Qwen2.5-VL
    paper | scripts            the settings of the paper's appendix A.3 | of the released scripts
    bf16                       bfloat16 weights and Adam moments, as in the released code

Splits, group size 5, KL 0.05 (k2) to the stage's start, 4,096 new tokens in evaluations, and the
rule that a truncated response is wrong are those of the release; the reward is 1 or 0. Our protocol
has the SFT learning rates of the scripts and the SFT batches of the appendix. `paper` and `scripts`
are the two sources, which disagree about SFT:

               SFT learning rate, 1B and 1.5B | 7B and 8B     SFT batch
    paper      1e-4 | 5e-6                                    128, Countdown 64
    scripts    1e-4 | 5e-5                                    256, self_sft on Countdown 128

Under both, RL trains log-probabilities at temperature 1 although it samples at 0.8, the epochs of a
corpus count its responses, iterative_sft has one stage per round, prompts and parsers are the
release's, and the drop is the mean over the paper's five non-target sets, two of which
(WildJailbreak, WildGuardTest) are judged by allenai/wildguard. The learning rate of RL is always
that of the scripts.

`bf16` tests a confound: the release has no float32 copy of its weights, and at a learning rate of
5e-6 an update moves only about 8 % of bfloat16 weights, at 1e-4 about 88 %. So RL is a sparse
update by rounding, and SFT is not.
"""

from configs.base import METHODS, pick_word
from configs.base import get_config as base

TASKS = {"ifeval": "retain_ifeval", "mmlu": "retain_mmlu", "countdown": "countdown"}
PUBLISHED_TASKS = {**TASKS, "countdown": "retain_countdown"}
SAFETY = ("wildjailbreak", "wildguardtest")
JUDGE = "allenai/wildguard"
SIZES = {
    "qwen1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen7b": "Qwen/Qwen2.5-7B-Instruct",
    "llama1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama8b": "meta-llama/Llama-3.1-8B-Instruct",
    "3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "tiny": "",
}
LARGE = ("qwen7b", "llama8b", "7b")
PROTOCOLS = ("paper", "scripts")
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


def _as_published(c, arm, task, protocol, size):
    """Set what the paper's appendix or its released scripts do and our protocol does not."""
    c.stages = (dict(task=PUBLISHED_TASKS[task], epochs=2),)
    c.tasks.update({name: dict(task=name, judge=JUDGE) for name in SAFETY})
    others = [t for name, t in PUBLISHED_TASKS.items() if name != task]
    c.eval.general = (*others, "retain_math", *SAFETY)
    c.eval.groups = dict(safety=SAFETY)
    if c.method.objective == "policy":
        c.method.tempered = False
        return
    if protocol == "paper":
        c.train.lr = 5e-6 if size in LARGE else 1e-4
    else:
        c.train.batch = 128 if (arm, task) == ("self_sft", "countdown") else 256
    if arm == "iterative_sft":  # one round per stage: sample, then one pass over what is correct
        c.method.refresh = "never"
        c.stages = 2 * (dict(c.stages[0], epochs=1),)
    if c.method.source != "gold":
        c.method.epoch_unit = "responses"


def get_config(arg="grpo,countdown,qwen1.5b"):
    names = [a for a in arg.split(",") if a]
    words = (*ARMS, *TASKS, *SIZES, *PROTOCOLS, "bf16")
    unknown = [n for n in names if n not in words]
    if unknown:
        raise ValueError(f"configs/retain.py:{arg}: {unknown[0]!r} is none of {', '.join(words)}")
    pick = lambda known, default: pick_word(f"configs/retain.py:{arg}", names, known, default)
    arm, task, size = pick(ARMS, "grpo"), pick(TASKS, "countdown"), pick(SIZES, "qwen1.5b")
    protocol = pick(PROTOCOLS, "")
    if ARMS[arm]["source"] == "gold" and task not in GOLD:
        raise ValueError(
            f"configs/retain.py:{arg}: {task} has no gold answers for {arm}; "
            "choose mmlu, teacher_sft or self_sft"
        )
    c = base()
    c.name = "_".join(filter(None, ("retain", arm, task, size, protocol, pick(("bf16",), ""))))
    c.model.update(path=SIZES[size], remat="block")
    c.stages = (dict(task=TASKS[task], epochs=2),)
    c.data.template = "boxed"
    c.rewards.update(accuracy=1.0, format=0.0)
    c.method.update(ARMS[arm])
    c.method.self_samples = 5
    c.train.update(b2=0.95, weight_decay=0.0, clip=1.0, micro_batch=32)
    if ARMS[arm]["objective"] == "sft":
        lr = 5e-5 if size in LARGE else 1e-4
        c.train.update(batch=BATCH[task], lr=lr, schedule="cosine", warmup=0.03)
    else:
        c.train.update(batch=32, lr=5e-6)
    c.rollout.update(group=5, temperature=0.8, max_new_tokens=3000, gather=True)
    others = tuple(t for name, t in TASKS.items() if name != task)
    c.eval.update(general=(*others, "math"), max_new_tokens=4096, drift=24)
    if protocol:
        _as_published(c, arm, task, protocol, size)
    if "bf16" in names:
        c.model.param_dtype = "bfloat16"
        c.train.moments_dtype = "bfloat16"
    return c.lock()
