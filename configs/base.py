"""Every knob of cptjax once, with unit and range. Other configs start from `get_config()` here and change what they need."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.name = "run"
    c.seed = 0
    c.seeds = ()  # several seeds: one run each, side by side under the workdir; () = only `seed`
    c.orders = ()  # several task orders: each a tuple of stage indices; () = as listed
    c.arms = ConfigDict()  # name -> overrides: several methods side by side, each in its sub-workdir, and one report over them
    c.expect = ()  # what the report on the arms judges, each dict(arm=, metric=, at_least= ...); see cptjax/report/expect.py
    c.prestage = ConfigDict()  # overrides of a run that makes the base model first (its export becomes model.path); empty = none
    c.allow_change = False  # resume although the config differs from the one that started the run

    c.model = ConfigDict(dict(
        path="",  # Hugging Face folder or hub id; "" = a random model of `preset`
        preset="tiny",  # tiny | 3b | 7b | 32b | 72b; only read where path is ""
        param_dtype="float32",  # float32 | bfloat16: the trained weights (frozen weights are always held in compute_dtype)
        compute_dtype="bfloat16",  # bfloat16 | float32
        min_pixels=200704,  # pixels per image, >= one merged patch; one setting for SFT, RL and evaluation
        max_pixels=1003520,  # pixels per image
        freeze=(),  # of vision | merger | language
        remat="dots",  # none | dots | block | offload: what a layer keeps for its backward pass
        attention="auto",  # auto | xla | tiled (CPU) | cudnn (GPU) | splash (TPU)
        lora=dict(rank=0, alpha=16.0, targets=("q", "k", "v", "o", "gate", "up", "down"), vision=False),  # rank 0 = full training
    ))  # fmt: skip
    c.mesh = ConfigDict(dict(data=1, fsdp=-1, model=1, slices=1))  # devices per axis; one may be -1

    c.tasks = ConfigDict()  # a user's own tasks by name; see README "Your own task"
    c.stages = ()  # each dict(task="name" | ("a", "b"), steps=N | epochs=N, and any section below to override)
    c.data = ConfigDict(dict(
        root="",  # folder with local copies of the datasets; "" = the hub
        prompt_limit=2048,  # tokens; a longer prompt is a bad row
        buckets=(),  # token lengths that rows are padded to; () = powers of two up to prompt_limit
        bad_rows=0,  # how many bad rows may be left out (each is printed); more stop the run
        limit=None,  # training rows per task; None = all
        workers=0,  # image decoding processes; 0 = in this one
        prefetch=2,  # batches
        pack=False,  # SFT: several conversations in one row
        template="cot",  # cot | boxed | direct | letter | answer | none | path.jinja
        weights=(),  # of a stage's tasks, when it has several; () = by size
    ))  # fmt: skip

    c.method = ConfigDict(dict(
        name="grpo",  # label in reports
        source="rollouts",  # gold | rollouts | self (own correct answers) | corpus (a rollouts/*.jsonl)
        objective="policy",  # policy | sft | eaft | distill
        advantage="grpo",  # grpo | dr_grpo | rloo | remax | reinforce | reinforce01 | reinforce++ | batch
        ratio="none",  # none | token | sequence (GSPO) | cispo
        clip_low=0.2, clip_high=0.3, clip_dual=3.0,  # 0 <= clip_low < 1; clip_dual > 1 or None
        normalise="token",  # token | sequence | fixed: what the summed loss is divided by
        kl_coef=0.01,  # >= 0; 0 keeps no reference model
        kl_estimator="k3",  # k1 (in reward only) | k2 | k3
        kl_place="loss",  # loss | reward
        kl_limit=10.0,  # k3 is cut here: a token 13 times less likely than under the reference feels no pull; None = not cut
        kl_reference="stage",  # base | stage | a model's folder
        updates_per_batch=1,  # parts that a batch of rollouts is cut into, one optimiser step each
        passes=1,  # times over one batch of rollouts
        truncated="score",  # score | zero | mask: a response that met the length limit
        overlong=0,  # tokens before the limit over which DAPO's length penalty grows to 1; 0 = none
        tis_cap=None,  # policy: cap of the weight now / sampler of each token, for stale, cut or quantised sampling; None = no weights
        entropy_coef=0.0,
        # None | dict(name="incompetent" | "zero_variance", samples=8) | dict(name="window" | "random", samples=8, lo=1, hi=8)
        #      | dict(name="random", like="<run folder>"): as many prompts as that run's filter kept of each stage's tasks, drawn blindly
        filter=None,
        online_filter=None,  # None | dict(lo=0.01, hi=0.99, max_refills=10): DAPO's dynamic sampling
        corpus="",  # source="corpus": the file
        corpus_answer="own",  # own: its correct answers | gold: all, each with the correct answer in the place of its own
        self_samples=4,  # source="self": answers drawn per prompt
        refresh="never",  # source="self": never | epoch | a number of steps
        replay=dict(fraction=0.0, kind="gold"),  # of a batch, from earlier stages; gold | prompts
        penalty=dict(name="none", coef=0.0, samples=64),  # none | ewc | l2 | lwf
        average=0.0,  # WiSE-FT: weight of the stage's start after the stage, in [0, 1)
        distill=dict(teacher="ema", ema=0.01, direction="forward", top_k=0, skip_tokens=0),  # SDFT: ema | frozen | current
    ))  # fmt: skip

    c.rewards = ConfigDict(dict(
        accuracy=0.9, format=0.1,  # weights of the template's two parts
        on_error="stop",  # stop | zero: a reward function that raises, hangs or returns NaN
        timeout=10.0,  # seconds for one answer
        processes=2,
    ))  # fmt: skip
    c.rollout = ConfigDict(dict(
        group=8,  # responses per prompt
        temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
        max_new_tokens=1024,
        slots=0,  # groups decoded at a time; 0 = the whole batch
        check_every=16,  # decode steps between two looks at which rows are done
        dtype="",  # "" = compute_dtype | float32 | bfloat16 | int8 (weights of eight bits; needs qwix)
        gather=False,  # copy the weights to every fsdp member while decoding (evaluation too); else each token moves all weights
    ))  # fmt: skip

    c.train = ConfigDict(dict(
        batch=128,  # prompts (RL) or conversations (SFT) per rollout batch
        micro_batch=0,  # rows per device pass; 0 = all
        lr=1e-6, schedule="constant", warmup=0.0,  # constant | cosine | linear | wsd; warmup: share of the stage's steps
        optimizer="adamw",  # adamw | muon | adafactor
        b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2, clip=1.0,
        moments_dtype="float32",  # bfloat16 second moments with b2 = .999 never decay: a parity switch only
        reset_optimizer=True,  # at each stage
        max_skipped=10,  # updates in a row, not finite or without a token to learn from, before the run stops
        chunk=1024,  # tokens whose logits exist at one time
    ))  # fmt: skip

    c.eval = ConfigDict(dict(
        tasks="all",  # all = every task of the stages; else "a,b"
        general=(),  # tasks never trained, reported apart
        groups=dict(),  # name -> some of `general` whose mean change is a number of its own
        limit=None,  # test rows per task
        every=None,  # steps; None = at stage ends only
        mini=240,  # rows per task of the evaluation inside a stage
        before=True,  # evaluate the base model (row 0)
        batch=64,
        max_new_tokens=256, temperature=0.0,
        templates=(),  # () = each task's last training template, else data.template; several = one row of evals.csv each
        forced_prefix=False,  # also score with the expected prefix forced (format apart from knowledge)
        drift=0,  # prompts per task for KL(base || now); 0 = off
    ))  # fmt: skip
    c.checkpoint = ConfigDict(
        dict(every=100, minutes=0, keep=2, async_save=True)
    )  # within a stage; stage ends are kept for good
    c.log = ConfigDict(dict(every=1, rollouts=True, gallery=12, tensorboard=False, wandb=""))
    return c


# Methods as what they change of `method`; `config.method.update(METHODS["rloo"])` or `dict(method=METHODS["rloo"])` in a stage.
_SFT = dict(objective="sft", kl_coef=0.0)
_CUT = dict(
    updates_per_batch=4
)  # the first update on a batch has ratios of 1: clips act from the second on
METHODS = dict(
    sft=dict(name="sft", source="gold", **_SFT),
    eaft=dict(name="eaft", source="gold", objective="eaft", kl_coef=0.0),  # cross-entropy weighted by entropy
    self_sft=dict(name="self_sft", source="self", refresh="never", **_SFT),  # own correct answers of the stage's start
    iterative_sft=dict(name="iterative_sft", source="self", refresh="epoch", **_SFT),  # drawn anew each epoch
    corpus_sft=dict(name="corpus_sft", source="corpus", **_SFT),  # another run's rollouts: set method.corpus
    sdft=dict(name="sdft", source="rollouts", objective="distill", kl_coef=0.0),
    grpo=dict(name="grpo", advantage="grpo"),
    dr_grpo=dict(name="dr_grpo", advantage="dr_grpo", normalise="fixed", kl_coef=0.0),
    dapo=dict(name="dapo", advantage="grpo", ratio="token", clip_low=0.2, clip_high=0.28, clip_dual=None, kl_coef=0.0,
              online_filter=dict(lo=0.0, hi=1.0, max_refills=10), overlong=128, **_CUT),
    gspo=dict(name="gspo", advantage="grpo", ratio="sequence", clip_low=3e-4, clip_high=4e-4, clip_dual=None, normalise="sequence", **_CUT),
    cispo=dict(name="cispo", advantage="grpo", ratio="cispo", clip_low=0.99, clip_high=0.28, clip_dual=None, kl_coef=0.0, **_CUT),
    rloo=dict(name="rloo", advantage="rloo"),
    remax=dict(name="remax", advantage="remax"),
    reinforce=dict(name="reinforce", advantage="reinforce", kl_coef=0.0),
    reinforce01=dict(name="reinforce01", advantage="reinforce01", kl_coef=0.0),  # only correct answers are pushed
    reinforce_pp=dict(name="reinforce++", advantage="reinforce++", ratio="token", kl_place="reward", kl_estimator="k1", **_CUT),
)  # fmt: skip
