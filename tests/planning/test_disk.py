"""The disk use of a run: arrays of each kind of checkpoint by arithmetic, responses by length."""

import pytest
import run_helpers

from configs import base
from configs.base import METHODS
from cptjax.config import resolve_stages
from cptjax.models import causal_lm, trainable
from cptjax.planning import disk

N = trainable.count_params(causal_lm.declare_params(run_helpers.SMALL))


def sizes(name="sft", /, keep=2, **sections):
    c = run_helpers.config(name, **sections)
    c.checkpoint.keep = keep
    return disk.disk_bytes(c, resolve_stages(c), [10, 20], test_rows=8)


def test_ends_hold_the_weights_and_steps_hold_the_optimizer_too():
    found = sizes()
    assert found[disk.STAGE_ENDS] == 2 * 4 * N
    # Two are kept while a third one is written; each has the weights and two moments.
    assert found[disk.STAGE_STEPS] == pytest.approx(3 * 12 * N, rel=1e-4)
    assert sizes(checkpoint={"every": 0, "minutes": 0})[disk.STAGE_STEPS] < 12.001 * N
    assert sizes(model={"param_dtype": "bfloat16"})[disk.STAGE_ENDS] == 2 * 2 * N
    assert sizes(model={"freeze": ("language",)})[disk.STAGE_ENDS] < 2 * 4 * N


def test_what_methods_and_later_stages_need_counts():
    kept = sizes(train={"reset_optimizer": False})
    assert kept[disk.STAGE_ENDS] == pytest.approx((4 + 12) * N, rel=1e-4)  # not after the last one
    follower = sizes("sdft", method={"distill": {"teacher": "ema"}})
    assert follower[disk.STAGE_STEPS] == pytest.approx(3 * (12 + 4) * N, rel=1e-4)
    lora = sizes(model={"lora": {"rank": 4}})
    assert lora[disk.STAGE_ENDS] < N


def test_responses_count_with_their_longest_text():
    # 30 steps of 4 prompts with 2 responses of 4 tokens
    # Of 4 prompts in the first and last step of two stages: 2 rows with an image, one with all 8.
    shown = 2 * 2 * 4 * (2 + 8) * disk.THUMBNAIL_BYTES
    assert sizes("grpo")["rollouts"] - shown == 30 * 4 * 2 * (
        4 * 4 + disk.ROW_BYTES + disk.PROMPT_BYTES
    )
    assert sizes("grpo", log={"rollouts": False})["rollouts"] == sizes("sft")["rollouts"] == 0
    assert sizes("iterative")["rollouts"] == 30 * 4 * 4 * (4 * 4 + disk.ROW_BYTES)
    assert sizes()["predictions"] == 3 * 8 * (4 * 4 + disk.ROW_BYTES)


def test_several_runs_share_the_disk_one_after_the_other():
    a, b = ({disk.STAGE_ENDS: 1.0, disk.STAGE_STEPS: x, "rollouts": 2.0} for x in (5.0, 7.0))
    settings = base.get_config().checkpoint
    assert disk.add_runs([a, b], settings) == {
        disk.STAGE_ENDS: 2.0,
        disk.STAGE_STEPS: 7.0,
        "rollouts": 4.0,
    }
    settings.update(keep=3, keep_stages=False)
    assert disk.add_runs([a, b], settings) == {
        disk.STAGE_ENDS: 1.0,
        disk.STAGE_STEPS: 12.0,
        "rollouts": 4.0,
    }


def test_seven_billion_parameters_of_grpo():
    """A full state in float32 takes about 100 GB, and three of them 300 GB."""
    c = run_helpers.config("grpo", model={"preset": "7b"})
    c.method.update(METHODS["grpo"])
    found = disk.checkpoint_bytes(c, resolve_stages(c))
    assert found[disk.STAGE_ENDS] == pytest.approx(2 * 4 * 8.292e9, rel=0.001)
    assert found[disk.STAGE_STEPS] == pytest.approx(3 * 12 * 8.292e9, rel=0.001)
