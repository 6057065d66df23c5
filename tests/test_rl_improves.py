"""Every RL arm raises the accuracy on new images; a negated reward lowers it."""

import time

import jax
import pytest
import run_helpers
import stage_fixtures

from configs import base, cpt7
from cptjax.continual import open_run, stage_evaluation, train_stage
from cptjax.continual.model_state import ModelState
from cptjax.data import packing
from cptjax.tasks.synthetic.dataset import styled_exact

ARMS = (
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "rloo",
    "remax",
    "reinforce",
    "reinforce01",
    "reinforce_pp",
    "cpt7",
)
POINTS, SECONDS = 0.15, 60
OWN = {
    "dapo": dict(overlong=0, online_filter=dict(lo=0.0, hi=1.0, max_refills=40)),
    "cpt7": {**cpt7.RL, "tis_cap": 2.0},  # paper A's: token clip, four updates, KL to the base
}
STEPS = {"dapo": 8}  # each of mixed groups alone


def wrong(prediction, answer, meta=None) -> float:
    return 1 - styled_exact(prediction, answer, meta)


def config():
    """A base trained on mostly wrong labels for half of the classes, then an arm per stage."""
    c = base.get_config()
    rl = dict(train=dict(lr=5e-4, batch=16), data=dict(limit=1000))
    method = lambda name: {
        **base.METHODS.get(name, base.METHODS["grpo"]),
        "kl_coef": 0.0,
        **OWN.get(name, {}),
    }
    rollout = lambda name: dict(
        group=8, max_new_tokens=4, check_every=4, top_p=0.99 if name == "cpt7" else 1.0
    )
    arm = lambda task, name, steps=12: dict(
        task=task, steps=STEPS.get(name, steps), method=method(name), rollout=rollout(name), **rl
    )
    c.stages = (
        dict(
            task="biased",
            steps=250,
            method=base.METHODS["sft"],
            train=dict(lr=2e-3, batch=32, schedule="linear", warmup=0.1),
        ),
        *(arm("true", name) for name in ARMS),
        arm("negated", "grpo", steps=20),
    )
    counting = dict(task="synthetic", family="count")
    c.tasks.update(
        dict(biased=dict(counting, bias=0.55), true=counting, negated=dict(counting, scorer=wrong))
    )
    c.model.update(compute_dtype="float32", min_pixels=1024, max_pixels=1024, remat="none")
    c.data.update(template="none", prompt_limit=32, buckets=(32,), limit=2500)
    c.train.update(b2=0.99, weight_decay=0.0, clip=1.0)
    c.eval.update(general=(), batch=128, max_new_tokens=4)
    c.log.rollouts = False
    return c


@pytest.mark.slow
def test_every_rl_arm_improves_and_a_negated_reward_makes_worse(tmp_path, monkeypatch):
    # Rows of one size, so that each arm compiles one program for its updates.
    monkeypatch.setattr(packing, "row_size", lambda tokens, capacity: capacity)
    monkeypatch.setattr(packing, "target_size", lambda targets, capacity: capacity)
    with stage_fixtures.open_tiny_run(config(), tmp_path, run_helpers.SMALL) as (run, base):

        def score(params) -> float:
            result = stage_evaluation.evaluate_with_template(
                run, 0, params, "true", "", "", mini=128
            )
            return sum(r.score for r in result.records) / 128

        first = train_stage.train_stage(run, run.stages[0], base)
        start, before = jax.device_get(first.params), score(first.params)
        places = jax.tree.map(lambda x: x.sharding, first.params)
        # The base model of the RL arms is what the first stage made.
        monkeypatch.setattr(open_run.Run, "base_params", run.copy_for_comparison(first.params))
        reached, took = {}, {}
        for stage, name in zip(run.stages[1:], (*ARMS, "negated"), strict=True):
            began = time.process_time()
            last = train_stage.train_stage(run, stage, ModelState(jax.device_put(start, places)))
            reached[name] = round(score(last.params), 3)
            took[name] = round(time.process_time() - began)
        print(f"base {before:.3f}, then {reached} in {took} s")
    assert 0.3 < before < 0.75
    assert reached.pop("negated") < before - POINTS
    assert min(reached.values()) >= before + POINTS, (before, reached)
    assert max(took.values()) < SECONDS, (
        took
    )  # of a processor, compilation included: a busy machine's clock says nothing
