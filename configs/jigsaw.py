"""Paper B (arXiv 2506.23508): learn 3 x 3 jigsaws, keep prior knowledge; which data does the damage?

    python launch/train.py --config=configs/jigsaw.py:grpo,3b --workdir=runs/jigsaw_grpo
    python launch/train.py --config=configs/jigsaw.py:rft_rollout,3b --config.method.corpus=runs/jigsaw_grpo/rollouts/stage1.jsonl \
        --workdir=runs/jigsaw_rft_rollout

The argument is an arm and a size (3b | 7b | tiny):

    grpo             own rollouts
    bare             SFT on bare answers
    trace            SFT on another model's reasoning: method.corpus = a jsonl with id and response; its correct answers are used
    rft_rollout      SFT on the trained model's correct rollouts: method.corpus = the rollouts file of a grpo run
    self_generated   SFT on reasoning of a model after a little RFT, each with the correct answer put in: method.corpus likewise
    iterative        SFT on own correct rollouts, drawn anew each epoch (not in the paper)

Every arm is asked with and without reasoning, the form it was trained in first (that one fills matrix.csv).
Its base row is row 0 of every run. Steps of the SFT arms are the paper's; its RFT ran 27,360 steps of an unknown batch. Its learning
rates, batch and group size are not public; these are paper A's.
"""

from configs.base import METHODS
from configs.base import get_config as base

SIZES = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct", "tiny": ""}
STEPS = {  # (3b, 7b)
    "grpo": (2000, 2000), "bare": (200, 400), "trace": (4100, 4100), "rft_rollout": (2670, 3000), "self_generated": (2670, 3000),
    "iterative": (2670, 3000),
}  # fmt: skip
CORPUS = METHODS["corpus_sft"]
METHOD = {
    "grpo": METHODS["grpo"],
    "bare": {**METHODS["sft"], "name": "sft bare"},
    "trace": {**CORPUS, "name": "sft traces"},
    "rft_rollout": {**CORPUS, "name": "sft rft rollouts"},
    "self_generated": {**CORPUS, "name": "sft self-generated", "corpus_answer": "gold"},
    "iterative": METHODS["iterative_sft"],
}


def get_config(arg="grpo,3b"):
    names = [a for a in arg.split(",") if a]
    unknown = [n for n in names if n not in (*METHOD, *SIZES)]
    if unknown:
        raise ValueError(
            f"configs/jigsaw.py:{arg}: {unknown[0]!r} is neither an arm ({', '.join(METHOD)}) nor a size ({', '.join(SIZES)})"
        )
    arm = next((n for n in names if n in METHOD), "grpo")
    size = next((n for n in names if n in SIZES), "3b")
    c = base()
    c.name = f"jigsaw_{arm}_{size}"
    c.model.update(path=SIZES[size], remat="block")
    c.stages = (dict(task="jigsaw", steps=STEPS[arm][size == "7b"]),)
    c.method.update(METHOD[arm])
    c.data.template = "direct" if arm == "bare" else "answer"
    c.train.update(
        dict(batch=64, micro_batch=32, lr=1e-6) if arm == "grpo" else dict(batch=24, lr=1e-5)
    )
    c.rollout.update(group=8, max_new_tokens=1024, gather=True)
    c.eval.update(general=("refcoco", "docvqa", "pope", "mmmu"), max_new_tokens=1024)
    c.eval.templates = ("direct", "answer") if arm == "bare" else ("answer", "direct")
    return c.lock()
