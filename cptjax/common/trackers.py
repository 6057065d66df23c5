"""Where the numbers of a run go beside its files, when `config.log` asks for it: TensorBoard, Weights & Biases."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cptjax.common import files


def open_trackers(workdir: Path, config: Mapping[str, Any]) -> list[Any]:
    """The trackers of a run's config, open."""
    log = config["log"]
    found: list[Any] = [TensorBoardTracker(workdir)] if log["tensorboard"] else []
    return found + (
        [WandbTracker(workdir, log["wandb"], config["name"], config)] if log["wandb"] else []
    )


class TensorBoardTracker:
    """Writes to `workdir`/tensorboard; a resumed run repeats the points since its checkpoint there."""

    def __init__(self, workdir: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError(
                "log.tensorboard=True needs tensorboardX: pip install 'cptjax[tracking]', or set it to False"
            ) from None
        self.writer = SummaryWriter(str(workdir / "tensorboard"))

    def log(self, values: Mapping[str, float], at: int, stage: int, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, at)

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """Writes to one wandb run per workdir, whose id is kept there: a resumed run goes on with it."""

    def __init__(self, workdir: Path, project: str, name: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ValueError(
                f"log.wandb={project!r} needs wandb: pip install 'cptjax[tracking]', or set it to ''"
            ) from None
        kept = workdir / "wandb_id"
        if not kept.exists():
            files.write_text(kept, secrets.token_hex(8))
        about = dict(project=project, name=name or workdir.name, dir=str(workdir), config=config)
        self.run = wandb.init(id=kept.read_text(), resume="allow", **about)

    def log(self, values: Mapping[str, float], at: int, stage: int, step: int) -> None:
        self.run.log({"stage": stage, "step": step, **values})

    def close(self) -> None:
        self.run.finish()
