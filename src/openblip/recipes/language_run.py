"""A training of a language model on text alone, as data. No torch here: `--help` reads it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from openblip.data.config import DataConfig
from openblip.models.config import check_heads_divide
from openblip.tasks.config import LanguagePretrainingConfig
from openblip.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class LanguageShape:
    """The shape of a language model that starts from random weights."""

    architecture: Literal["opt", "t5"]
    """opt: a decoder. t5: an encoder-decoder, as T5 1.1 and FlanT5."""
    hidden_dim: int = 128
    num_layers: int = 4
    """Of the decoder, and for t5 as many of the encoder."""
    num_heads: int = 4
    mlp_dim: int = 512
    max_positions: int = 160
    """Visual prompts and tokens together; t5 knows distances alone and has no limit."""

    def __post_init__(self) -> None:
        check_heads_divide("shape", self.hidden_dim, self.num_heads)


@dataclass(frozen=True, kw_only=True)
class LanguageRun:
    """A training of a language model from random weights; model/ is a folder of Hugging Face."""

    recipe: str
    """The recipe this run began as."""
    shape: LanguageShape
    vocab_size: int
    """Size of the vocabulary (byte-level BPE) trained on the texts."""
    data: DataConfig
    task: LanguagePretrainingConfig
    training: TrainingConfig
    out: str
    """Folder of the run."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return asdict(self)
