"""A run that is killed at any instant and started again ends in the same bits."""

import json
import os
import random
import signal

import pytest
import run_helpers
from device_fixtures import devices  # noqa: F401

from cptjax.common import signals
from cptjax.continual import driver, stage_end
from cptjax.data import device_batches

GRPO = {
    "steps": 4,
    "eval": {"every": 2, "mini": 4, "forced_prefix": True, "drift": 4, "general": ("facts",)},
    "log": {"every": 3},
}
SFT = {
    "steps": 5,
    "train": {"reset_optimizer": False},
    "method": {"penalty": {"name": "ewc", "coef": 1.0, "samples": 4}},
}
SELF = {  # a model that is not trained gives no correct response to train on
    "stages": [
        {"task": "colour", "steps": 30, "method": run_helpers.METHOD["sft"]},
        {"task": "colour", "steps": 4},
    ],
    "data": {"limit": 16},
    "train": {"batch": 8},
}
KILL, END = int(signal.SIGKILL), int(signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs by method, each made once."""
    made = {}

    def get(method: str, sections: dict):
        if method not in made:
            folder = tmp_path_factory.mktemp(method) / "whole"
            (metrics,) = run_helpers.run_processes(
                {
                    "method": method,
                    "workdir": str(folder),
                    "sections": sections,
                    "signals": [(KILL, None)],
                }
            )
            assert metrics["code"] == 0, metrics["said"]
            # The first run compiled its programs; the second measures the time without that.
            again = folder.with_name("again")
            (metrics,) = run_helpers.run_processes(
                {
                    "method": method,
                    "workdir": str(again),
                    "sections": sections,
                    "signals": [(KILL, None)],
                }
            )
            run_helpers.assert_same(run_helpers.run_state(folder), run_helpers.run_state(again))
            made[method] = folder, metrics["seconds"]
        return made[method]

    return get


def interrupted(
    folder, method: str, sections: dict, seconds: list[float], number: int = KILL
) -> list[dict]:
    plan = {
        "method": method,
        "workdir": str(folder),
        "sections": sections,
        "signals": [*((number, s) for s in seconds), (KILL, None)],
    }
    metrics = run_helpers.run_processes(plan)
    assert metrics[-1]["code"] == 0, metrics[-1]["said"]
    assert all(t["code"] in (0, -KILL if number == KILL else 0) for t in metrics), [
        (t["code"], t["after"], t["said"][-700:]) for t in metrics
    ]
    return metrics


def instants(count: int, length: float, seed: int) -> list[float]:
    """Some instants are early, so that work remains; the others are anywhere."""
    rng = random.Random(seed)
    return [rng.uniform(0.3, length) for _ in range(count)]


@pytest.mark.parametrize("method, sections", [("grpo", GRPO), ("sft", SFT)])
def test_a_run_killed_at_some_instants_ends_in_the_same_bits(whole, tmp_path, method, sections):
    reference, length = whole(method, sections)
    interrupted(tmp_path / "run", method, sections, instants(4, length, 1))
    run_helpers.assert_same(
        run_helpers.run_state(reference), run_helpers.run_state(tmp_path / "run")
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("CPTJAX_LONG"), reason="75 killed processes: set CPTJAX_LONG=1"
)
@pytest.mark.parametrize("method, sections", [("grpo", GRPO), ("sft", SFT), ("iterative", SELF)])
def test_a_run_killed_at_25_instants_ends_in_the_same_bits(whole, tmp_path, method, sections):
    reference, length = whole(method, sections)
    wanted = run_helpers.run_state(reference)
    for round in range(5):  # fresh runs, or the last kills would find nothing left to do
        metrics = interrupted(
            tmp_path / f"run{round}", method, sections, instants(5, length, round)
        )
        assert any(t["code"] == -KILL for t in metrics)
        run_helpers.assert_same(wanted, run_helpers.run_state(tmp_path / f"run{round}"))


def test_sigterm_saves_and_says_how_to_continue(whole, tmp_path):
    reference, length = whole("grpo", GRPO)
    metrics = interrupted(
        tmp_path / "run", "grpo", GRPO, [length * f for f in (0.3, 0.5, 0.5, 0.4)], END
    )
    stopped = [t for t in metrics if "stopped by SIGTERM" in t["said"]]
    assert stopped and all("run the same command again to go on" in t["said"] for t in stopped)
    assert all(t["after"] < 20 for t in stopped)
    run_helpers.assert_same(
        run_helpers.run_state(reference), run_helpers.run_state(tmp_path / "run")
    )


def test_a_finished_run_does_not_change_when_started_again(whole):
    reference, _ = whole("grpo", GRPO)
    before = run_helpers.run_state(reference)
    (metrics,) = run_helpers.run_processes(
        {"method": "grpo", "workdir": str(reference), "sections": GRPO, "signals": [(KILL, None)]}
    )
    assert metrics["code"] == 0 and "the end of stage 2" in metrics["said"]
    run_helpers.assert_same(before, run_helpers.run_state(reference))


def test_every_response_is_counted_in_one_line_of_metrics(whole):
    """Lines hold what was spent since the last, whatever log.every: every answer of every step is
    in one of them.
    """
    reference, _ = whole("grpo", GRPO)
    lines = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    assert [(line["stage"], line["step"], line["rollouts"]) for line in steps] == [
        (1, 3, 24),
        (1, 4, 8),
        (2, 3, 24),
        (2, 4, 8),
    ]
    evaluations = [line for line in lines if line.get("event") == "evaluate"]
    assert (
        len(evaluations) == 3 * 3 + 2
        and sum(line["rollouts"] for line in evaluations) == 9 * 16 + 2 * 8
    )


def test_sigterm_stops_an_estimate_of_the_fisher_between_two_rows(tmp_path, monkeypatch, devices):
    """The stage's last step is saved, and the next start only repeats the estimate."""
    short = {"stages": ({"task": "facts", "steps": 2},), "eval": {"before": False, "limit": 2}}
    c, estimated, agreed, answers = (
        run_helpers.config("sft", **SFT, **short),
        [],
        signals.StopSignals.agreed,
        device_batches.conversation_batch,
    )
    monkeypatch.setattr(
        stage_end,
        "conversation_batch",
        lambda *row, **more: estimated.append(row) or answers(*row, **more),
    )
    with monkeypatch.context() as patched, pytest.raises(signals.Preempted):
        patched.setattr(
            signals.StopSignals, "agreed", lambda self: len(estimated) == 2 or agreed(self)
        )
        driver.run(c, tmp_path / "run")
    assert len(estimated) == 2 and not list(
        (tmp_path / "run" / "checkpoints" / "stages").glob("1*")
    )
    said = (tmp_path / "run" / "metrics.jsonl").read_text()
    driver.run(c, tmp_path / "run")
    assert len(estimated) == 2 + 4 and (tmp_path / "run" / "metrics.jsonl").read_text().startswith(
        said
    )
    driver.run(c, tmp_path / "whole")
    run_helpers.assert_same(
        run_helpers.run_state(tmp_path / "whole"), run_helpers.run_state(tmp_path / "run")
    )
