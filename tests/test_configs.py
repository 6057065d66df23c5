"""Every arm of the shipped configs resolves and passes the checks; unknown words are one line."""

import importlib

import pytest
from ml_collections import ConfigDict

from configs import base, cpt7, ctbench, demo, jigsaw, mrcl, retain, smol, ucit
from cptjax.common.config_checks import check_config
from cptjax.common.runs import expand_runs, prestage_runs
from cptjax.config import (
    FREE_SECTIONS,
    config_differences,
    config_to_dict,
    evaluated_tasks,
    merge_config,
    resolve_stages,
)
from cptjax.evaluation.report import expect
from cptjax.tasks import prompted_task, registry
from cptjax.training import build, validate_config
from cptjax.training.algorithms import prompt_filters
from cptjax.types import Example

CORPUS = {"method": {"corpus": "rollouts/stage1.jsonl"}}
CPT7 = [
    f"{arm},{size}{more}"
    for arm in cpt7.ARMS
    for size, more in (("3b", ""), ("7b", ",official"), ("7b", ",paper"), ("tiny", ""))
]
CPT7 += ["grpo,qwen3vl8b"]
JIGSAW = [f"{arm},{size}" for arm in jigsaw.METHOD for size in ("3b", "7b", "tiny")]
JIGSAW += ["bare,qwen3vl4b", "grpo,qwen3vl32b"]
JIGSAW += ["grpo,images=synthetic"]
GOLD = ("sft", "sft_kl")  # need gold answers, which MMLU alone has
PAIRS = [
    (arm, task)
    for arm in retain.ARMS
    for task in retain.TASKS
    if arm not in GOLD or task in retain.GOLD
]
MODELS = ("3b", "tiny", "qwen7b,paper", "llama1b,scripts", "qwen1.5b,scripts,bf16")
RETAIN = [f"{arm},{task},{model}" for arm, task in PAIRS for model in MODELS]
MRCL = [f"{arm},{size}" for arm in mrcl.ARMS for size in mrcl.SIZES]
CTBENCH = [
    f"{arm},{size},{order}"
    for arm in ctbench.ARMS
    for size, order in (("3b", "order3"), ("tiny", "order1"))
]
CTBENCH += [f"sft,{size}" for size in ctbench.SIZES]
UCIT = [f"{arm},{size}" for arm in ucit.ARMS for size in ucit.SIZES]
ALL = (
    [(cpt7, a) for a in CPT7]
    + [(jigsaw, a) for a in JIGSAW]
    + [(retain, a) for a in RETAIN]
    + [(mrcl, a) for a in MRCL]
    + [(ctbench, a) for a in CTBENCH]
    + [(ucit, a) for a in UCIT]
    + [(demo, "0"), (demo, "1,short"), (demo, "0,methods"), (demo, "0,methods,short")]
    + [(smol, "0"), (smol, "1,short"), (smol, "0,lora"), (smol, "0,bf16"), (smol, "0,sweep,gpu")]
)


@pytest.mark.parametrize(("module", "arg"), ALL, ids=[f"{m.__name__[8:]}:{a}" for m, a in ALL])
def test_every_arm_resolves(module, arg):
    config = module.get_config(arg)
    assert config.is_locked or module is demo
    config.lock()
    with pytest.raises((AttributeError, KeyError)):
        config.method.advantag = "grpo"  # locked: a misspelt key is refused
    if "corpus" in config.method.source:
        with pytest.raises(ValueError, match="needs method.corpus"):
            validate_config.validate_stage(resolve_stages(config)[0])
        config = merge_config(config, CORPUS)
    expect.check_expectations(config)
    for run in (*prestage_runs(config).values(), *(run for _, run in expand_runs(config))):
        check_config(run)
        for stage in resolve_stages(run):
            validate_config.validate_stage(stage)
            for name in (*stage.tasks, *stage.config.eval.general):
                registry.resolve_task(name, run.tasks.to_dict())


@pytest.mark.parametrize(
    ("module", "known"),
    [(m, "grpo") for m in (cpt7, jigsaw, retain, mrcl, ctbench)]
    + [(ucit, "lora_sft"), (smol, "sweep")],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_unknown_word_is_one_line_that_names_the_known_ones(module, known):
    with pytest.raises(ValueError) as error:
        module.get_config("gpro")
    assert (
        "'gpro'" in str(error.value) and known in str(error.value) and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    ("module", "arg"),
    [
        *((cpt7, "grpo,7b,sft"), (cpt7, "3b,grpo,7b"), (jigsaw, "grpo,bare"), (mrcl, "2b,4b")),
        *((retain, "self_sft,grpo"), (retain, "ifeval,mmlu"), (retain, "paper,scripts")),
        *((ctbench, "order1,order3"), (ucit, "3b,7b"), (cpt7, "grpo,7b,v5p-4x4x4,h100-8")),
    ],
)
def test_two_words_of_one_kind_are_refused_not_the_second_ignored(module, arg):
    with pytest.raises(ValueError, match=f"{arg}: expected one of .*, got 2; start a run for each"):
        module.get_config(arg)


@pytest.mark.parametrize("arg", ["0,shrot", "x", "short", "-1"])
def test_the_demo_refuses_other_words(arg):
    with pytest.raises(ValueError, match=f"got '{arg}', expected a seed, then some of short"):
        demo.get_config(arg)


def test_every_arm_of_the_papers_exists():
    assert set(cpt7.ARMS) >= {
        "sft",
        "joint",
        "grpo",
        "rloo",
        "remax",
        "nokl",
        "nocot",
        "rif",
        "rif_zero",
        "rif_control",
    }  # 1.5-1.8, 1.10
    assert set(cpt7.ARMS) >= {
        "self_sft",
        "iterative_sft",
        "traces",
        "rl_traces",
        "sft_kl",
        "reinforce",
        "reinforce01",
    }  # 3.1
    assert set(cpt7.ARMS) >= {
        "lora_sft",
        "low_lr_sft",
        "replay",
        "ewc",
        "online_ewc",
        "si",
        "mas",
        "cpo",
        "grpo_ewc",
        "grpo_cpo",
        "rapo",
        "l2",
        "lwf",
        "wise",
        "er",
        "der",
        "derpp",
        "agem",
        "prompt_replay",
        "eaft",
    }  # reviewers'
    assert set(jigsaw.METHOD) == {
        "grpo",
        "bare",
        "trace",
        "rft_rollout",
        "self_generated",
        "iterative",
    }  # 2.2
    assert set(retain.ARMS) >= {
        "sft",
        "teacher_sft",
        "self_sft",
        "iterative_sft",
        "rl_traces",
        "grpo",
        "grpo_nokl",
        "reinforce",
    }  # 3.1


@pytest.mark.parametrize(
    "arg", [f"{arm},{task}" for arm in GOLD for task in ("ifeval", "countdown")]
)
def test_sft_without_gold_answers_is_refused_in_one_line(arg):
    with pytest.raises(
        ValueError, match=f"{arg.split(',')[1]} has no gold answers .*teacher_sft"
    ) as error:
        retain.get_config(arg)
    assert "\n" not in str(error.value)


def test_every_stage_of_a_corpus_arm_has_its_own_file():
    stages = resolve_stages(cpt7.get_config("rl_traces,corpus=runs/grpo/rollouts"))
    assert [s.config.method.corpus for s in stages] == [
        f"runs/grpo/rollouts/stage{k}.jsonl" for k in range(1, 8)
    ]
    for each in stages:
        validate_config.validate_stage(each)
    with pytest.raises(ValueError, match="not to grpo"):
        cpt7.get_config("grpo,corpus=runs")


def test_every_arm_is_evaluated_under_the_same_templates_its_own_first():
    for module, arms, ways in (
        (cpt7, cpt7.ARMS, {"cot", "direct"}),
        (jigsaw, jigsaw.METHOD, {"answer", "direct"}),
    ):
        for c in map(module.get_config, arms):
            assert set(c.eval.templates) == ways and c.eval.templates[0] == c.data.template


PAPER_A_TASKS = tuple(
    f"cpt7_{name}"
    for name in ("scienceqa", "textvqa", "vizwiz", "gqa", "geometry3k", "pathvqa", "superclevr")
)


def test_paper_a_trains_on_its_own_variants_unless_official():
    own, official = cpt7.get_config("sft,7b"), cpt7.get_config("official,sft,7b")
    assert tuple(s["task"] for s in own.stages) == PAPER_A_TASKS
    assert tuple(s["task"] for s in official.stages) == cpt7.ORDER
    assert (
        [s["epochs"] for s in own.stages]
        == [1, 1, 1, 1, 10, 1, 3]
        == [s["epochs"] for s in official.stages]
    )
    assert {registry.BUILT_IN_TASKS[t].scorer for t in PAPER_A_TASKS} == {"mathruler_parity"}
    assert own.eval.general == (
        "cpt7_mmmu",
        "cpt7_mmlu_pro",
        "cpt7_pope",
    ) and official.eval.general == ("mmmu", "mmlu_pro", "pope")
    joint = resolve_stages(cpt7.get_config("joint,7b"))
    assert len(joint) == 1 and joint[0].tasks == PAPER_A_TASKS
    assert tuple(retain.TASKS.values()) == ("retain_ifeval", "retain_mmlu", "countdown")


def test_paper_a_numbers_by_arm():
    grpo, sft = cpt7.get_config("grpo,7b"), cpt7.get_config("sft,7b")
    assert (grpo.train.batch, grpo.rollout.group, grpo.train.lr, grpo.method.kl_coef) == (
        512,
        8,
        1e-6,
        0.01,
    )
    assert (sft.train.batch, sft.train.lr, sft.train.schedule, sft.train.warmup) == (
        24,
        1e-5,
        "cosine",
        0.1,
    )
    assert (
        cpt7.get_config("remax").method.advantage == "remax"
        and cpt7.get_config("rloo").method.advantage == "rloo"
    )
    assert (
        cpt7.get_config("nokl").method.kl_coef == 0
        and cpt7.get_config("lora_sft").model.lora.rank > 0
    )
    assert (
        cpt7.get_config("lora_sft").model.lora.alpha
        == 2 * cpt7.get_config("lora_sft").model.lora.rank
    )
    keys = {"rif": "incompetent", "rif_zero": "zero_variance", "rif_control": "random"}
    assert {arm: cpt7.get_config(arm).method.filter["name"] for arm in keys} == keys
    window = lambda arm: prompt_filters.success_window(**cpt7.get_config(arm).method.filter)
    assert window("rif") == window("rif_control") == (1, 8) and window("rif_zero") == (
        1,
        7,
    )  # matched budget
    fair = [
        ("model", "min_pixels"),
        ("model", "max_pixels"),
        ("model", "freeze"),
        ("train", "moments_dtype"),
    ]
    assert all(grpo[a][b] == sft[a][b] for a, b in fair)


def test_paper_a_as_released():
    """What `paper` changes: ScienceQA's steps, KL of RIF, equal sets, SFT's decay, evaluation."""
    paper = lambda arm: cpt7.get_config(f"{arm},7b,paper")
    first = {arm: dict(paper(arm).stages[0]) for arm in ("grpo", "nokl", "nocot", "rif", "sft")}
    assert {arm: stage.get("steps") for arm, stage in first.items()} == {
        **{"grpo": 90, "nokl": 120, "nocot": 180, "rif": 90},
        "sft": None,
    }
    assert [s.get("epochs") for s in paper("grpo").stages] == [None, 1, 1, 1, 10, 1, 3]
    assert (paper("grpo").method.kl_reference, paper("rif").method.kl_reference) == (
        "base",
        "stage",
    )
    tasks = [stage["task"] for stage in paper("sft").stages]
    assert tasks == [f"released_{name}" for name in cpt7.ORDER]
    sets = {a: paper(a).method.filter for a in ("rif", "rif_unsolvable", "rif_control")}
    assert all(f["balanced"] and f["most"] == 7500 and f["top_p"] == 1 for f in sets.values())
    assert paper("grpo").eval.temperature == 0.5 and paper("sft").eval.temperature == 0
    assert paper("grpo").method.tis_cap is None and paper("grpo").rollout.top_p == 0.99
    assert paper("grpo").train.moments_dtype == "bfloat16"
    assert (paper("sft").train.weight_decay, paper("sft").train.moments_dtype) == (0, "float32")
    own, mixture = cpt7.get_config("grpo,7b"), paper("sft_mixture").method
    assert own.eval.temperature == 0 and own.method.tis_cap == 2 and own.stages[0]["epochs"] == 1
    assert (mixture.source, mixture.corpus_template) == ("gold+corpus", "released_cot")
    assert paper("nocot").eval.templates == ("released_nocot", "released_cot")
    assert paper("sft").eval.templates == ("direct", "released_cot")
    with pytest.raises(ValueError, match="choose official or paper"):
        cpt7.get_config("grpo,paper,official")


@pytest.mark.parametrize(
    ("arg", "lr", "batch"),
    [
        ("teacher_sft,mmlu,qwen7b,paper", 5e-6, 128),
        ("teacher_sft,countdown,llama1b,paper", 1e-4, 64),
        ("self_sft,ifeval,llama8b,scripts", 5e-5, 256),
        ("self_sft,countdown,qwen1.5b,scripts", 1e-4, 128),
        ("teacher_sft,countdown,qwen7b", 5e-5, 64),
        ("grpo,ifeval,qwen1.5b,paper", 5e-6, 32),
        ("reinforce,countdown,llama8b,scripts", 5e-6, 32),
    ],
)
def test_paper_c_rates_and_batches_by_source_and_size(arg, lr, batch):
    c = retain.get_config(arg)
    assert (c.train.lr, c.train.batch, c.eval.max_new_tokens) == (lr, batch, 4096)
    published = arg.endswith(("paper", "scripts"))
    if c.method.objective == "policy":
        assert c.method.tempered != published and c.rollout.temperature == 0.8
    else:
        assert c.method.epoch_unit == ("responses" if published else "prompts")


def test_paper_c_averages_the_drop_over_five_other_sets():
    c = retain.get_config("grpo,mmlu,llama8b,paper")
    assert c.eval.general == (
        *("retain_ifeval", "retain_countdown", "retain_math"),
        *("wildjailbreak", "wildguardtest"),
    )
    assert c.tasks.wildjailbreak.judge == c.tasks.wildguardtest.judge == "allenai/wildguard"


def test_paper_c_in_bfloat16_changes_only_number_formats():
    plain, rounded = (retain.get_config(f"grpo,mmlu,qwen7b{w}") for w in ("", ",bf16"))
    changed = config_differences(config_to_dict(plain), config_to_dict(rounded))
    assert {line.split(":")[0] for line in changed} == {
        "name",
        "model.param_dtype",
        "train.moments_dtype",
    }


def test_paper_c_iterates_in_one_stage_per_round():
    c = retain.get_config("iterative_sft,countdown,qwen7b,paper")
    assert [(s["task"], s["epochs"]) for s in c.stages] == 2 * [("retain_countdown", 1)]
    assert c.method.refresh == "never" and c.method.source == "self"


def test_paper_b_uses_photographs_unless_others_are_asked_for():
    images = lambda arg: jigsaw.get_config(arg).tasks.jigsaw.images
    assert registry.BUILT_IN_TASKS[images("grpo")].name == "textvqa"
    assert images("grpo,images=gqa") == "gqa" and images("bare,images=photos") == "photos"
    assert "synthetic" in jigsaw.get_config("grpo,images=synthetic").name


# Test rows of each evaluated task, from the cards of the data sets.
TEST_ROWS = dict(
    scienceqa=2017, textvqa=5000, vizwiz=4319, gqa=12578, geometry3k=601, pathvqa=6719,
    superclevr=642, mmmu=900, mmlu_pro=12032, pope=9000, refcoco=8811, docvqa=5349, jigsaw=5000,
    mme=2374, mmstar=1500, ifeval=541, mmlu=2042, countdown=1000, math=500,
)  # fmt: skip


@pytest.mark.parametrize("module", [cpt7, jigsaw, retain], ids=lambda m: m.__name__)
def test_drift_is_on_and_costs_under_5_percent_of_an_evaluation(module):
    """A response costs about as many FLOPs as one forward pass over it; drift takes two."""
    for arm in ("grpo", "self_sft") if module is not jigsaw else ("grpo", "bare"):
        c = module.get_config(arm)
        stages = resolve_stages(c)
        tasks = [*evaluated_tasks(c, stages), *c.eval.general]
        rows = [TEST_ROWS.get(t.removeprefix("cpt7_").removeprefix("retain_"), 0) for t in tasks]
        responses = sum(rows) * max(1, len(c.eval.templates))
        assert 0 < 2 * c.eval.drift * len(tasks) < 0.05 * responses, module.__name__


def test_prompts_and_rewards_with_and_without_reasoning():
    example = Example("0", [{"role": "user", "content": "How many ?"}], "3", "3", "cpt7_gqa")

    def prompted(arm):
        c = cpt7.get_config(arm)
        return prompted_task.make_prompted_task(
            registry.resolve_task("cpt7_gqa"), c.data.template, c.rewards, None
        )

    cot, direct = prompted("grpo"), prompted("nocot")
    text_of = lambda form: "".join(p["text"] for p in form.build_prompt(example)[-1]["content"])
    assert (
        "<think>" in text_of(cot) and "boxed" in text_of(cot) and "<think>" not in text_of(direct)
    )
    assert (
        cot.reward.template.format == "think_boxed" and direct.reward.template.format == ""
    )  # 0.9 / 0.1 | the accuracy alone
    assert prompted("sft").gold_response(example) == "3" and cot.gold_response(example).endswith(
        "\\boxed{3}"
    )


def test_paper_c_rewards_only_the_last_box():
    c = retain.get_config("grpo,countdown,tiny")
    prompted = prompted_task.make_prompted_task(
        registry.resolve_task("countdown"), c.data.template, c.rewards, None
    )
    example = Example(
        "0", [{"role": "user", "content": "Reach 14."}], 14, "", "countdown", {"nums": [2, 3, 4]}
    )
    assert "\\boxed{}" in "".join(p["text"] for p in prompted.build_prompt(example)[-1]["content"])
    said = ["Not \\boxed{14}, but 3 * 4 is 12, so \\boxed{3 * 4 + 2}.", "\\boxed{14}", "3 * 4 + 2"]
    assert [p["reward"] for p in prompted.compute_rewards(said, [example] * 3)] == [1, 0, 0]


@pytest.mark.parametrize("name", base.METHODS)
def test_every_preset_passes_the_checks_and_equal_settings_make_equal_objectives(name):
    config = base.get_config()
    corpus = "a.jsonl" if base.METHODS[name].get("source") == "corpus" else ""
    config.stages = (
        dict(task="synthetic_colour", steps=1, method={**base.METHODS[name], "corpus": corpus}),
    )
    (one,) = resolve_stages(config)
    validate_config.validate_stage(one)
    assert build.objective_from_config(one.config) == build.objective_from_config(
        one.config
    )  # equal settings share programs


@pytest.mark.parametrize("name", base.METHODS)
def test_a_preset_replaces_every_setting_of_any_other_method(name):
    """No setting of an earlier method remains, neither in a stage nor in an updated config."""

    def resolved(*presets):
        config = base.get_config()
        config.method.update({"filter": {"name": "window", "samples": 8}, "tis_cap": 2.0})
        config.method.replay.update(name="prompts", fraction=0.5)
        for preset in presets[:-1]:
            config.method.update(base.METHODS[preset])
        config.stages = (dict(task="a", steps=1, method=base.METHODS[presets[-1]]),)
        return config_to_dict(resolve_stages(config)[0].config)["method"]

    plain = base.get_config()
    plain.stages = (dict(task="a", steps=1, method=base.METHODS[name]),)
    alone = config_to_dict(resolve_stages(plain)[0].config)["method"]
    assert resolved(name) == alone and alone["name"] == base.METHODS[name]["name"]
    for other in base.METHODS:
        assert resolved(other, name) == alone, other


def test_a_stage_with_the_grpo_preset_trains_a_policy_loss_after_sft():
    config = base.get_config()
    config.method.update(base.METHODS["sft"])
    config.stages = (
        dict(task="a", steps=1),
        dict(task="b", steps=1, method={**base.METHODS["grpo"], "kl_coef": 0.5}),
    )
    sft, grpo = (stage.config.method for stage in resolve_stages(config))
    assert (sft.objective, sft.source) == ("sft", "gold")
    assert (grpo.objective, grpo.source, grpo.kl_coef) == ("policy", "rollouts", 0.5)


def test_no_two_presets_share_a_value_that_can_be_changed():
    one = base.METHODS["grpo"]["replay"]
    assert all(one is not base.METHODS[name]["replay"] for name in base.METHODS if name != "grpo")


WRONG = {
    "group of one": (dict(), dict(rollout=dict(group=1)), "rollout.group >= 2"),
    "clip_low": (dict(clip_low=1.0), {}, "0 <= clip_low < 1"),
    "negative kl": (dict(kl_coef=-0.1), {}, "kl_coef=-0.1"),
    "estimator": (dict(kl_estimator="k4"), {}, "k1, k2, k3"),
    "k1 as loss": (dict(kl_estimator="k1"), {}, "choose k2 or k3"),
    "kl limit": (dict(kl_limit=0.0), {}, "kl_limit=0.0"),
    "advantage": (dict(advantage="gpo"), {}, "grpo, dr_grpo"),
    "ratio": (dict(ratio="gspo"), {}, "none, token, sequence, cispo"),
    "source": (dict(source="golden"), {}, "gold, rollouts, self, corpus, gold+corpus"),
    "objective of a source": (dict(source="gold"), {}, "does not train on source='gold'"),
    "corpus": (dict(source="corpus", objective="sft"), {}, "needs method.corpus"),
    "corpus answers": (dict(corpus_answer="mine"), {}, "own, gold"),
    "refresh": (dict(refresh="daily"), {}, "never, epoch or a number"),
    "refresh never ends": (dict(refresh="0"), {}, "never, epoch or a number"),
    "corpus of another source": (dict(corpus="a.jsonl"), {}, "belong to source='corpus'"),
    "corpus answers of another source": (
        dict(corpus_answer="gold"),
        {},
        "belong to source='corpus'",
    ),
    "replay fraction": (dict(replay=dict(name="prompts", fraction=1.0)), {}, "0 < fraction < 1"),
    "replay kind": (dict(replay=dict(name="gold", fraction=0.5)), {}, "expected 'prompts'"),
    "filter of a word": (
        dict(filter="incompetent"),
        {},
        "method.filter='incompetent': expected None or a dict with name",
    ),
    "filter keys": (
        dict(filter=dict(name="window", sample=4)),
        {},
        "a dict with name, and maybe balanced, corpus, hi, like, lo, most, samples, top_p",
    ),
    "filter without samples": (
        dict(filter=dict(name="window")),
        {},
        "at least 1 responses per prompt",
    ),
    "filter with another's window": (
        dict(filter=dict(name="zero_variance", samples=4, lo=1, hi=4)),
        {},
        "means lo=1, hi=3",
    ),
    "filter like a run": (
        dict(filter=dict(name="random", like="runs/rif", samples=4)),
        {},
        "without samples, lo and hi",
    ),
    "filter by another name like a run": (
        dict(filter=dict(name="window", like="runs/rif")),
        {},
        "expected name='random'",
    ),
    "filter like a run, balanced": (
        dict(filter=dict(name="random", like="runs/rif", balanced=True)),
        {},
        "without samples, lo and hi, balanced",
    ),
    "filter of no prompts": (
        dict(filter=dict(name="incompetent", samples=4, most=0)),
        {},
        "most=0: expected True or False, and a number of prompts",
    ),
    "filter top_p": (dict(filter=dict(name="incompetent", samples=4, top_p=2)), {}, "top_p=2"),
    "filter of given responses": (
        dict(filter=dict(name="incompetent", samples=4, top_p=1.0, corpus="a.jsonl")),
        {},
        "its responses are already sampled",
    ),
    "template of no corpus": (dict(corpus_template="cot"), {}, "belongs to source='gold+corpus'"),
    "mixture without a corpus": (
        dict(source="gold+corpus", objective="sft", kl_coef=0.0),
        {},
        "source='gold+corpus' needs method.corpus",
    ),
    "epoch unit": (dict(epoch_unit="tokens"), {}, "prompts, responses"),
    "epochs over unknown responses": (
        dict(source="self", objective="sft", kl_coef=0.0, refresh="epoch", epoch_unit="responses"),
        {},
        "got source='self', refresh='epoch'",
    ),
    "temperature of sft": (
        dict(source="gold", objective="sft", kl_coef=0.0, tempered=False),
        {},
        "tempered=False belongs to objective='policy'",
    ),
    "filter window": (dict(filter=dict(name="window", samples=4, lo=3, hi=2)), {}, "lo=3, hi=2"),
    "online filter of a word": (
        dict(online_filter=True),
        {},
        "method.online_filter=True: expected None or a dict with hi, lo",
    ),
    "online filter": (
        dict(online_filter=dict(lo=0.9, hi=0.1, max_refills=1)),
        {},
        "0 <= lo < hi <= 1",
    ),
    "online filter keys": (dict(online_filter=dict(lo=0.1)), {}, "hi, lo, max_refills"),
    "updates": (dict(updates_per_batch=3), {}, "dividing train.batch=128"),
    "stale answers": (dict(updates_per_batch=2, passes=2), {}, "with 4 updates on one batch"),
    "weights of sft": (
        dict(source="gold", objective="sft", kl_coef=0.0, tis_cap=2.0),
        {},
        "tis_cap=2.0 belongs to objective='policy'",
    ),
    "reference": (
        dict(kl_reference="nowhere"),
        {},
        "'nowhere': expected base, stage or an existing folder",
    ),
    "kl in the reward with accuracies as advantages": (
        dict(advantage="reinforce01", kl_place="reward"),
        {},
        "set method.kl_place='loss'",
    ),
    "updates of gold": (
        dict(source="gold", objective="sft", kl_coef=0.0, updates_per_batch=2),
        {},
        "reuse rollouts",
    ),
    "micro": ({}, dict(train=dict(micro_batch=48)), "micro_batch=48 must divide the 128 rows"),
    "greedy rollouts": ({}, dict(rollout=dict(temperature=0.0)), "temperature above 0"),
    "entropy of sft": (
        dict(source="gold", objective="sft", kl_coef=0.0, entropy_coef=0.1),
        {},
        "objective='policy'",
    ),
    "kl in the reward of sft": (
        dict(source="gold", objective="sft", kl_place="reward"),
        {},
        "needs a reward",
    ),
    "kl of a distillation": (dict(objective="distill"), {}, "kl_coef=0.01"),
    "teacher": (
        dict(objective="distill", kl_coef=0.0, distill=dict(teacher="best")),
        {},
        "ema, frozen, current",
    ),
    "direction": (
        dict(objective="distill", kl_coef=0.0, distill=dict(direction="both")),
        {},
        "forward, reverse",
    ),
    "two teachers": (
        dict(objective="distill", kl_coef=0.0, loss=dict(name="lwf", coef=1.0)),
        {},
        "both need the teacher",
    ),
    "penalty without coefficient": (
        dict(penalty=dict(name="ewc")),
        {},
        "needs method.penalty.coef",
    ),
    "average": (dict(stage_end=dict(name="wise_ft", weight=1.0)), {}, "weight=1.0"),
    "packed rollouts": ({}, dict(data=dict(pack=True)), "only conversations"),
    "overlong": (dict(overlong=5000), {}, "overlong=5000"),
    "windows of gold answers": (
        dict(source="gold", objective="sft", kl_coef=0.0, refresh="epoch"),
        {},
        "refresh='epoch' belongs to source='self'; with source='gold' leave it 'never'",
    ),
    "windows of rollouts": (dict(refresh="2"), {}, "with source='rollouts' leave it 'never'"),
    "truncated responses of a distillation": (
        dict(objective="distill", kl_coef=0.0, truncated="zero"),
        {},
        "truncated='zero', overlong=0 change rewards, which objective='distill' does not use",
    ),
    "long responses of a distillation": (
        dict(objective="distill", kl_coef=0.0, overlong=2),
        {},
        "truncated='score', overlong=2 change rewards",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_without_a_meaning_are_refused_in_one_line(name):
    method, more, expected = WRONG[name]
    config = base.get_config()
    config.stages = (dict(task="synthetic_colour", steps=1, method=method, **more),)
    with pytest.raises(ValueError) as error:
        validate_config.validate_stage(resolve_stages(config)[0])
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "method",
    [
        dict(updates_per_batch=4, tis_cap=2.0),
        dict(passes=2, ratio="token"),
        dict(kl_reference="a model"),
    ],
)
def test_settings_with_a_meaning_pass(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a model").mkdir()
    (tmp_path / "a model" / "config.json").write_text("{}")
    config = base.get_config()
    config.stages = (dict(task="synthetic_colour", steps=1, method=method),)
    validate_config.validate_stage(resolve_stages(config)[0])


def test_configs_have_the_settings_of_base_and_no_others():
    known = base.get_config()
    for name in ("cpt7", "jigsaw", "retain"):
        config = importlib.import_module(f"configs.{name}").get_config("tiny")
        for section, value in config.items():
            if isinstance(value, ConfigDict) and section not in FREE_SECTIONS:
                assert set(value) == set(known[section]), (name, section)


@pytest.mark.parametrize(("size", "first"), [("2b", 200), ("4b", 300), ("8b", 300)])
def test_mrcl_has_as_many_updates_and_epochs_as_the_release(size, first):
    for arm in ("grpo", "gspo"):
        stages = resolve_stages(mrcl.get_config(f"{arm},{size}"))
        methods = {(s.config.method.updates_per_batch, s.config.train.batch) for s in stages}
        assert methods == {(4, 128)}
        assert [4 * s.steps for s in stages] == [first, 600, 600, 600, 600]
    stages = resolve_stages(mrcl.get_config(f"lora_sft,{size}"))
    assert [s.epochs for s in stages] == [2, 3, 1, 1, 1]
    assert stages[0].config.model.path == f"Qwen/Qwen3-VL-{size.upper()}-Instruct"
    grpo, gspo = (mrcl.get_config(f"{arm},2b").method for arm in ("grpo", "gspo"))
    assert (grpo.clip_low, grpo.clip_high, grpo.kl_coef) == (0.2, 0.27, 0.0)
    assert (gspo.clip_low, gspo.clip_high, gspo.kl_coef) == (3e-4, 4e-4, 0.0)


def test_ctbench_joint_trains_each_task_by_sft_and_then_by_grpo():
    stages = resolve_stages(ctbench.get_config("joint,3b,order1"))
    assert [s.tasks for s in stages[::2]] == [s.tasks for s in stages[1::2]]
    assert [s.tasks[0] for s in stages[::2]] == [
        f"ctbench_{part}" for part in "numglue art math fomc medical ocr science".split()
    ]
    kinds = [(s.config.method.objective, s.epochs, s.config.data.template) for s in stages[:2]]
    assert kinds == [("sft", 1, "none"), ("policy", 2, "answer")]
    assert [s.config.method.passes for s in stages[:2]] == [1, 2]
    assert resolve_stages(ctbench.get_config("grpo,3b"))[0].config.method.passes == 8


def test_a_slice_changes_how_cpt7_is_computed_and_not_what():
    """Meshes, micro-batches and what layers keep; SFT on few rows keeps its mesh."""
    for arg, mesh, micro, sampling in (
        ("grpo,7b,v5p-4x4x4", (4, -1, 1), 64, (4, 0)),
        ("grpo,7b,v6e-16x16", (4, -1, 2), 128, (4, 8)),
        ("sft,7b,v5p-4x4x4", (1, -1, 4), 0, (0, 0)),
        ("grpo,7b,h100-8", (1, -1, 1), 8, (2, 0)),
        ("sft,7b,h100-8", (1, -1, 1), 0, (0, 0)),
        ("grpo,3b,h100-8", (1, -1, 1), 8, (2, 0)),
        ("grpo,3b,v6e-16x16", (4, -1, 2), 128, (2, 8)),
    ):
        c, plain = cpt7.get_config(arg), cpt7.get_config(",".join(arg.split(",")[:2]))
        assert (c.mesh.data, c.mesh.fsdp, c.mesh.model, c.train.micro_batch) == (*mesh, micro)
        assert (c.model.remat, plain.model.remat) == ("dots", "block")
        changed = {name for name in c if c[name] != plain[name]}
        assert changed <= {"model", "mesh", "train", "rollout"}
        assert (c.rollout.model, c.rollout.mlp) == sampling
        assert {k for k in c.rollout if c.rollout[k] != plain.rollout[k]} <= {"model", "mlp"}
    small = cpt7.get_config("grpo,3b")
    assert (small.mesh.model, small.train.micro_batch) == (2, 128)
