"""Paper B (arXiv 2506.23508): train 3 x 3 jigsaws; which training data makes the model forget?

    python launch/train.py --config=configs/jigsaw.py:grpo,3b --workdir=runs/jigsaw_grpo
    python launch/generate.py --config=configs/jigsaw.py:grpo,3b --workdir=runs/jigsaw_grpo \\
        --task=jigsaw --out=runs/jigsaw.jsonl
    python launch/train.py --config=configs/jigsaw.py:rft_rollout,3b \\
        --workdir=runs/jigsaw_rft_rollout --config.method.corpus=runs/jigsaw.jsonl

The argument names an arm, a size (3b | 7b | tiny of Qwen2.5-VL; qwen3vl2b | qwen3vl4b | qwen3vl8b |
qwen3vl32b) and optionally the images, `images=NAME`. The puzzles are made of photographs, those of
TextVQA; NAME is another task with images, a folder of photographs, or `synthetic` for drawn images,
which the run's name then says. Three arms need method.corpus, a file of launch/generate.py or the
rollouts of a run:

    grpo             GRPO on own rollouts
    bare             SFT on bare answers
    trace            SFT on the correct reasoning of another model (method.corpus)
    rft_rollout      SFT on the correct responses of the model after a grpo run (method.corpus)
    self_generated   SFT on the reasoning of a model after a little RFT, with the gold answer
                     inserted (method.corpus)
    iterative        SFT on own correct rollouts, sampled again in each epoch (not in the paper)

Every arm is evaluated with and without reasoning, first with the template of its training, which
fills matrix.csv; row 0 of every run is the base model. The SFT arms have as many steps as in the
paper, whose RFT has 27,360 steps of an unknown batch size. Learning rates, batch and group size are
not public; those of paper A are used.
"""

from configs.base import METHODS, pick_word
from configs.base import get_config as base

SIZES = {
    "3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    **{f"qwen3vl{n}b": f"Qwen/Qwen3-VL-{n}B-Instruct" for n in (2, 4, 8, 32)},
    "tiny": "",
}
LARGE = ("7b", "qwen3vl8b", "qwen3vl32b")  # take the steps of the paper's 7B model
PHOTOGRAPHS = "textvqa"  # the task whose images are cut into tiles
STEPS = {  # (3b, 7b)
    "grpo": (2000, 2000), "bare": (200, 400), "trace": (4100, 4100),
    "rft_rollout": (2670, 3000), "self_generated": (2670, 3000), "iterative": (2670, 3000),
}  # fmt: skip
GENERAL = ("refcoco", "docvqa", "mme", "mmstar", "pope", "mmmu")
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
    words = [a for a in arg.split(",") if a]
    names = [w for w in words if not w.startswith("images=")]
    unknown = [n for n in names if n not in (*METHOD, *SIZES)]
    if unknown:
        raise ValueError(
            f"configs/jigsaw.py:{arg}: {unknown[0]!r} is neither an arm ({', '.join(METHOD)}) "
            f"nor a size ({', '.join(SIZES)}) nor images=NAME"
        )
    images = next((w.removeprefix("images=") for w in words if w not in names), PHOTOGRAPHS)
    arm = pick_word(f"configs/jigsaw.py:{arg}", names, METHOD, "grpo")
    size = pick_word(f"configs/jigsaw.py:{arg}", names, SIZES, "3b")
    c = base()
    c.name = f"jigsaw_{arm}_{size}{'_synthetic' * (images == 'synthetic')}"
    c.tasks.jigsaw = dict(task="jigsaw", images=images)
    c.model.update(path=SIZES[size], remat="block")
    c.stages = (dict(task="jigsaw", steps=STEPS[arm][size in LARGE]),)
    c.method.update(METHOD[arm])
    c.data.template = "direct" if arm == "bare" else "answer"
    c.train.update(
        dict(batch=64, micro_batch=32, lr=1e-6) if arm == "grpo" else dict(batch=24, lr=1e-5)
    )
    c.rollout.update(group=8, max_new_tokens=1024, gather=True)
    c.eval.update(general=GENERAL, max_new_tokens=1024, drift=128)
    c.eval.templates = ("direct", "answer") if arm == "bare" else ("answer", "direct")
    return c.lock()
