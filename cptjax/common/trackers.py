"""Send the metrics of a run to TensorBoard or Weights & Biases, as set in `config.log`."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cptjax.common import files


class Tracker(Protocol):
    """The interface of a tracker."""

    def log(self, values: Mapping[str, float], x: int, stage: int, step: int) -> None:
        """Record numbers by name; `x` is their position on the x axis."""

    def close(self) -> None:
        """Send the remaining numbers."""


def open_trackers(workdir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Open the trackers that a run's config names."""
    log = config["log"]
    trackers: list[Tracker] = []
    if log["tensorboard"]:
        trackers.append(TensorBoardTracker(workdir))
    if log["wandb"]:
        trackers.append(WandbTracker(workdir, log["wandb"], config["name"], config))
    return trackers


class TensorBoardTracker:
    """Write to `workdir`/tensorboard; a resumed run repeats the points since its checkpoint."""

    def __init__(self, workdir: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError(
                "log.tensorboard=True needs tensorboardX: pip install 'cptjax[tracking]', or set "
                "it to False"
            ) from None
        self.writer = SummaryWriter(str(workdir / "tensorboard"))

    def log(self, values: Mapping[str, float], x: int, stage: int, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, x)

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """Write to one wandb run per workdir; its id is stored there, so a resumed run continues it."""

    def __init__(self, workdir: Path, project: str, name: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ValueError(
                f"log.wandb={project!r} needs wandb: pip install 'cptjax[tracking]', or set it "
                "to ''"
            ) from None
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            files.write_text(id_file, secrets.token_hex(8))
        self.run = wandb.init(
            id=id_file.read_text(),
            resume="allow",
            project=project,
            name=name or workdir.name,
            dir=str(workdir),
            config=config,
        )

    def log(self, values: Mapping[str, float], x: int, stage: int, step: int) -> None:
        self.run.log({"stage": stage, "step": step, **values})

    def close(self) -> None:
        self.run.finish()
