"""Every arm of the papers' configs: known tasks, locked keys, settings that pass every check; and one line for an unknown word."""

import importlib

import pytest
from ml_collections import ConfigDict

from configs import base, cpt7, demo, jigsaw, retain
from cptjax import prompting, settings, stage, tasks
from cptjax.types import Example

CORPUS = {"method": {"corpus": "rollouts/stage1.jsonl"}}
CPT7 = [f"{arm},{size}{more}" for arm in cpt7.ARMS for size, more in (("3b", ""), ("7b", ",official"), ("tiny", ""))]
JIGSAW = [f"{arm},{size}" for arm in jigsaw.METHOD for size in jigsaw.SIZES]
RETAIN = [f"{arm},{task},{size}" for arm in retain.ARMS for task in retain.TASKS for size in ("3b", "tiny")]
ALL = [(cpt7, a) for a in CPT7] + [(jigsaw, a) for a in JIGSAW] + [(retain, a) for a in RETAIN] + [(demo, "0"), (demo, "1,short")]


@pytest.mark.parametrize(("module", "arg"), ALL, ids=[f"{m.__name__[8:]}:{a}" for m, a in ALL])
def test_every_arm_resolves(module, arg):
    config = module.get_config(arg)
    assert config.is_locked or module is demo
    config.lock()
    with pytest.raises((AttributeError, KeyError)):
        config.method.advantag = "grpo"  # locked: a misspelt knob is no new knob
    if config.method.source == "corpus":
        with pytest.raises(ValueError, match="needs method.corpus"):
            stage.check(settings.stages(config)[0])
        config = settings.merge(config, CORPUS)
    for _, one in settings.variants(config):
        for each in settings.stages(one):
            stage.check(each)
            for name in (*each.tasks, *each.config.eval.general):
                tasks.resolve(name, one.tasks.to_dict())


@pytest.mark.parametrize("module", [cpt7, jigsaw, retain], ids=lambda m: m.__name__)
def test_unknown_word_is_one_line_that_names_the_known_ones(module):
    with pytest.raises(ValueError) as error:
        module.get_config("gpro")
    assert "'gpro'" in str(error.value) and "grpo" in str(error.value) and "\n" not in str(error.value)


def test_arms_of_the_papers_are_all_there():
    assert set(cpt7.ARMS) >= {"sft", "joint", "grpo", "rloo", "remax", "nokl", "nocot", "rif", "rif_zero", "rif_control"}  # 1.5-1.8, 1.10
    assert set(cpt7.ARMS) >= {"lora_sft", "low_lr_sft", "replay", "ewc", "l2", "lwf", "wise", "prompt_replay", "eaft"}  # reviewers'
    assert set(jigsaw.METHOD) == {"grpo", "bare", "trace", "rft_rollout", "self_generated", "iterative"}  # 2.2
    assert set(retain.ARMS) >= {"sft", "teacher_sft", "self_sft", "iterative_sft", "rl_traces", "grpo", "grpo_nokl", "reinforce"}  # 3.1


def test_paper_a_trains_on_its_own_variants_unless_official():
    own, official = cpt7.get_config("sft,7b"), cpt7.get_config("official,sft,7b")
    assert tuple(s["task"] for s in own.stages) == tasks.PAPER_A
    assert tuple(s["task"] for s in official.stages) == cpt7.ORDER
    assert [s["epochs"] for s in own.stages] == [1, 1, 1, 1, 10, 1, 3] == [s["epochs"] for s in official.stages]
    assert {tasks.TASKS[t].scorer for t in tasks.PAPER_A} == {"mathruler_parity"}
    assert own.eval.general == ("cpt7_mmmu", "cpt7_mmlu_pro", "cpt7_pope") and official.eval.general == ("mmmu", "mmlu_pro", "pope")
    joint = settings.stages(cpt7.get_config("joint,7b"))
    assert len(joint) == 1 and joint[0].tasks == tasks.PAPER_A
    assert tuple(retain.TASKS.values()) == tasks.PAPER_C


def test_paper_a_numbers_by_arm():
    grpo, sft = cpt7.get_config("grpo,7b"), cpt7.get_config("sft,7b")
    assert (grpo.train.batch, grpo.rollout.group, grpo.train.lr, grpo.method.kl_coef) == (512, 8, 1e-6, 0.01)
    assert (sft.train.batch, sft.train.lr, sft.train.schedule, sft.train.warmup) == (24, 1e-5, "cosine", 0.1)
    assert cpt7.get_config("remax").method.advantage == "remax" and cpt7.get_config("rloo").method.advantage == "rloo"
    assert cpt7.get_config("nokl").method.kl_coef == 0 and cpt7.get_config("lora_sft").model.lora.rank > 0
    keys = {"rif": "incompetent", "rif_zero": "zero_variance", "rif_control": "random"}
    assert {arm: cpt7.get_config(arm).method.filter["name"] for arm in keys} == keys
    window = lambda arm: {k: v for k, v in cpt7.get_config(arm).method.filter.items() if k != "name"}
    assert window("rif") == window("rif_control")  # matched budget
    fair = [("model", "min_pixels"), ("model", "max_pixels"), ("model", "freeze"), ("train", "moments_dtype")]
    assert all(grpo[a][b] == sft[a][b] for a, b in fair)


def test_prompts_and_rewards_with_and_without_reasoning():
    example = Example("0", [{"role": "user", "content": "How many ?"}], "3", "3", "cpt7_gqa")

    def course(arm):
        c = cpt7.get_config(arm)
        return prompting.course(tasks.resolve("cpt7_gqa"), c.data.template, c.rewards, None)

    cot, direct = course("grpo"), course("nocot")
    said = lambda form: "".join(p["text"] for p in form.messages(example)[-1]["content"])
    assert "<think>" in said(cot) and "boxed" in said(cot) and "<think>" not in said(direct)
    assert cot.reward.template.format == "think_boxed" and direct.reward.template.format == ""  # 0.9 / 0.1 | the accuracy alone
    assert course("sft").gold(example) == "3" and cot.gold(example).endswith("\\boxed{3}")


@pytest.mark.parametrize("name", base.METHODS)
def test_methods_resolve(name):
    config = base.get_config()
    config.stages = (dict(task="drawn_colour", steps=1, method={**base.METHODS[name], "corpus": "a.jsonl"}),)
    (one,) = settings.stages(config)
    stage.check(one)
    assert stage.objective(one.config) == stage.objective(one.config)  # equal settings share programs


WRONG = {
    "group of one": (dict(), dict(rollout=dict(group=1)), "rollout.group >= 2"),
    "clip_low": (dict(clip_low=1.0), {}, "0 <= clip_low < 1"),
    "negative kl": (dict(kl_coef=-0.1), {}, "kl_coef=-0.1"),
    "estimator": (dict(kl_estimator="k4"), {}, "k1, k2, k3"),
    "k1 as loss": (dict(kl_estimator="k1"), {}, "choose k2 or k3"),
    "kl limit": (dict(kl_limit=0.0), {}, "kl_limit=0.0"),
    "advantage": (dict(advantage="gpo"), {}, "grpo, dr_grpo"),
    "ratio": (dict(ratio="gspo"), {}, "none, token, sequence, cispo"),
    "source": (dict(source="golden"), {}, "gold, rollouts, self, corpus"),
    "objective of a source": (dict(source="gold"), {}, "does not learn from source='gold'"),
    "corpus": (dict(source="corpus", objective="sft"), {}, "needs method.corpus"),
    "corpus answers": (dict(corpus_answer="mine"), {}, "own, gold"),
    "refresh": (dict(refresh="daily"), {}, "never, epoch or a number"),
    "refresh never ends": (dict(refresh="0"), {}, "never, epoch or a number"),
    "replay kind": (dict(replay=dict(fraction=0.5, kind="gold")), {}, "expected 'prompts'"),
    "filter keys": (dict(filter=dict(name="window")), {}, "expected name and samples"),
    "filter window": (dict(filter=dict(name="window", samples=4, lo=3, hi=2)), {}, "lo=3, hi=2"),
    "online filter": (dict(online_filter=dict(lo=0.9, hi=0.1, max_refills=1)), {}, "0 <= lo < hi <= 1"),
    "online filter keys": (dict(online_filter=dict(lo=0.1)), {}, "lo, hi and max_refills"),
    "updates": (dict(updates_per_batch=3), {}, "dividing train.batch=128"),
    "updates of gold": (dict(source="gold", objective="sft", kl_coef=0.0, updates_per_batch=2), {}, "reuse rollouts"),
    "micro": ({}, dict(train=dict(micro_batch=48)), "micro_batch=48 must divide the 128 rows"),
    "greedy rollouts": ({}, dict(rollout=dict(temperature=0.0)), "temperature above 0"),
    "entropy of sft": (dict(source="gold", objective="sft", kl_coef=0.0, entropy_coef=0.1), {}, "objective='policy'"),
    "kl in the reward of sft": (dict(source="gold", objective="sft", kl_place="reward"), {}, "needs a reward"),
    "kl of a distillation": (dict(objective="distill"), {}, "kl_coef=0.01"),
    "teacher": (dict(objective="distill", kl_coef=0.0, distill=dict(teacher="best")), {}, "ema, frozen, current"),
    "direction": (dict(objective="distill", kl_coef=0.0, distill=dict(direction="both")), {}, "forward, reverse"),
    "two teachers": (dict(objective="distill", kl_coef=0.0, penalty=dict(name="lwf", coef=1.0)), {}, "both need the teacher's place"),
    "penalty without coefficient": (dict(penalty=dict(name="ewc")), {}, "coef=0 does nothing"),
    "average": (dict(average=1.0), {}, "average=1.0"),
    "packed rollouts": ({}, dict(data=dict(pack=True)), "only conversations"),
    "overlong": (dict(overlong=5000), {}, "overlong=5000"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_meaning_is_refused_in_one_line(name):
    method, more, expected = WRONG[name]
    config = base.get_config()
    config.stages = (dict(task="drawn_colour", steps=1, method=method, **more),)
    with pytest.raises(ValueError) as error:
        stage.check(settings.stages(config)[0])
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_configs_name_no_knob_that_base_lacks():
    known = base.get_config()
    for name in ("cpt7", "jigsaw", "retain"):
        config = importlib.import_module(f"configs.{name}").get_config("tiny")
        for section, value in config.items():
            if isinstance(value, ConfigDict):
                assert set(value) == set(known[section]), (name, section)
