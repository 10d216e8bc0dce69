"""Options that several commands share, and texts in JSON files that options name."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openblip.errors import ConfigError
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus

if TYPE_CHECKING:
    from openblip.predictor import Blip2Predictor, BlipPredictor


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where and how models run."""

    device: str | None = None
    """"cpu", "cuda", "cuda:1" …; the best there is when not given."""
    dtype: str = "auto"
    """Precision of the weights: float32, bfloat16, float16, or auto for the fastest at no loss that shows."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(DeviceOptions):
    """Which model runs, where and how."""

    model: str
    """A checkpoint folder, file or hub name, or the name of a shipped model."""
    tokenizer: str | None = None
    """Folder or hub name of the vocabulary, for a checkpoint that has none."""
    encoder_token: Literal["[ENC]", "[CLS]"] | None = None
    """First token of texts that are read together with an image; what the checkpoint says when not given."""

    def load(self) -> "BlipPredictor | Blip2Predictor":
        """Load the checkpoint; raises as `openblip.load` does."""
        import openblip

        return openblip.load(
            self.model, self.device, self.dtype, tokenizer=self.tokenizer, encoder_token=self.encoder_token
        )


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How images are read."""

    images: str | None = None
    """The folder of the images or videos that an annotation file or table names."""
    batch_size: int = 32
    """Images, or frames of videos, in one step of the model."""
    num_workers: int = 2
    """Threads that read and decode images."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.num_workers) < 1:
            raise ConfigError("--batch-size and --num-workers must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How captions are written: one option per setting of `Beam`, `Nucleus` and `Greedy`."""

    decoding: Literal["beam", "nucleus", "greedy"] = "beam"
    """Beam search, nucleus sampling, or the likeliest token each time."""
    num_beams: int = 3
    """Beam: how many texts are kept while writing."""
    length_penalty: float = 1.0
    """Beam: above 0 favours long captions, below 0 short ones."""
    top_p: float = 0.9
    """Nucleus: sample from the likeliest tokens with this total probability."""
    temperature: float = 1.0
    """Nucleus: above 1 is more varied, below 1 less."""
    max_new_tokens: int = 20
    """The longest caption, in tokens."""
    min_new_tokens: int = 0
    """The shortest caption, in tokens."""
    repetition_penalty: float = 1.0
    """Above 1 makes repeated tokens less likely."""

    def build(self, seed: int | None = None) -> Decoding:
        """Return the strategy; `seed` is for sampling. Raises `ConfigError` for a value out of range."""
        strategies: dict[str, type[Decoding]] = {"beam": Beam, "nucleus": Nucleus, "greedy": Greedy}
        strategy, values = strategies[self.decoding], {**asdict(self), "seed": seed}
        return strategy(**{field.name: values[field.name] for field in fields(strategy)})


def read_text_list(path: Path, option: str) -> list[str]:
    """Read a JSON list of texts; raises `ConfigError`, which names the option, for anything else."""
    content = _read_texts(path, option)
    if not isinstance(content, list):
        raise ConfigError(f"--{option} {path} is no JSON list of strings")
    return content


def read_named_texts(path: Path, option: str) -> dict[str, str]:
    """Read a JSON object with a text for each name, or a list, whose texts are their own names.

    Raises `ConfigError`, which names the option, for anything else.
    """
    content = _read_texts(path, option)
    if content is None:
        raise ConfigError(f"--{option} {path} is neither a JSON list of strings nor an object of them")
    return content if isinstance(content, dict) else {text: text for text in content}


def _read_texts(path: Path, option: str) -> list[str] | dict[str, str] | None:
    """A list or an object of at least one text; None for anything else that is JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{option} {path} is not readable JSON: {error}") from error
    texts = list(content.values()) if isinstance(content, dict) else content
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return content  # type: ignore[no-any-return]
    return None
