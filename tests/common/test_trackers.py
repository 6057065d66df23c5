"""Trackers receive the metrics of the run log; the error of a missing package names it."""

import sys
from types import SimpleNamespace

import pytest
from eval_rows import EVAL_ROW

from cptjax.common import trackers
from cptjax.common.run_log import RunLog


def tracked(tmp_path, **log):
    return RunLog(
        tmp_path,
        trackers.open_trackers(
            tmp_path, {"name": "run", "log": {"tensorboard": False, "wandb": ""} | log}
        ),
    )


@pytest.mark.parametrize(
    "options, package", [({"tensorboard": True}, "tensorboardX"), ({"wandb": "p"}, "wandb")]
)
def test_a_tracker_whose_package_is_missing_says_so(tmp_path, monkeypatch, options, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs {package}: pip install"):
        tracked(tmp_path, **options)


def test_trackers_get_training_and_evaluations_and_are_closed(tmp_path, monkeypatch):
    points, opened, sent = [], [], []
    writer = SimpleNamespace(
        add_scalar=lambda *point: points.append(point), close=lambda: points.append("closed")
    )
    run = SimpleNamespace(log=sent.append, finish=lambda: sent.append("finished"))
    monkeypatch.setitem(
        sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=lambda folder: writer)
    )
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **about: opened.append(about) or run)
    )
    for folder in ("a", "b", "a"):  # two runs in one process, and the first again
        log = tracked(tmp_path / folder, tensorboard=True, wandb="project")
        log.step(2, 7, {"loss": 0.5, "event": "said"})
        log.evals(
            [
                EVAL_ROW | {"stage": 2, "step": 9, "task": "a"},
                EVAL_ROW | {"stage": 2, "step": 5, "task": "a", "metric": "accuracy_mini"},
            ]
        )
        log.close()
    metrics = {
        "stage2/loss": (0.5, 7),
        "eval/a/accuracy/cot": (0.5, 2),
        "stage2/eval/a/accuracy_mini/cot": (0.5, 5),
    }
    assert points == 3 * [*((name, *point) for name, point in metrics.items()), "closed"]
    assert (
        sent[1] == {"stage": 2, "step": 9, "eval/a/accuracy/cot": 0.5}
        and sent[3] == "finished"
        and len(sent) == 12
    )
    ids = [about["id"] for about in opened]
    assert ids[0] == ids[2] != ids[1] and all(
        about["resume"] == "allow" and about["project"] == "project" for about in opened
    )
