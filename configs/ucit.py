"""UCIT (HiDe-LLaVA, arXiv 2503.12941; MCITlib, 2508.07307): six tasks in sequence by LoRA SFT.

    python launch/train.py --config=configs/ucit.py:lora_sft,3b --config.data.root=DATA \\
        --workdir=runs/ucit_lora

DATA/UCIT holds the instructions of the hub dataset HaiyangGuo/UCIT and the images of its sources,
see cptjax/tasks/datasets/ucit.py. The argument names an arm and a size, in any order:

    lora_sft               MCITlib's LoRA-FT: the same adapters go on from task to task
    3b 7b tiny             Qwen2.5-VL
    qwen3vl2b qwen3vl4b qwen3vl8b

The settings are those of MCITlib's LoRA-FT: rank 16, alpha 32, learning rate 2e-4 (cosine, warm-up
3 %), batch 64, one epoch of each task, evaluations with at most 128 tokens.

Differences: the released model is LLaVA-1.5-7B, which is not supported, so numbers cannot be
compared with the paper's; its projector is trained too, with learning rate 2e-5, where ours trains
adapters only; images have the sizes of Qwen's processor, not 336 x 336. HiDe-LLaVA's own method,
with six experts of rank 8, is not built in.

Not found out: the rows themselves (their columns are those that the released loaders and scorers
read), and the column `answer` of caption rows, which nothing reads. The released score of captions
is the mean of BLEU-1 to 4, METEOR, ROUGE-L and CIDEr; METEOR is missing here, and matrix.csv has
ROUGE-L. Which of these the papers' tables have is not stated in the code.
"""

from configs.base import METHODS, pick_word
from configs.base import get_config as base

ORDER = ("imagenet_r", "arxivqa", "vizwiz", "iconqa", "clevr_math", "flickr30k")
SIZES = {
    "3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    **{f"qwen3vl{n}b": f"Qwen/Qwen3-VL-{n}B-Instruct" for n in (2, 4, 8)},
    "tiny": "",
}


def _lora(c):
    c.method.update(METHODS["sft"])
    c.method.name = "lora sft"
    c.model.lora.update(rank=16, alpha=32.0)


# A new method is one row: a function that changes the config.
ARMS = {"lora_sft": _lora}


def get_config(arg="lora_sft,3b"):
    names = [a for a in arg.split(",") if a]
    unknown = [n for n in names if n not in (*ARMS, *SIZES)]
    if unknown:
        raise ValueError(
            f"configs/ucit.py:{arg}: {unknown[0]!r} is neither an arm ({', '.join(ARMS)}) "
            f"nor a size ({', '.join(SIZES)})"
        )
    arm = pick_word(f"configs/ucit.py:{arg}", names, ARMS, "lora_sft")
    size = pick_word(f"configs/ucit.py:{arg}", names, SIZES, "3b")
    c = base()
    c.name = f"ucit_{arm}_{size}"
    c.model.update(path=SIZES[size], remat="block")
    c.stages = tuple(dict(task=f"ucit_{part}", epochs=1) for part in ORDER)
    c.data.update(template="none", workers=8)
    c.train.update(
        batch=64, micro_batch=16, lr=2e-4, schedule="cosine", warmup=0.03, weight_decay=0.0
    )
    c.rollout.gather = True  # for the evaluations
    c.eval.update(batch=256, max_new_tokens=128, templates=("none",))
    ARMS[arm](c)
    return c.lock()
