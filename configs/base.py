"""Every setting of cptjax, with its unit and range; the other configs change what they need.

A setting that may be None is declared with `optional(type)`. The command line can set everything:

    --config.train.lr=2e-6          --config.data.limit=100         --config.eval.every=None
    --config.stages[1].epochs=3     --config.stages[0].train.lr=1e-5
    --config.arms.grpo.method.kl_coef=0
    --config.method.online_filter="dict(lo=0.1, hi=0.9, max_refills=10)"
"""

from ml_collections.config_dict import ConfigDict, FieldReference


def optional(kind: type, default: object = None) -> FieldReference:
    """Declare a setting that is None or of type `kind`; `object` allows several types."""
    return FieldReference(default, field_type=kind)


def pick_word(config: str, words: list[str], known: object, default: str) -> str:
    """Return the word of a config's argument that is one of `known`; refuse several."""
    found = [word for word in words if word in known]
    if len(found) > 1:
        raise ValueError(
            f"{config}: expected one of {', '.join(found)}, got {len(found)}; start a run for each"
        )
    return found[0] if found else default


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.name = "run"
    c.seed = 0
    c.seeds = ()  # several seeds: one run each, in subfolders of the workdir; () = only `seed`
    c.orders = ()  # several task orders: each a tuple of stage indices; () = as listed
    c.arms = ConfigDict()  # name -> overrides: methods to compare, one subfolder each, one report
    # Values of settings, each a tuple at the place of the setting, or named changes under a word of
    # your own; every arm is repeated with each combination. ConfigDict(dict(train=dict(lr=(1e-6,
    # 1e-5)))) gives NAME+lr=1e-06 and NAME+lr=1e-05; also --config.sweep.train.lr=1e-6,1e-5.
    c.sweep = ConfigDict()
    # Also train each stage after the first from the base model, in fresh/ of the run: the reference
    # of the metric `plasticity`. An arm may set it.
    c.fresh = False
    # Expected results, each dict(arm=, metric=, at_least= ...); see evaluation/report/expect.py.
    c.expect = ()
    c.report = ConfigDict(dict(
        baseline="",  # arm that the others are compared with, seed by seed; "" = the first
        sort="",  # metric by which the arms are listed, the best first; "" = as in the config
    ))  # fmt: skip
    c.prestage = ConfigDict()  # overrides of a run that first makes the base model; empty = none
    # Resume although the config, a data, reward or template file, or the model differs from that of
    # the run's start.
    c.allow_change = False

    c.model = ConfigDict(dict(
        path="",  # Hugging Face folder or hub id; "" = a random model of `preset`
        preset="tiny",  # tiny | 7b | qwen2.5-7b | llama3.1-8b | ...; only read where path is ""
        # float32 | bfloat16: of trained weights; frozen weights have compute_dtype
        param_dtype="float32",
        compute_dtype="bfloat16",  # bfloat16 | float32
        min_pixels=200704,  # pixels per image, >= one merged patch; in training and evaluation
        max_pixels=1003520,  # pixels per image
        freeze=(),  # some of vision, merger, language
        remat="dots",  # none | dots | block | offload: what a layer keeps for its backward pass
        # auto | xla | tiled (CPU) | cudnn (GPU) | splash (TPU); cudnn_padded: packed groups (GRPO)
        # with the kernel of cuDNN too, in a padded form
        attention="auto",
        lora=dict(  # rank 0 = no LoRA: all weights are trained
            rank=0, alpha=16.0, targets=("q", "k", "v", "o", "gate", "up", "down"), vision=False),
    ))  # fmt: skip
    c.mesh = ConfigDict(dict(data=1, fsdp=-1, model=1, slices=1))  # devices per axis; one may be -1
    # Minutes after which processes end that wait for each other at different places; 0 = never.
    c.stuck_minutes = 10.0

    c.tasks = ConfigDict()  # a user's own tasks by name; see README "Your own task"
    # Each dict(task="name" | ("a", "b"), steps=N | epochs=N) and overrides of any section below.
    c.stages = ()
    c.data = ConfigDict(dict(
        root="",  # folder with local copies of the datasets; "" = the hub
        # Folders outside of that of a data file from which its rows may take images and videos, by
        # an absolute path, .. or a link; ("/",) = from everywhere.
        outside_images=(),
        prompt_limit=2048,  # tokens; a longer prompt is a bad row
        # Token lengths that rows are padded to, up to prompt_limit; () = 64, 96, 128, 192, ...
        buckets=(),
        bad_rows=0,  # number of bad rows to leave out (each is printed); more stop the run
        limit=optional(int),  # training rows per task; None = all
        workers=0,  # processes that decode images; 0 = the main process
        prefetch=2,  # batches
        pack=False,  # SFT: put several conversations into one row
        # cot | boxed | steps | direct | letter | answer | none | released_cot | released_nocot
        # | path.jinja
        template="cot",
        weights=(),  # sampling weights of a stage's tasks if it has several; () = by size
    ))  # fmt: skip

    c.method = ConfigDict(dict(
        name="grpo",  # label in reports
        # gold | rollouts | self (own correct responses) | corpus (a jsonl file)
        # | gold+corpus (every gold answer, and every response of the file)
        source="rollouts",
        objective="policy",  # policy | sft | eaft | dft | distill
        # grpo | dr_grpo | rloo | remax | reinforce | reinforce01 | reinforce++ | batch
        advantage="grpo",
        ratio="none",  # none | token | sequence (GSPO) | cispo
        clip_low=0.2, clip_high=0.3,  # 0 <= clip_low < 1
        clip_dual=optional(float, 3.0),  # > 1; None = no dual clip
        normalise="token",  # token | sequence | fixed: what the summed loss is divided by
        kl_coef=0.01,  # >= 0; 0 keeps no reference model
        kl_estimator="k3",  # k1 (in reward only) | k2 | k3
        kl_place="loss",  # loss | reward
        kl_limit=optional(float, 10.0),  # largest k3 of a token, 0 gradient beyond; None = no limit
        kl_reference="stage",  # base | stage | the folder of a model with the same tokenizer
        updates_per_batch=1,  # parts of a batch of rollouts, one optimizer update each
        passes=1,  # number of passes over a batch of rollouts
        # For responses that reach the length limit: score | zero (objective="policy") | mask
        truncated="score",
        # objective="policy": tokens before the limit over which DAPO's length penalty grows to 1;
        # 0 = none
        overlong=0,
        # objective="policy": largest importance weight (policy / sampler) of a token; None = none
        tis_cap=optional(float),
        entropy_coef=0.0,
        # objective="policy": train log-probabilities at rollout.temperature; False = at 1
        tempered=True,
        # RIF-RFT: None | dict(name="incompetent" | "zero_variance" | "unsolvable", samples=8)
        #      | dict(name="window" | "random", samples=8, lo=1, hi=8)
        #      | dict(name="random", like="<run folder>"): as many as the filter of that run kept
        # and with samples: balanced=True, at most as many as are left out; most=7500, at most so
        # many; top_p=1.0, of the sampled responses; corpus="FILE.jsonl", count the graded
        # responses of a file instead of sampling.
        filter=optional(object),
        # DAPO's dynamic sampling: None | dict(lo=0.01, hi=0.99, max_refills=10)
        online_filter=optional(object),
        corpus="",  # source="corpus": path of the file; see launch/generate.py
        corpus_template="",  # prompt template of the corpus' responses; "" = data.template
        # own: its correct responses | gold: all of them, with the gold answer inserted
        corpus_answer="own",
        self_samples=4,  # source="self": responses sampled per prompt
        # source="self": when to sample again: never | epoch | a number of steps
        refresh=optional(object, "never"),
        # what an epoch of a stage counts: prompts | responses (of a corpus, or of source="self"
        # with refresh="never", which may have several per prompt)
        epoch_unit="prompts",
        # Continual-learning methods, one of each kind; None = the default of the method's class in
        # cptjax/training/algorithms/continual_learning.
        # none | gold | prompts: rows of earlier stages, in a fraction of each batch
        # | er | der | derpp: a memory of rows of earlier stages
        replay=dict(
            name="none",
            fraction=optional(float),  # gold, prompts: of a batch, in (0, 1)
            rows=optional(int), max_bytes=optional(int),  # budget of the memory, one of the two
            batch=optional(int),  # rows of the memory in an update
            tokens=optional(int),  # the most tokens of a response in the memory
            top_k=optional(int),  # der, derpp: log-probabilities stored for each token
            coef=optional(float),  # er: of the cross-entropy on the memory, > 0
            alpha=optional(float),  # der, derpp: of the divergence from stored outputs, > 0
            beta=optional(float),  # derpp: of the cross-entropy on the memory, > 0
        ),
        reward=dict(
            name="none",  # none | rapo
            weight=optional(float),  # of the reward for retention, > 0
            alpha=optional(float),  # that reward is exp(-alpha * drift), > 0
            decay=optional(float),  # of the average deviation of rewards, in [0, 1)
        ),
        loss=dict(name="none", coef=optional(float)),  # none | lwf
        penalty=dict(
            name="none",  # none | l2 | ewc | online_ewc | si | mas | cpo
            coef=optional(float),  # > 0
            samples=optional(int),  # ewc, online_ewc, mas: rows for the importance of weights
            decay=optional(float),  # online_ewc: of earlier importance, for each stage, in (0, 1]
            damping=optional(float),  # si: what the squared change is increased by, > 0
            share=optional(float),  # cpo: of each tensor that a stage protects, in (0, 1]
        ),
        # none | gpm: remove from gradients, and from the changes of weights, directions of earlier
        # stages, at most `rank` for each of the weights named by `layers`, with a share `energy`
        # of the squared gradients of `samples` rows
        # | agem: remove what opposes the gradient on a memory, with the settings of replay's memory
        gradient=dict(name="none", rank=optional(int), energy=optional(float),
                      samples=optional(int), layers=optional(tuple), rows=optional(int),
                      max_bytes=optional(int), batch=optional(int), tokens=optional(int)),
        # none | merge_lora | o_lora: new adapters in each stage, with model.lora
        parameters=dict(name="none", coef=optional(float)),
        # none | wise_ft: average with the weight of the stage's start, in (0, 1)
        # | task_arithmetic | ties | dare | max_merge: base model + weight * a mixture of the
        # changes of all stages; ties and dare use a share of them, `density`. All with
        # model.lora.rank=0: merged factors of adapters are no merge of the weights.
        stage_end=dict(name="none", weight=optional(float), density=optional(float)),
        plugin="",  # a class of your own, "file.py:Class"; see README
        plugin_settings=optional(object),  # dict of its settings
        # SDFT; teacher: ema | frozen | current, with a demonstration in its prompt, or the folder
        # of a model, with the student's prompt; direction: forward | reverse
        distill=dict(
            teacher="ema", ema=0.01, direction="forward", top_k=0, skip_tokens=0),
    ))  # fmt: skip

    c.rewards = ConfigDict(dict(
        accuracy=0.9, format=0.1,  # weights of the two parts of a reward
        short_words=0,  # a response of fewer words loses short_penalty; 0 = none does
        short_penalty=0.5,  # >= 0; like the weights, not for a reward function of one's own
        on_error="stop",  # stop | zero: if a reward function raises, hangs or returns NaN
        timeout=10.0,  # seconds per response
        processes=2,  # that call reward functions
    ))  # fmt: skip
    c.rollout = ConfigDict(dict(
        group=8,  # responses per prompt
        temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
        max_new_tokens=1024,
        slots=0,  # groups decoded at a time; 0 = the whole batch
        # The most responses of a group decoded at a time in a slot; 0 = all. With fewer, a row
        # whose response ends starts the group's next one, and does not wait for the longest one.
        slot_rows=0,
        check_every=16,  # decode steps between two checks whether responses have ended
        dtype="",  # "" = compute_dtype | float32 | bfloat16 | int8 (8-bit weights; needs qwix)
        # Copy the weights to every fsdp member for decoding, also in evaluation; otherwise every
        # decode step transfers all weights. None = if the copy and four times the sharded weights
        # take at most two thirds of a device's memory, which a CPU does not tell.
        gather=optional(bool),
        # Devices on the axis `model` while sampling, a multiple of mesh.model; 0 = mesh.model. The
        # more there are, the less of the weights each of them reads for a token.
        model=0,
        # Devices that share MLPs and the vocabulary while sampling, a multiple of rollout.model;
        # 0 = rollout.model. MLPs can be split more often than the few key/value heads.
        mlp=0,
        # method.source="rollouts": 1 = the responses of a step are sampled with the weights before
        # the update of the step before it, while the rewards of that step are computed. Ratios, or
        # method.tis_cap, are relative to these weights. 0 = they are sampled after that update.
        ahead=0,
    ))  # fmt: skip

    c.train = ConfigDict(dict(
        batch=128,  # prompts (RL) or conversations (SFT) per rollout batch
        # Prompts or conversations per device pass; 0 = all. In RL, it is for the longest rows: if
        # the rows of an update are shorter, several micro-batches share a pass.
        micro_batch=0,
        lr=1e-6, schedule="constant",  # constant | cosine | linear | wsd
        warmup=0.0,  # share of the stage's updates
        optimizer="adamw",  # adamw | muon | adafactor
        b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2,
        clip=optional(float, 1.0),  # largest norm of the gradient; None = no clipping
        # bfloat16 second moments with b2 = .999 never decay: only for parity with released code
        moments_dtype="float32",
        reset_optimizer=True,  # at the start of each stage
        max_skipped=10,  # updates skipped in a row (not finite, or no token) that stop the run
        chunk=1024,  # tokens whose logits are in memory at a time
    ))  # fmt: skip

    c.eval = ConfigDict(dict(
        tasks="all",  # all = every task of the stages; else "a,b"
        general=(),  # tasks that are never trained, reported separately
        groups=dict(),  # name -> some of `general`, whose mean change is reported as a metric
        limit=optional(int),  # test rows per task; None = all
        every=optional(int),  # steps between evaluations inside a stage; None = none
        mini=240,  # rows per task of an evaluation inside a stage
        before=True,  # evaluate the base model (row 0)
        batch=64,
        max_new_tokens=256, temperature=0.0, top_p=1.0,
        samples=1,  # responses per row; with more, a row's score is their mean
        # Templates to evaluate with; () = each task's last training template, else data.template.
        templates=(),
        forced_prefix=False,  # also evaluate with a forced prefix: knowledge without format
        # Also measure the probability of the gold answer after the forced prefix.
        gold_probability=False,
        drift=0,  # prompts per task for KL(base || current model); 0 = off
    ))  # fmt: skip
    c.checkpoint = ConfigDict(dict(  # inside a stage; ends of stages are always saved
        # False: the ends of stages are deleted when the run is finished, and no analysis can read
        # its weights.
        keep_stages=True,
        every=100, minutes=20.0,  # steps, minutes between two of them
        keep=2,  # the newest ones; more than 2 stay after the stage, to analyze influence along it
        async_save=True,
    ))  # fmt: skip
    c.log = ConfigDict(dict(
        every=1, rollouts=True,  # steps between two lines of metrics.jsonl
        gallery=12,  # prompts of a stage's first and last step whose images are kept
        report_minutes=5.0,  # between two reports while a run goes on; 0 = only after stages
        # Trackers: wandb, trackio = name of the project, mlflow = of the experiment; "" = off.
        tensorboard=False, wandb="", trackio="", mlflow="",
        changed_weights=False,  # the share of the trained weights that an update changes
    ))  # fmt: skip
    return c


def _method(**changes: object) -> dict[str, object]:
    """Return every setting of `method`: the defaults above with some changes."""
    return get_config().method.to_dict() | changes


# Complete methods: each sets every setting of `method`, so nothing of another method remains.
# In a stage: `dict(task=..., method=METHODS["rloo"])`; in a config:
# `config.method.update(METHODS["rloo"])`; with changes: `{**METHODS["grpo"], "kl_coef": 0.0}`.
_SFT = dict(objective="sft", kl_coef=0.0)
# In the first update on a batch all ratios are 1, so clipping has an effect only from the second.
_FOUR_UPDATES = dict(updates_per_batch=4)
METHODS = dict(
    sft=_method(name="sft", source="gold", **_SFT),
    # Cross-entropy weighted by entropy.
    eaft=_method(name="eaft", source="gold", objective="eaft", kl_coef=0.0),
    # Cross-entropy weighted by the probability of each token (2508.05629); ASFT (2509.23753) adds
    # an anchor, here the model at the stage's start.
    dft=_method(name="dft", source="gold", objective="dft", kl_coef=0.0),
    asft=_method(name="asft", source="gold", objective="dft", kl_coef=0.0,
                 loss=dict(name="lwf", coef=0.05)),
    # Own correct responses, sampled at the start of the stage | of each epoch. Equal ones to a
    # prompt are trained on once; so are those of a corpus.
    self_sft=_method(name="self_sft", source="self", refresh="never", **_SFT),
    iterative_sft=_method(name="iterative_sft", source="self", refresh="epoch", **_SFT),
    # Another run's rollouts: set method.corpus.
    corpus_sft=_method(name="corpus_sft", source="corpus", **_SFT),
    sdft=_method(name="sdft", source="rollouts", objective="distill", kl_coef=0.0),
    grpo=_method(name="grpo", advantage="grpo"),
    dr_grpo=_method(name="dr_grpo", advantage="dr_grpo", normalise="fixed", kl_coef=0.0),
    dapo=_method(name="dapo", advantage="grpo", ratio="token", kl_coef=0.0, overlong=128,
                 clip_low=0.2, clip_high=0.28, clip_dual=None,
                 online_filter=dict(lo=0.0, hi=1.0, max_refills=10), **_FOUR_UPDATES),
    gspo=_method(name="gspo", advantage="grpo", ratio="sequence", normalise="sequence",
                 clip_low=3e-4, clip_high=4e-4, clip_dual=None, **_FOUR_UPDATES),
    cispo=_method(name="cispo", advantage="grpo", ratio="cispo", kl_coef=0.0,
                  clip_low=0.99, clip_high=0.28, clip_dual=None, **_FOUR_UPDATES),
    rloo=_method(name="rloo", advantage="rloo"),
    remax=_method(name="remax", advantage="remax"),
    reinforce=_method(name="reinforce", advantage="reinforce", kl_coef=0.0),
    # Only correct responses are reinforced.
    reinforce01=_method(name="reinforce01", advantage="reinforce01", kl_coef=0.0),
    reinforce_pp=_method(name="reinforce++", advantage="reinforce++", ratio="token",
                         kl_place="reward", kl_estimator="k1", **_FOUR_UPDATES),
)  # fmt: skip
