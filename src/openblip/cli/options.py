"""Options that several commands share, and texts in JSON files that options name."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openblip.errors import ConfigError
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus

if TYPE_CHECKING:
    from openblip.predictor import Blip2Predictor, BlipPredictor


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Where and how a model runs."""

    device: str | None = None
    """"cpu", "cuda", "cuda:1" …; the best there is when not given."""
    dtype: str = "float32"
    """Precision of the weights: float32, bfloat16, float16, or auto for the fastest at no loss that shows."""
    tokenizer: str | None = None
    """Folder or hub name of the vocabulary, for a checkpoint that has none."""

    def load(self, model: str, **more: Any) -> "BlipPredictor | Blip2Predictor":
        """Load a checkpoint; raises as `openblip.load` does."""
        import openblip

        return openblip.load(model, device=self.device, dtype=self.dtype, tokenizer=self.tokenizer, **more)


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
        common: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.decoding == "greedy":
            return Greedy(**common)
        if self.decoding == "nucleus":
            return Nucleus(**common, top_p=self.top_p, temperature=self.temperature, seed=seed)
        return Beam(**common, num_beams=self.num_beams, length_penalty=self.length_penalty)


def read_text_list(path: Path, option: str) -> list[str]:
    """Read a JSON list of texts; raises `ConfigError`, which names the option, for anything else."""
    content = _read(path, option)
    if not isinstance(content, list) or not _are_texts(content):
        raise ConfigError(f"--{option} {path} is no JSON list of strings")
    return content


def read_named_texts(path: Path, option: str) -> dict[str, str]:
    """Read a JSON object with a text for each name, or a list, whose texts are their own names.

    Raises `ConfigError`, which names the option, for anything else.
    """
    content = _read(path, option)
    if isinstance(content, dict) and _are_texts(list(content.values())):
        return content
    if not isinstance(content, list) or not _are_texts(content):
        raise ConfigError(f"--{option} {path} is neither a JSON list of strings nor an object of them")
    return {text: text for text in content}


def _read(path: Path, option: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{option} {path} is not readable JSON: {error}") from error


def _are_texts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)
