"""Trackers receive the metrics of the run log; the error of a missing package names it."""

import re
import sys
from types import SimpleNamespace

import pytest
from eval_rows import EVAL_ROW

from cptjax.common import trackers
from cptjax.common.run_log import RunLog

OFF = {"tensorboard": False, "wandb": "", "trackio": "", "mlflow": ""}


def tracked(tmp_path, **log):
    return RunLog(
        tmp_path,
        trackers.open_trackers(tmp_path, {"name": "run", "log": OFF | log}),
    )


@pytest.mark.parametrize(
    "options, package",
    [
        ({"tensorboard": True}, "tensorboardX"),
        ({"wandb": "p"}, "wandb"),
        ({"trackio": "p"}, "trackio"),
        ({"mlflow": "p"}, "mlflow"),
    ],
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


def test_trackio_continues_the_run_of_a_workdir(tmp_path, monkeypatch):
    opened, sent = [], []
    run = SimpleNamespace(log=sent.append, finish=lambda: sent.append("finished"))
    module = SimpleNamespace(init=lambda **about: opened.append(about) or run)
    monkeypatch.setitem(sys.modules, "trackio", module)
    for folder in ("a", "b", "a"):
        log = tracked(tmp_path / folder, trackio="project")
        log.step(2, 7, {"loss": 0.5})
        log.close()
    # "step" is a column of its own there.
    assert sent == 3 * [{"stage": 2, "train_step": 7, "stage2/loss": 0.5}, "finished"]
    names = [about["name"] for about in opened]
    assert names[0] == names[2] != names[1] and all(name.startswith("run-") for name in names)
    assert all(a["resume"] == "allow" and a["project"] == "project" for a in opened)


class MlflowClient:
    """The part of mlflow.MlflowClient that the tracker uses; it refuses names as the server does."""

    experiments, runs = {}, {}

    def get_experiment_by_name(self, name):
        known = self.experiments.get(name)
        return known and SimpleNamespace(experiment_id=known)

    def create_experiment(self, name):
        return self.experiments.setdefault(name, f"id of {name}")

    def create_run(self, experiment_id, run_name):
        run_id = f"run {len(self.runs)}"
        self.runs[run_id] = {"place": experiment_id, "name": run_name, "metrics": [], "state": []}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id, status):
        self.runs[run_id]["state"].append(status)

    def log_dict(self, run_id, values, name):
        self.runs[run_id][name] = values

    def log_batch(self, run_id, metrics):
        assert all(re.fullmatch(r"[\w\-. /]+", metric[0]) for metric in metrics)
        self.runs[run_id]["metrics"] += [(m[0], m[1], m[3]) for m in metrics]

    def set_terminated(self, run_id):
        self.runs[run_id]["state"].append("FINISHED")


def test_mlflow_continues_the_run_of_a_workdir(tmp_path, monkeypatch):
    entities = SimpleNamespace(Metric=lambda *parts: parts)
    module = SimpleNamespace(MlflowClient=MlflowClient, entities=entities)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for folder in ("a", "b", "a"):
        log = tracked(tmp_path / folder, mlflow="experiment")
        log.evals([EVAL_ROW | {"stage": 2, "step": 9, "task": "a+b"}])
        log.close()
    first, second = MlflowClient.runs.values()
    assert first["metrics"] == 2 * [("eval/a_b/accuracy/cot", 0.5, 2)]
    assert second["metrics"] == first["metrics"][:1] and first["name"] == "run"
    assert first["state"] == ["FINISHED", "RUNNING", "FINISHED"]
    assert first["place"] == second["place"] and first["config.json"]["name"] == "run"
