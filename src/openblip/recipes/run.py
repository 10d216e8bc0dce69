"""What a recipe returns: a complete run, as data. No torch here: `--help` reads it."""

from dataclasses import asdict, dataclass
from typing import Any

from openblip.data.config import DataConfig
from openblip.models.config import BlipConfig
from openblip.tasks.config import TaskConfig
from openblip.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training from its data to its final weights."""

    recipe: str
    """The recipe this run began as."""
    init: str | None
    """Checkpoint to start from; None starts from random weights."""
    model: BlipConfig | None
    """The shape of a model that starts from random weights; None takes the checkpoint's."""
    vocab_size: int
    """Size of the WordPiece vocabulary trained on the captions when there is no checkpoint or tokenizer."""
    tokenizer: str | None
    """Folder of a tokenizer to use instead of training one."""
    data: DataConfig
    task: TaskConfig
    training: TrainingConfig
    out: str
    """Folder of the run."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return asdict(self)
