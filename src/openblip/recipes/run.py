"""What a recipe returns: a complete run, as data. No torch here: `--help` reads it."""

from dataclasses import asdict, dataclass
from typing import Any

from openblip.data.config import DataConfig
from openblip.models.config import BlipConfig
from openblip.tasks.config import BlipTaskConfig
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
    """Tokenizer to use instead of training one: a folder, or a name on the Hugging Face hub."""
    data: DataConfig
    task: BlipTaskConfig
    training: TrainingConfig
    out: str
    """Folder of the run."""
    vision_init: str | None = None
    """ViT or DeiT to start the image side of a new model from: a Hugging Face folder or hub name."""
    text_init: str | None = None
    """BERT to start the text side of a new model from, likewise; needs that BERT's `tokenizer`."""
    image_size: int | None = None
    """Resolution to fine-tune the checkpoint at; None keeps its own."""
    drop_path: float | None = None
    """Stochastic depth of the checkpoint's image encoder while it is fine-tuned; None keeps its own."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return asdict(self)
