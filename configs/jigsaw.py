"""Paper B (arXiv 2506.23508): learn 3 x 3 jigsaws, keep prior knowledge; which data does the damage?

    python launch/train.py --config=configs/jigsaw.py:grpo,3b --workdir=runs/jigsaw_grpo
    python launch/train.py --config=configs/jigsaw.py:rft_rollout,3b --config.method.corpus=runs/jigsaw_grpo/rollouts/stage1.jsonl \
        --workdir=runs/jigsaw_rft_rollout

Arms: grpo (own rollouts) | bare (SFT on bare answers) | trace (SFT on another model's reasoning: set method.corpus) |
rft_rollout (SFT on the trained model's correct rollouts: set method.corpus) | self (SFT on own correct rollouts).
The paper's learning rates, batch and group size are not public; these are paper A's.
"""

from configs.base import METHODS
from configs.base import get_config as base

SIZES = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct", "tiny": ""}
STEPS = {"grpo": 2000, "bare": 400, "trace": 4100, "rft_rollout": 3000, "self": 3000}
SETTINGS = {
    "grpo": dict(method=METHODS["grpo"], train=dict(batch=64, lr=1e-6)),
    "bare": dict(method={**METHODS["sft"], "name": "sft bare"}, train=dict(batch=24, lr=1e-5), data=dict(template="direct")),
    "trace": dict(method={**METHODS["corpus_sft"], "name": "sft traces"}, train=dict(batch=24, lr=1e-5)),
    "rft_rollout": dict(method={**METHODS["corpus_sft"], "name": "sft rft rollouts"}, train=dict(batch=24, lr=1e-5)),
    "self": dict(method=METHODS["iterative_sft"], train=dict(batch=24, lr=1e-5)),
}


def get_config(arg="grpo,3b"):
    names = [a for a in arg.split(",") if a]
    unknown = [n for n in names if n not in SETTINGS and n not in SIZES]
    if unknown:
        raise ValueError(f"configs/jigsaw.py:{arg}: {unknown[0]!r} is neither an arm ({', '.join(SETTINGS)}) nor a size ({', '.join(SIZES)})")
    arm = next((n for n in names if n in SETTINGS), "grpo")
    size = next((n for n in names if n in SIZES), "3b")
    c = base()
    c.name = f"jigsaw_{arm}_{size}"
    c.model.path = SIZES[size]
    c.stages = (dict(task="jigsaw", steps=STEPS[arm]),)
    c.data.template = "answer"
    c.rollout.update(group=8, max_new_tokens=1024)
    c.eval.update(general=("refcoco", "docvqa", "pope", "mmmu"), max_new_tokens=1024)
    c.train.micro_batch = 32
    c.model.remat = "block"
    for section, changes in SETTINGS[arm].items():
        c[section].update(changes)
    return c
