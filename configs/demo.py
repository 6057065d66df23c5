"""Five methods on synthetic tasks: a tiny model on a CPU, in minutes, without downloads.

    bash launch/quickstart.sh            # or
    python launch/train.py --config=configs/demo.py --workdir=runs/demo

A pre-stage trains a tiny Qwen2.5-VL to medium skill: it responds "it is red", "answer : red" or
"i think red", and its labels are mostly wrong for half of the classes. Five arms then train on
colour -> shape -> digit -> count. Comparison, jigsaw, facts and arithmetic are not trained again
and measure general knowledge:

    sft_bare     SFT on bare labels ("red"), a form that the base model never uses
    sft_style    SFT on labels in a form that the base model often uses ("it is red")
    iterative    SFT on the model's own correct responses, sampled again every 40 steps
    grpo         GRPO on the model's own responses
    joint        SFT on bare labels of all four tasks at once

The README shows the results of three seeds. configs/demo.py:2 is seed 2, configs/demo.py:0,short
runs only a few small steps of everything, and `--config.seeds=0,1,2` runs three seeds.

configs/demo.py:0,methods compares continual-learning methods instead: SFT on bare labels and GRPO,
each with none and with replay, EWC, MAS, CPO, LwF, DER, A-GEM, O-LoRA and TIES. Their settings were
chosen before the first run, and not tuned on its results.
"""

from ml_collections import ConfigDict

from configs.base import METHODS
from configs.base import get_config as base

TARGETS = ("colour", "shape", "digit", "count")
TEXT = ("facts", "arithmetic")
HELD_APART = ("compare", "jigsaw2", *TEXT)
STYLES = {"it is": 0.4, "answer :": 0.3, "i think": 0.3}
# Sampling weights of the pre-stage's tasks; shapes and digits are learned late.
WEIGHTS = (0.7, 2.0, 2.0, 0.7, 0.5, 1.2, 0.8, 0.8)
ARMS = ("sft_bare", "sft_style", "iterative", "grpo", "joint")
EXPECT = (  # fractions of 1; in every seed unless mean=True
    dict(arm="sft_bare", metric="text", at_most=-0.25),
    dict(arm="grpo", metric="text", at_least=-0.03),
    dict(arm="grpo", metric="fm_diagonal", above="sft_bare"),
    dict(arm=ARMS, metric="learned_gain", within=0.06),
    dict(arm="sft_bare", metric="fm_diagonal", at_most=-0.15, mean=True),
    dict(arm="grpo", metric="fm_diagonal", at_least=-0.06, mean=True),
)
ROWS = 2000  # training rows per task
TEST = 192  # test rows per task


MEMORY = dict(rows=256, batch=16, tokens=8)  # of the rows of all finished stages
# The settings of each continual-learning method, by the name of its arm.
CONTINUAL = dict(
    none={},
    replay=dict(replay=dict(name="gold", fraction=0.125)),
    ewc=dict(penalty=dict(name="ewc", coef=100.0, samples=128)),
    mas=dict(penalty=dict(name="mas", coef=0.1, samples=128)),
    cpo=dict(penalty=dict(name="cpo", coef=100.0, share=0.1)),
    lwf=dict(loss=dict(name="lwf", coef=1.0)),
    der=dict(replay=dict(name="der", alpha=0.5, top_k=16, **MEMORY)),
    agem=dict(gradient=dict(name="agem", **MEMORY)),
    olora=dict(parameters=dict(name="o_lora", coef=0.5)),
    ties=dict(stage_end=dict(name="ties", density=0.2)),
)


def _tasks(styles, bias):
    common = dict(task="synthetic", styles=styles, world=None)
    return {
        family: dict(common, family=family, bias=0.0 if family in TEXT else bias)
        for family in (*TARGETS, *HELD_APART)
    }


def _arm(base_method, lr, styles, **more):
    return dict(
        method={**METHODS[base_method], **more.pop("method", {})},
        train=dict(lr=lr),
        tasks=_tasks(styles, 0.0),
        **more,
    )


def _method_arms(arms):
    """Return an arm for each continual-learning method, under SFT on bare labels and GRPO."""
    made = {}
    for base_name, arm in (("sft", arms["sft_bare"]), ("grpo", arms["grpo"])):
        for name, changes in CONTINUAL.items():
            new = ConfigDict(arm.to_dict())
            new.method.update(changes)
            if name == "replay" and base_name == "grpo":
                new.method.replay.name = "prompts"
            if name == "olora":  # adapters need larger steps
                new.model.lora = dict(rank=8, alpha=16.0)
                new.train.lr = 10 * arm.train.lr
            made[f"{base_name}_{name}"] = new
    return made


def get_config(arg="0"):
    seed, *words = (arg or "0").rstrip(",").split(",")
    if not (seed or "0").isdigit() or set(words) - {"short", "methods"}:
        raise ValueError(
            f"configs/demo.py: got {arg!r}, expected a seed, then some of short, methods"
        )
    short = "short" in words
    seed, steps, first = int(seed or 0), 4 if short else 100, 150 if short else 1000
    batch, limit = (32, 16) if short else (128, TEST)  # training rows per step, test rows per task
    c = base()
    c.name, c.seed, c.expect = "demo", seed, () if short else EXPECT
    c.model.update(
        preset="tiny", compute_dtype="float32", min_pixels=1024, max_pixels=1024, remat="none"
    )
    c.mesh.update(data=1, fsdp=1, model=1)
    c.data.update(template="none", prompt_limit=32, buckets=(24, 32), limit=ROWS, prefetch=4)
    c.tasks = ConfigDict(_tasks({"": 1.0}, 0.0))
    c.stages = tuple(dict(task=t, steps=steps) for t in TARGETS)
    c.train.update(batch=batch, b2=0.99, weight_decay=0.0, clip=1.0, lr=1e-4)
    c.rollout.update(group=8, max_new_tokens=8, check_every=8)
    c.eval.update(
        general=HELD_APART,
        groups=dict(text=TEXT),
        limit=limit,
        drift=0 if short else 64,
    )
    c.eval.update(batch=limit, max_new_tokens=12, forced_prefix=True)
    c.checkpoint.update(every=100, keep=2)
    frozen = dict(model=dict(freeze=("vision", "merger")))
    bare, style = {"": 1.0}, {"it is": 1.0}
    own = dict(method=dict(self_samples=4, refresh=max(2, steps * 2 // 5)))
    c.prestage = ConfigDict(dict(
        name="base",
        stages=(dict(task=(*TARGETS, *HELD_APART), steps=first),),
        tasks=_tasks(STYLES, 0.55),
        method=METHODS["sft"],
        data=dict(limit=200 if short else 3000, weights=WEIGHTS),
        train=dict(lr=2e-3, schedule="wsd", warmup=0.05),
        eval=dict(before=False, tasks=TARGETS, general=(), groups={}, limit=16 if short else 64,
                  forced_prefix=False, drift=0),
    ))  # fmt: skip
    c.arms = ConfigDict(dict(
        sft_bare=_arm("sft", 3e-4, bare, **frozen),
        sft_style=_arm("sft", 3e-4, style, **frozen),
        iterative=_arm("iterative_sft", 1e-4, bare, **frozen, **own),
        grpo=_arm("grpo", 2.5e-4, bare, method=dict(kl_coef=0.0), **frozen),
        joint=_arm("sft", 3e-4, bare, method=dict(name="joint"), **frozen,
                   stages=(dict(task=TARGETS, steps=4 * steps),)),
    ))  # fmt: skip
    # 16 prompts x 8 responses are as many sequences as the batch of the other arms, 128.
    c.arms.grpo.train.batch = batch // 8
    if "methods" in words:
        c.name, c.expect = "methods", ()
        c.arms = ConfigDict(_method_arms(c.arms))
    return c
