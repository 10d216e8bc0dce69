"""TensorBoard and Weights & Biases, when asked for."""

from pathlib import Path
from typing import Any

from openblip.errors import MissingExtraError
from openblip.training.config import TrainingConfig


class Trackers:
    """Sends scalars to the trackers the config names; with none it does nothing."""

    def __init__(self, config: TrainingConfig, folder: Path) -> None:
        self._tensorboard = _tensorboard(folder) if config.tensorboard else None
        self._wandb = _wandb(config.wandb_project, folder) if config.wandb_project else None

    def log(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl."""
        scalars = {name: value for name, value in record.items() if isinstance(value, int | float)}
        step = int(scalars.pop("step"))
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError('TensorBoard is not installed: pip install "openblip[track]"') from error
    return SummaryWriter(str(folder / "tensorboard"))


def _wandb(project: str, folder: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError('wandb is not installed: pip install "openblip[track]"') from error
    return wandb.init(project=project, dir=str(folder), id=folder.name, resume="allow")
