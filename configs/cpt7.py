"""Paper A (arXiv 2507.05386): seven tasks in sequence on Qwen2.5-VL.

    python launch/train.py --config=configs/cpt7.py:grpo,7b --workdir=runs/cpt7_grpo
    python launch/plan.py  --config=configs/cpt7.py:grpo,7b,v5p-4x4x4 --topology=v5p:4x4x4   # fits?

MMMU, MMLU-Pro and POPE are evaluated but never trained. The argument names an arm, a size and
optionally `paper` or `official`, a slice and a corpus, in any order:

    sft lora_sft low_lr_sft eaft dft asft joint   SFT; joint: all seven tasks at once
    grpo rloo remax nokl nocot              the paper's RFT arms
    rif rif_zero rif_control                RIF-RFT without prompts that are never solved | that are
                                            never or always solved | without as many random ones
    rif_unsolvable                          only with prompts that are never solved; thresholds with
                                            rif and --config.method.filter.name=window
                                            --config.sweep.method.filter.lo=1,2,4
    self_sft iterative_sft                  SFT on own correct responses, sampled once | every 21
                                            steps (504 rows)
    traces rl_traces                        SFT on the correct responses of a larger model | of a
                                            grpo run; needs a corpus
    sft_mixture                             SFT on bare gold answers and on the correct responses of
                                            a corpus under the CoT template, in one stage
    sft_kl reinforce reinforce01            SFT with a KL term | REINFORCE without baseline | only
                                            on correct responses
    replay ewc online_ewc si mas cpo        SFT with a continual-learning method
    l2 lwf wise er der derpp agem
    olora merged_lora gpm                   lora_sft with one
    prompt_replay grpo_ewc grpo_cpo rapo    GRPO with one
    3b 7b tiny                              the model, of the family Qwen2.5-VL
    qwen3vl2b qwen3vl4b qwen3vl8b           or Qwen3-VL, also qwen3vl32b
    paper                                   the protocol of the released code, see below
    official                                the standard data and scorers, not the paper's
    v5p-4x4x4 v6e-16x16 h100-8              how a TPU slice or eight GPUs are fastest, for models up
                                            to 8B: mesh, micro-batch and what layers keep
    corpus=DIR                              DIR/stage1.jsonl ... stage7.jsonl with id and response,
                                            such as the rollouts/ of a grpo run

The settings are those of the paper's released code: 512 prompts x 8 responses, four updates per
batch, learning rate 1e-6, KL 0.01 to the base model; SFT with learning rate 1e-5 (cosine), batch
24 and bare answers. Differences: all arms have the same pixel limits and are evaluated greedily
with and without CoT, first with the template of their training, which fills matrix.csv; the RFT
arms have tis_cap=2.0; LoRA's alpha is 256 (twice the rank, the default of LLaMA-Factory).

`paper` follows the released code further:

    all    the released wording of the prompts and test rows of Super-CLEVR; the scores of the
           released SFT evaluation (lower-cased exact match) stand beside ours
    RFT    60 to 180 steps of ScienceQA instead of one epoch (13); bfloat16 Adam moments; no
           tis_cap; evaluation at T = 0.5
    RIF    KL to the stage's start; at most 7,500 prompts and at most as many as are left out, from
           responses sampled with top_p = 1
    SFT    no weight decay; images of up to 4,194,304 pixels, rows of up to 7,168 tokens

What still differs from the release is listed in README, "Departures from the papers".

The averages reported in the paper: SFT 54.0, GRPO 60.0, w/o KL 59.5, w/o CoT 59.4, RIF-RFT 57.5,
joint 62.9; FM -10.4 for SFT and -2.3 for GRPO.
"""

from configs.base import METHODS, pick_word
from configs.base import get_config as base

ORDER = ("scienceqa", "textvqa", "vizwiz", "gqa", "geometry3k", "pathvqa", "superclevr")
EPOCHS = dict(geometry3k=10, superclevr=3)
RL = dict(ratio="token", updates_per_batch=4, kl_coef=0.01, kl_reference="base",
          clip_low=0.2, clip_high=0.3, clip_dual=3.0)  # fmt: skip
SIZES = {
    "3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    **{f"qwen3vl{n}b": f"Qwen/Qwen3-VL-{n}B-Instruct" for n in (2, 4, 8, 32)},
    "tiny": "",
}
# Settings of RL by slice, from plans of 7B (README, "Plans for TPU slices and GPUs"). A chip of v5p
# has room for a whole model and row; of 128 prompts in an update, every two of 256 chips get one.
# Without data=4 so many devices share a weight that the compiler sums whole arrays over them:
# weights on v5p, gradients on v6e. While sampling, a weight is read for few tokens, so more devices
# share it. v5p has room for the logits of a device pass, so the backward pass does not compute them
# again. On v6e so few rows are left for a chip that reading MLPs takes longer than sending rows. In
# a device pass each of eight GPUs gets one prompt with its responses.
SLICES = {
    "v5p-4x4x4": dict(
        mesh=dict(data=4, model=1), rollout=dict(model=4), micro_batch=64, chunk=8192
    ),
    "v6e-16x16": dict(
        mesh=dict(data=4, model=2), rollout=dict(model=4, mlp=8), micro_batch=128, chunk=1024
    ),
    "h100-8": dict(mesh=dict(model=1), rollout=dict(model=2), micro_batch=8, chunk=1024),
}
FILTER = dict(samples=8)
MEMORY = dict(rows=1000, batch=24, tokens=64)  # bare answers have few tokens
# Steps of ScienceQA, by the names of the released checkpoints that the second stage starts from.
SCIENCEQA_STEPS = dict(grpo=90, nokl=120, nocot=180)
# Of EWC, SI and MAS no coefficient is published for models of this size: these are to be swept.
EWC = dict(name="ewc", coef=1.0, samples=256)
CPO = dict(name="cpo", coef=100.0, share=0.1)  # as in the release of 2607.04364
RELEASED_TEMPLATES = dict(cot="released_cot", direct="released_nocot")


def rl(c, name="grpo", label="", **changes):
    c.method.update({**METHODS[name], **RL, **changes})
    c.method.name = label or name
    c.method.tis_cap = 2.0  # corrects for top_p, which changes the sampled distribution
    c.train.update(
        batch=512, micro_batch=64, lr=1e-6, schedule="constant", weight_decay=1e-2, clip=1.0
    )
    # Without gather, every decode step transfers all weights.
    c.rollout.update(group=8, temperature=1.0, top_p=0.99, max_new_tokens=1024, gather=True)


def sft(c, name="sft", label="", lr=1e-5, template="direct", **changes):
    c.method.update({**METHODS[name], **changes})
    c.method.name = label or name
    c.data.template = template
    c.train.update(batch=24, lr=lr, schedule="cosine", warmup=0.1)
    c.rollout.gather = True  # for the evaluations


def _lora(c, label="lora sft", **changes):
    sft(c, label=label, lr=1e-4, **changes)
    c.model.lora.update(rank=128, alpha=256.0)  # adapters are scaled by alpha / rank = 2


def _joint(c):
    sft(c, label="joint")
    c.stages = (dict(task=tuple(stage["task"] for stage in c.stages), epochs=1),)


def _nocot(c):
    rl(c, label="grpo w/o CoT")
    c.data.template = "direct"  # has no format reward, so the reward is only the accuracy


def _as_released(c, arm):
    """Set what the released code does and our own protocol does not."""
    is_sft = c.method.objective != "policy"
    # SFT's bare answers follow the tasks' own instructions.
    words = dict(cot="released_cot") if is_sft else RELEASED_TEMPLATES
    c.data.template = words.get(c.data.template, c.data.template)
    c.eval.templates = tuple(words.get(name, name) for name in c.eval.templates)
    if is_sft:
        c.method.corpus_template = words.get(c.method.corpus_template, "")
        c.train.weight_decay = 0.0
        c.model.max_pixels = 4_194_304
        c.data.prompt_limit = 7168
        return
    c.method.tis_cap = None
    c.train.moments_dtype = "bfloat16"
    c.eval.temperature = 0.5
    first, *others = c.stages
    c.stages = (dict(task=first["task"], steps=SCIENCEQA_STEPS.get(arm, 90)), *others)
    if c.method.filter:
        c.method.kl_reference = "stage"
        c.method.filter = dict(c.method.filter, top_p=1.0, balanced=True, most=7500)


def _for_slice(c, name):
    """Set what the plans for a slice show to be fastest.

    On TPU slices SFT keeps its mesh: its batch of 24 rows has too few for more batch shards.
    """
    c.model.remat = "dots"
    chosen = SLICES[name]
    if c.method.source == "rollouts" or name == "h100-8":
        c.mesh.update(chosen["mesh"])
    if c.method.source == "rollouts":
        c.train.update(micro_batch=chosen["micro_batch"], chunk=chosen["chunk"])
        c.rollout.update(chosen["rollout"])


def _arm(build, **changes):
    return lambda c: build(c, **changes)


ARMS = {
    "sft": sft,
    "lora_sft": _lora,
    "low_lr_sft": _arm(sft, label="low lr sft", lr=1e-6),
    "eaft": _arm(sft, name="eaft"),
    "dft": _arm(sft, name="dft"),
    "asft": _arm(sft, name="asft"),
    "joint": _joint,
    "self_sft": _arm(sft, name="self_sft", template="cot", self_samples=5),
    "iterative_sft": _arm(sft, name="iterative_sft", template="cot", self_samples=5, refresh="21"),
    "traces": _arm(sft, name="corpus_sft", label="sft traces", template="cot"),
    "rl_traces": _arm(sft, name="corpus_sft", label="sft rl traces", template="cot"),
    "sft_mixture": _arm(
        sft,
        name="corpus_sft",
        label="sft gold and traces",
        source="gold+corpus",
        corpus_template="cot",
        epoch_unit="responses",
    ),
    "sft_kl": _arm(sft, label="sft + kl", kl_coef=0.05, kl_estimator="k2", kl_reference="base"),
    "grpo": rl,
    "rloo": _arm(rl, name="rloo"),
    "remax": _arm(rl, name="remax"),
    "reinforce": _arm(rl, name="reinforce"),
    "reinforce01": _arm(rl, name="reinforce01"),
    "nokl": _arm(rl, label="grpo w/o KL", kl_coef=0.0),
    "nocot": _nocot,
    "rif": _arm(rl, label="rif-rft", filter=dict(name="incompetent", **FILTER)),
    "rif_zero": _arm(
        rl, label="rif-rft zero variance", filter=dict(name="zero_variance", **FILTER)
    ),
    "rif_control": _arm(
        rl, label="rif-rft control", filter=dict(name="random", lo=1, hi=8, **FILTER)
    ),
    "rif_unsolvable": _arm(
        rl, label="rif-rft unsolvable", filter=dict(name="unsolvable", **FILTER)
    ),
    "replay": _arm(sft, label="sft + replay", replay=dict(name="gold", fraction=0.1)),
    "er": _arm(sft, label="sft + er", replay=dict(name="er", **MEMORY)),
    "der": _arm(sft, label="sft + der", replay=dict(name="der", **MEMORY)),
    "derpp": _arm(sft, label="sft + der++", replay=dict(name="derpp", **MEMORY)),
    "agem": _arm(sft, label="sft + a-gem", gradient=dict(name="agem", **MEMORY)),
    "ewc": _arm(sft, label="sft + ewc", penalty=EWC),
    "online_ewc": _arm(sft, label="sft + online ewc", penalty=dict(EWC, name="online_ewc")),
    "si": _arm(sft, label="sft + si", penalty=dict(name="si", coef=1.0)),
    "mas": _arm(sft, label="sft + mas", penalty=dict(name="mas", coef=1.0, samples=256)),
    "cpo": _arm(sft, label="sft + cpo", penalty=CPO),
    "l2": _arm(sft, label="sft + l2", penalty=dict(name="l2", coef=0.01)),
    "lwf": _arm(sft, label="sft + kl to previous", loss=dict(name="lwf", coef=0.1)),
    "wise": _arm(sft, label="sft + averaging", stage_end=dict(name="wise_ft", weight=0.5)),
    "olora": _arm(_lora, label="o-lora", parameters=dict(name="o_lora")),
    "merged_lora": _arm(_lora, label="merged lora", parameters=dict(name="merge_lora")),
    "gpm": _arm(_lora, label="lora + gpm", gradient=dict(name="gpm")),
    "prompt_replay": _arm(
        rl, label="grpo + prompt replay", replay=dict(name="prompts", fraction=0.1)
    ),
    # The defaults of rapo.py; rapo replaces the deviation by which GRPO divides.
    "rapo": _arm(rl, label="rapo", advantage="dr_grpo", reward=dict(name="rapo")),
    "grpo_ewc": _arm(rl, label="grpo + ewc", penalty=EWC),
    "grpo_cpo": _arm(rl, label="grpo + cpo", penalty=CPO),
}


def get_config(arg="grpo,7b"):
    words = [a for a in arg.split(",") if a]
    names = [w for w in words if not w.startswith("corpus=")]
    corpus = [w.removeprefix("corpus=") for w in words if w not in names]
    unknown = [n for n in names if n not in (*ARMS, *SIZES, *SLICES, "official", "paper")]
    if unknown:
        known = f"an arm ({', '.join(ARMS)}), a size ({', '.join(SIZES)})"
        known += f", a slice ({', '.join(SLICES)})"
        raise ValueError(
            f"configs/cpt7.py:{arg}: {unknown[0]!r} is not {known}, paper, official or corpus=DIR"
        )
    if {"official", "paper"} <= set(names):
        raise ValueError(f"configs/cpt7.py:{arg}: choose official or paper, not both")
    arm = pick_word(f"configs/cpt7.py:{arg}", names, ARMS, "grpo")
    size = pick_word(f"configs/cpt7.py:{arg}", names, SIZES, "7b")
    prefix = "" if "official" in names else "released_" if "paper" in names else "cpt7_"
    c = base()
    paper = "paper" in names
    c.name = f"cpt7_{arm}_{size}{'_official' * (not prefix)}{'_paper' * paper}"
    c.model.update(path=SIZES[size], remat="block")
    c.stages = tuple(dict(task=prefix + t, epochs=EPOCHS.get(t, 1)) for t in ORDER)
    c.data.update(template="cot", prompt_limit=4096, workers=8)
    c.eval.update(
        general=tuple(prefix + t for t in ("mmmu", "mmlu_pro", "pope")),
        batch=256,
        max_new_tokens=1024,
        every=50,
        drift=128,
    )
    # 7B has 4 key/value heads, and 3B has 2. With model=4, 64 to 256 chips have 16 to 64 batch
    # shards, which divide the batches; with model=2, twice as many.
    c.mesh.update(data=1, fsdp=-1, model={"tiny": 1, "3b": 2}.get(size, 4))
    ARMS[arm](c)
    if size == "3b" and c.method.source == "rollouts":
        c.train.micro_batch = 128
    if name := pick_word(f"configs/cpt7.py:{arg}", names, SLICES, ""):
        _for_slice(c, name)
        if size == "3b":  # more devices would hold copies of its two key/value heads
            c.rollout.model = min(c.rollout.model, 2)
    c.eval.templates = ("direct", "cot") if c.data.template == "direct" else ("cot", "direct")
    if paper:
        _as_released(c, arm)
    if corpus:
        if "corpus" not in c.method.source:
            raise ValueError(
                f"configs/cpt7.py:{arg}: corpus= belongs to traces, rl_traces and sft_mixture, not "
                f"to {arm}"
            )
        c.stages = tuple(
            {**s, "method": dict(corpus=f"{corpus[0]}/stage{k}.jsonl")}
            for k, s in enumerate(c.stages, 1)
        )
    return c.lock()
