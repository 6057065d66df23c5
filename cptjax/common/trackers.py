"""Send the metrics of a run to TensorBoard, Weights & Biases, Trackio or MLflow (`config.log`)."""

import importlib
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cptjax.common import files

MLFLOW_FORBIDDEN = re.compile(r"[^\w\-. /]")  # in the name of a metric


class Tracker(Protocol):
    """The interface of a tracker."""

    def log(self, values: Mapping[str, float], x: int, stage: int, step: int) -> None:
        """Record numbers by name; `x` is their position on the x axis."""

    def close(self) -> None:
        """Send the remaining numbers."""


def open_trackers(workdir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Open the trackers that a run's config names."""
    log, name = config["log"], config["name"] or workdir.name
    trackers: list[Tracker] = []
    if log["tensorboard"]:
        trackers.append(TensorBoardTracker(workdir))
    if log["wandb"]:
        trackers.append(WandbTracker(workdir, log["wandb"], name, config))
    if log["trackio"]:
        trackers.append(TrackioTracker(workdir, log["trackio"], name, config))
    if log["mlflow"]:
        trackers.append(MlflowTracker(workdir, log["mlflow"], name, config))
    return trackers


def _import_tracker(package: str, setting: str, value: object) -> Any:
    """Import the package of a tracker; a missing one is a mistake in the setting."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"log.{setting}={value!r} needs {package}: pip install 'cptjax[tracking]', or set it "
            f"to {type(value)()!r}"
        ) from None


def _stored_id(path: Path) -> str:
    """Return the id of a workdir's run at a tracker, made at the first start."""
    if not path.exists():
        files.write_text(path, secrets.token_hex(8))
    return path.read_text()


class TensorBoardTracker:
    """Write to `workdir`/tensorboard; a resumed run repeats the points since its checkpoint."""

    def __init__(self, workdir: Path):
        package = _import_tracker("tensorboardX", "tensorboard", True)
        self.writer = package.SummaryWriter(str(workdir / "tensorboard"))

    def log(self, values: Mapping[str, float], x: int, stage: int, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, x)

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """Write to one wandb run per workdir; its id is stored there, so a resumed run continues it."""

    def __init__(self, workdir: Path, project: str, name: str, config: Mapping[str, Any]):
        wandb = _import_tracker("wandb", "wandb", project)
        self.run = wandb.init(
            id=_stored_id(workdir / "wandb_id"),
            resume="allow",
            project=project,
            name=name,
            dir=str(workdir),
            config=config,
        )

    def log(self, values: Mapping[str, float], x: int, stage: int, step: int) -> None:
        self.run.log({"stage": stage, "step": step, **values})

    def close(self) -> None:
        self.run.finish()


class TrackioTracker:
    """Write to one Trackio run per workdir; runs have no other id than their name there.

    TRACKIO_DIR is the folder of the data, and TRACKIO_SPACE_ID the Space that shows them.
    """

    def __init__(self, workdir: Path, project: str, name: str, config: Mapping[str, Any]):
        trackio = _import_tracker("trackio", "trackio", project)
        self.run = trackio.init(
            project=project,
            name=f"{name}-{_stored_id(workdir / 'trackio_id')[:6]}",
            resume="allow",
            config=dict(config),
            embed=False,
        )

    def log(self, values: Mapping[str, float], x: int, stage: int, step: int) -> None:
        self.run.log({"stage": stage, "train_step": step, **values})

    def close(self) -> None:
        self.run.finish()


class MlflowTracker:
    """Write to one MLflow run per workdir; its id is stored there, so a resumed run continues it.

    MLFLOW_TRACKING_URI is the server.
    """

    def __init__(self, workdir: Path, experiment: str, name: str, config: Mapping[str, Any]):
        mlflow = _import_tracker("mlflow", "mlflow", experiment)
        self.metric = mlflow.entities.Metric
        self.client, id_file = mlflow.MlflowClient(), workdir / "mlflow_id"
        if id_file.exists():
            self.run_id = id_file.read_text()
            self.client.update_run(self.run_id, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self.client.create_experiment(experiment)
        self.run_id = self.client.create_run(place, run_name=name).info.run_id
        self.client.log_dict(self.run_id, files.to_jsonable(config), "config.json")
        files.write_text(id_file, self.run_id)

    def log(self, values: Mapping[str, float], x: int, stage: int, step: int) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(
            self.run_id,
            [
                self.metric(MLFLOW_FORBIDDEN.sub("_", name), value, now, x)
                for name, value in values.items()
            ],
        )

    def close(self) -> None:
        self.client.set_terminated(self.run_id)
