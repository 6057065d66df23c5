"""Paper A (arXiv 2507.05386): seven tasks in sequence on Qwen2.5-VL, then MMMU, MMLU-Pro and POPE.

    python launch/train.py --config=configs/cpt7.py:grpo,7b --workdir=runs/cpt7_grpo
    python launch/plan.py  --config=configs/cpt7.py:grpo,7b --topology=v5p:4x4x4      # does it fit?

The argument is an arm and a size, in any order: sft lora_sft low_lr_sft joint replay ewc | grpo rloo remax nokl nocot rif rif_control |
3b 7b tiny. Settings follow the paper's released code (512 prompts x 8 answers, four updates on each, learning rate 1e-6,
KL 0.01; SFT at 1e-5 cosine, batch 24); pixels are one setting for every arm, which the paper's are not.
"""

from configs.base import METHODS
from configs.base import get_config as base

ORDER = ("scienceqa", "textvqa", "vizwiz", "gqa", "geometry3k", "pathvqa", "superclevr")
EPOCHS = dict(geometry3k=10, superclevr=3)
GENERAL = ("mmmu", "mmlu_pro", "pope")
RL = dict(ratio="token", clip_low=0.2, clip_high=0.3, clip_dual=3.0, updates_per_batch=4, kl_coef=0.01, kl_reference="base")
SIZES = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct", "tiny": ""}


def rl(c, name="grpo", **changes):
    c.method.update({**RL, **METHODS[name], **changes})
    c.train.update(batch=512, lr=1e-6, schedule="constant", weight_decay=1e-2, clip=1.0)
    c.rollout.update(group=8, temperature=1.0, top_p=0.99, max_new_tokens=1024)
    c.method.tis_cap = 2.0  # top_p cuts the sampled distribution; the correction is capped


def sft(c, **changes):
    c.method.update({**METHODS["sft"], **changes})
    c.data.template = "direct"
    c.train.update(batch=24, lr=1e-5, schedule="cosine", warmup=0.1)


def _lora(c):
    sft(c, name="lora_sft")
    c.train.lr = 1e-4
    c.model.lora.rank = 128


def _low_lr(c):
    sft(c, name="low_lr_sft")
    c.train.lr = 1e-6


def _joint(c):
    sft(c, name="joint")
    c.stages = (dict(task=ORDER, epochs=1),)


def _nocot(c):
    rl(c, name="grpo")
    c.method.name = "grpo w/o CoT"
    c.data.template = "direct"


def _named(name, build, **changes):
    def apply(c):
        build(c, **changes)
        c.method.name = name

    return apply


FILTER = dict(samples=8, lo=1, hi=8)
ARMS = {
    "sft": sft,
    "lora_sft": _lora,
    "low_lr_sft": _low_lr,
    "joint": _joint,
    "replay": _named("sft + replay", sft, replay=dict(fraction=0.1, kind="gold")),
    "ewc": _named("sft + ewc", sft, penalty=dict(name="ewc", coef=1.0, samples=256)),
    "lwf": _named("sft + kl to previous", sft, penalty=dict(name="lwf", coef=0.1, samples=0)),
    "wise": _named("sft + averaging", sft, average=0.5),
    "grpo": rl,
    "rloo": lambda c: rl(c, name="rloo"),
    "remax": lambda c: rl(c, name="remax"),
    "nokl": _named("grpo w/o KL", rl, kl_coef=0.0),
    "nocot": _nocot,
    "rif": _named("rif-rft", rl, filter=dict(name="incompetent", **FILTER)),
    "rif_control": _named("rif-rft control", rl, filter=dict(name="random", **FILTER)),
    "prompt_replay": _named("grpo + prompt replay", rl, replay=dict(fraction=0.1, kind="prompts")),
}


def get_config(arg="grpo,7b"):
    names = [a for a in arg.split(",") if a]
    unknown = [n for n in names if n not in ARMS and n not in SIZES]
    if unknown:
        raise ValueError(f"configs/cpt7.py:{arg}: {unknown[0]!r} is neither an arm ({', '.join(ARMS)}) nor a size ({', '.join(SIZES)})")
    arm = next((n for n in names if n in ARMS), "grpo")
    size = next((n for n in names if n in SIZES), "7b")
    c = base()
    c.name = f"cpt7_{arm}_{size}"
    c.model.path = SIZES[size]
    c.stages = tuple(dict(task=t, epochs=EPOCHS.get(t, 1)) for t in ORDER)
    c.data.update(template="cot", prompt_limit=4096, workers=8)
    c.eval.update(general=GENERAL, batch=256, max_new_tokens=1024, every=50)
    c.mesh.update(data=1, fsdp=-1, model=1)
    c.train.micro_batch = 64
    c.model.remat = "block"
    ARMS[arm](c)
    return c
