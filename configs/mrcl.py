"""MRCL ("RL Forgets!", arXiv 2607.04364): five reasoning tasks in sequence on Qwen3-VL.

    python launch/train.py --config=configs/mrcl.py:grpo,2b --config.data.root=DATA \\
        --workdir=runs/mrcl_grpo

DATA/MRCL is the hub dataset MaolinLuo/MRCL with the images.zip of each part unpacked, see
cptjax/tasks/datasets/mrcl.py. The argument names an arm and a size, in any order:

    sft lora_sft       SFT on bare answers, all weights | LoRA
    grpo gspo          RL without a KL term, with token | sequence ratios
    cpo                gspo with CPO's penalty
    2b 4b 8b tiny      the size of Qwen3-VL-Instruct

The settings are those of the released scripts, as they stand in a public copy of the repository:

    RL     128 prompts x 8 responses of at most 2,048 tokens at T = 0.8, four updates per batch,
           learning rate 5e-6 (cosine), weight decay 0.1; 600 updates per task, MedBookVQA 200 (2B)
           or 300; the accuracy of the box, less 0.5 for a response of fewer than 20 words
    SFT    batch 8, learning rate 5e-6 | LoRA 1e-4, rank 128, alpha 64, also in the vision tower;
           two epochs of MedBookVQA, three of Navigation, one of the others

Every task is evaluated greedily after every stage, first with the template of the training, which
fills matrix.csv, as in the paper: SFT is asked for bare answers, RL to think first.

Differences: the prompts have our wording, and the release's for Navigation also gives hints how to
plan; weights and moments are float32 under bfloat16 compute; LoRA has no dropout (0.05 in the
release) and goes on with its adapters, which the release merges after each task; evaluations see
images of at least 131,072 pixels (8,192) and have no penalty on repetition (1.05); RL at 8B sees
all images at full size (half on We-Math2, Puzzle and FinMME).

Not found out: the rows themselves (their columns are those that the released loaders read), the
numbers of rows of each part (28,900 in all), whether a question holds <image>, and how often the
paper's own 4B runs of GRPO updated: the copy has 300 updates per task there and 600 for GSPO; both
have 600 here. Three of the paper's ten outside benchmarks are evaluated: POPE, MMStar and DocVQA,
with their standard prompts and scorers. MMMU-Pro, MathVerse, MathVision, MathVista, RealWorldQA,
CharXiv and CountBenchQA are not built in.

Final averages (MFN) reported in the paper for 2B | 4B | 8B: SFT 39.1 | 44.0 | 44.0,
GRPO 49.4 | 56.8 | 50.7, GSPO 48.6 | 53.7 | 61.8, CPO 57.8 | 71.6 | 75.5.
"""

from configs.base import METHODS, pick_word
from configs.base import get_config as base

ORDER = ("medbookvqa", "navigation", "wemath2", "puzzle", "finmme")
SFT_EPOCHS = dict(medbookvqa=2, navigation=3)
UPDATES = 600  # optimizer updates of an RL stage
FIRST_UPDATES = {"2b": 200, "4b": 300, "8b": 300, "tiny": 200}  # of MedBookVQA
UPDATES_PER_BATCH = 4
SIZES = {
    **{f"{n}b": f"Qwen/Qwen3-VL-{n}B-Instruct" for n in (2, 4, 8)},
    "tiny": "",
}


def rl(c, name, label="", **changes):
    c.method.update({**METHODS[name], "kl_coef": 0.0, "clip_dual": None, **changes})
    c.method.name = label or name
    c.method.updates_per_batch = UPDATES_PER_BATCH
    c.data.template = "steps"
    c.rewards.update(accuracy=1.0, format=0.0, short_words=20, short_penalty=0.5)
    c.train.update(batch=128, micro_batch=16, lr=5e-6, warmup=0.1)
    c.rollout.update(group=8, temperature=0.8, max_new_tokens=2048, gather=True)


def sft(c, label="sft", lr=5e-6, warmup=0.03):
    c.method.update(METHODS["sft"])
    c.method.name = label
    c.data.template = "direct"
    c.train.update(batch=8, lr=lr, warmup=warmup)
    c.rollout.gather = True  # for the evaluations


def _lora(c):
    sft(c, label="lora sft", lr=1e-4, warmup=0.1)
    c.model.lora.update(rank=128, alpha=64.0, vision=True)


def _length(c, part, size):
    """Return how long the stage of a task is."""
    if c.method.objective != "policy":
        return dict(epochs=SFT_EPOCHS.get(part, 1))
    updates = FIRST_UPDATES[size] if part == ORDER[0] else UPDATES
    return dict(steps=updates // UPDATES_PER_BATCH)


def _arm(build, **changes):
    return lambda c: build(c, **changes)


# A new method is one row: a function that changes the config, such as
# that of CPO.
ARMS = {
    "sft": sft,
    "lora_sft": _lora,
    "grpo": _arm(rl, name="grpo", ratio="token", clip_low=0.2, clip_high=0.27),
    "gspo": _arm(rl, name="gspo"),  # clips at 3e-4 and 4e-4, as in the release
    "cpo": _arm(rl, name="gspo", label="cpo", penalty=dict(name="cpo", coef=100.0, share=0.1)),
}


def get_config(arg="grpo,2b"):
    names = [a for a in arg.split(",") if a]
    unknown = [n for n in names if n not in (*ARMS, *SIZES)]
    if unknown:
        raise ValueError(
            f"configs/mrcl.py:{arg}: {unknown[0]!r} is neither an arm ({', '.join(ARMS)}) "
            f"nor a size ({', '.join(SIZES)})"
        )
    arm = pick_word(f"configs/mrcl.py:{arg}", names, ARMS, "grpo")
    size = pick_word(f"configs/mrcl.py:{arg}", names, SIZES, "2b")
    c = base()
    c.name = f"mrcl_{arm}_{size}"
    c.model.update(path=SIZES[size], remat="block", min_pixels=131_072, max_pixels=524_288)
    c.data.workers = 8
    c.train.update(schedule="cosine", weight_decay=0.1)
    c.eval.update(general=("pope", "mmstar", "docvqa"), batch=256, max_new_tokens=2048, drift=128)
    ARMS[arm](c)
    c.stages = tuple(dict(task=f"mrcl_{part}", **_length(c, part, size)) for part in ORDER)
    c.eval.templates = ("direct", "steps") if c.data.template == "direct" else ("steps", "direct")
    return c.lock()
