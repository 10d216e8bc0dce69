"""The decoding options that commands share, one per setting of `Beam`, `Nucleus` and `Greedy`."""

from dataclasses import dataclass
from typing import Literal

from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How captions are written."""

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
        """The chosen strategy; `seed` is for sampling. Raises `ConfigError` for a value out of range."""
        lengths = {"max_new_tokens": self.max_new_tokens, "min_new_tokens": self.min_new_tokens}
        penalty = self.repetition_penalty
        if self.decoding == "greedy":
            return Greedy(**lengths, repetition_penalty=penalty)
        if self.decoding == "nucleus":
            return Nucleus(
                **lengths,
                repetition_penalty=penalty,
                top_p=self.top_p,
                temperature=self.temperature,
                seed=seed,
            )
        return Beam(
            **lengths,
            repetition_penalty=penalty,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
        )
