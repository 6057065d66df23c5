"""Every method and every arm of the papers takes a step and logs what the docs name."""

import math

import pytest
import stage_fixtures

from configs import base, cpt7, jigsaw, retain
from cptjax.common.files import read_jsonl
from cptjax.config import config_differences, config_to_dict
from cptjax.training import rollouts

ARMS = {f"base:{name}": lambda name=name: plain(base.METHODS[name]) for name in base.METHODS}
# Penalties run under every objective in test_every_method.py.
CPT7 = [
    a
    for a in cpt7.ARMS
    if a not in ("online_ewc", "si", "mas", "cpo", "grpo_ewc", "grpo_cpo", "rapo")
]
ARMS |= {f"cpt7:{arm}": lambda arm=arm: cpt7.get_config(f"{arm},tiny") for arm in CPT7}
ARMS |= {f"jigsaw:{arm}": lambda arm=arm: jigsaw.get_config(f"{arm},tiny") for arm in jigsaw.METHOD}
ARMS |= {
    f"retain:{arm}": lambda arm=arm: retain.get_config(f"{arm},mmlu,tiny") for arm in retain.ARMS
}
# Of the published protocols, the arms that run other code; see test_other_arms_of_the_papers.
CPT7_PAPER = ("sft", "grpo", "rif", "nocot")
RETAIN_PAPER = ("grpo,paper", "iterative_sft,paper", "reinforce,scripts,bf16")
ARMS |= {
    f"cpt7:{arm},paper": lambda arm=arm: cpt7.get_config(f"{arm},tiny,paper") for arm in CPT7_PAPER
}
ARMS |= {
    f"retain:{arm}": lambda arm=arm: retain.get_config(f"{arm},mmlu,tiny") for arm in RETAIN_PAPER
}
OWN_FORM = {  # arms with a template of their own, and the reward of a response then
    "cpt7:grpo": ("cot", lambda parts: 0.9 * parts["accuracy"] + 0.1 * parts["format"]),
    "cpt7:nocot": ("direct", lambda parts: parts["accuracy"]),
    "jigsaw:grpo": ("answer", lambda parts: parts["hit"] + parts["accuracy"] + parts["format"]),
}
ROLLOUTS = (
    "reward",
    "reward/shaped",
    "reward/accuracy",
    "frac_reward_zero_std",
    "groups/all_right",
    "groups/all_wrong",
    "advantage/mean",
    "advantage/std",
    "advantage/min",
    "advantage/max",
    "response_length/mean",
    "response_length/max",
    "prompt_length/mean",
    "row_tokens",
    "truncated",
    "seconds/sample",
    "seconds/reward",
    "seconds/score",
    "seconds/device/rollout",
    "perf/throughput",
    "entropy",
    "ratio_min",
    "ratio_max",
    "mismatch",
    "mismatch_max",
)
ALWAYS = (
    "loss",
    "grad_norm",
    "lr",
    "skipped",
    "seconds",
    "seconds/data",
    "seconds/batch",
    "seconds/update",
    "seconds/device/update",
    "seconds/device/idle",
    "tokens",
    "rollouts",
    "flops",
    "perf/tokens_per_second",
    "perf/flops_per_second",
    "perf/padding",
)


def plain(method: dict, stages: int = 1):
    config = base.get_config()
    config.stages = tuple(dict(task=name, steps=1) for name in ("first", "second")[:stages])
    config.method.update(method)
    return config


def corpus(folder, task: str) -> str:
    """A rollouts file of another run: a correct response to each of eight rows, and wrong ones."""
    path = folder / "rollouts.jsonl"
    path.with_suffix(".source.json").write_text('{"model": "another run"}')
    row = '{"id": "%s/train/%d", "response": "%s", "rewards": {"accuracy": %d}}\n'
    path.write_text(
        "".join(
            row % (task, i, f"<answer>{i}</answer>", right) for i in range(8) for right in (1, 0)
        )
    )
    return str(path)


def with_own_template(config, name: str, monkeypatch):
    """The config with its own template and task, every second response put into the
    form that a random model never finds.
    """
    template, grade = OWN_FORM[name][0], rollouts.grade_responses
    task = config.stages[0]["task"]
    config.tasks[task].template = template
    if name.startswith("jigsaw"):
        config.tasks[task] = dict(task="jigsaw", images="synthetic", side=42)
        config.model.preset = "tiny"
    config.data.update(prompt_limit=512, buckets=(512,))

    def graded(prompted_tasks, items, texts):
        form = prompted_tasks[task].template
        assert form.name == template
        return grade(
            prompted_tasks,
            items,
            [form.forced_response(text) if i % 2 else text for i, text in enumerate(texts)],
        )

    monkeypatch.setattr(rollouts, "grade_responses", graded)
    return config


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_takes_a_step(name, tmp_path, monkeypatch):
    config = ARMS[name]()
    stages = 2 if config.method.replay.fraction or config.method.penalty.name == "ewc" else 1
    config = stage_fixtures.tiny(config, stages=stages)
    config = with_own_template(config, name, monkeypatch) if name in OWN_FORM else config
    if config.method.objective == "distill":
        config.data.update(
            prompt_limit=128, buckets=(128,)
        )  # the teacher reads the demonstration as well
    if "corpus" in config.method.source:
        config.method.corpus = corpus(tmp_path, config.stages[0]["task"])
        config.tasks[config.stages[0]["task"]].template = config.data.template
        config.data.update(prompt_limit=256, buckets=(256,))
    _, _, lines = stage_fixtures.train_all_stages(config, tmp_path / "run")
    steps = [line for line in lines if "event" not in line]
    assert [(line["stage"], line["step"]) for line in steps] == [(i + 1, 1) for i in range(stages)]
    for line in steps:
        missing = [
            key
            for key in ALWAYS + ROLLOUTS * (config.method.objective == "policy")
            if key not in line
        ]
        assert (
            not missing
            and math.isfinite(line["loss"])
            and line["skipped"] == 0
            and line["flops"] > 0
        )
        assert (config.method.kl_coef > 0) == ("kl" in line)
        of_devices = [v for k, v in line.items() if k.startswith("seconds/device/")]
        assert sum(of_devices) == pytest.approx(line["seconds"])
    if config.method.objective == "policy":
        has_other_temperature = config.rollout.temperature != 1 and config.method.tempered
        # At another temperature the sampler's distribution leaves out the 5 tokens that are never
        # sampled, about 5 / 384 of the mass.
        assert (
            steps[0]["mismatch"] < (0.02 if has_other_temperature else 1e-4)
            and steps[0]["rollouts"] > 0
        )
        rows = read_jsonl(tmp_path / "run" / "rollouts" / "stage1.jsonl")
        assert (
            len(rows) == 8
            and {"id", "response", "rewards", "advantage", "finished"} <= rows[0].keys()
        )
        assert {row["step"] for row in rows} == {steps[0]["step"]}
    if name in OWN_FORM:
        template, rule = OWN_FORM[name]
        parts = [row["rewards"] for row in rows]
        assert [p["reward"] for p in parts] == pytest.approx([rule(p) for p in parts]) and any(
            row["advantage"] for row in rows
        )
        assert [p.get("format") for p in parts] == (
            [None] * 8 if template == "direct" else [0, 1] * 4
        )
    if config.method.ratio != "none":
        assert {"clip_low", "clip_high"} <= steps[0].keys()


# Settings that only the host reads, or that are numbers in the same programs.
HOST_SETTINGS = {
    *("name", "train.lr", "train.batch", "train.weight_decay", "method.epoch_unit", "stages"),
    *("eval.temperature", "eval.templates", "data.template", "data.prompt_limit"),
    *(
        "method.corpus_template",
        "method.filter",
        "method.kl_reference",
        "method.refresh",
        "model.max_pixels",
    ),
    *("tasks.wildjailbreak", "tasks.wildguardtest", "eval.general", "eval.groups"),
}
TESTED_ABOVE = {"method.tempered", "method.tis_cap", "train.moments_dtype"}  # one arm of each


def test_other_arms_of_the_papers_run_the_same_programs():
    """The published protocol of every arm differs from ours only in what is tested above."""
    pairs = [(cpt7, f"{arm},tiny", f"{arm},tiny,paper") for arm in cpt7.ARMS]
    for arm in retain.ARMS:
        for task in retain.TASKS if arm not in ("sft", "sft_kl") else retain.GOLD:
            own = f"{arm},{task},tiny"
            pairs += [(retain, own, f"{own},{word}") for word in retain.PROTOCOLS]
    for module, own, published in pairs:
        configs = (config_to_dict(module.get_config(arg)) for arg in (own, published))
        lines = config_differences(*configs)
        names = [line.split(":")[0].split("[")[0] for line in lines]
        changed = {".".join(name.split(".")[:2]) for name in names}
        assert changed - {"name"} and changed <= HOST_SETTINGS | TESTED_ABOVE, (published, changed)
