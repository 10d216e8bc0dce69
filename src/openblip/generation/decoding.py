"""How to decode: three strategies as frozen settings. No torch here, so that `--help` can read them.

A strategy holds no state; `generation.search` runs it, and `generation.language` for language models.
"""

import math
from dataclasses import dataclass

from openblip.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Take the most likely token at every step.

    `max_new_tokens` and `min_new_tokens` count generated tokens without the prompt: the end token cannot be
    chosen before `min_new_tokens` others were. `repetition_penalty` > 1 makes tokens that were already
    generated less likely (CTRL, arXiv 1909.05858, section 4.1); tokens of the prompt are not penalised.

    Raises ConfigError for a value out of its range.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check_common(self)


@dataclass(frozen=True, kw_only=True)
class Beam:
    """Keep the `num_beams` most likely texts while writing, and return the best finished one.

    A finished text is ranked by (sum of its log-probabilities) / length ** `length_penalty`, where the length
    counts generated tokens, the end token included: above 0 favours long texts, below 0 short ones. The other
    fields are those of `Greedy`. With one beam this is `Greedy`.

    Raises ConfigError for a value out of its range.
    """

    num_beams: int = 3
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check_common(self)
        if self.num_beams < 1:
            raise ConfigError(f"Beam: num_beams is {self.num_beams}; it must be at least 1")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"Beam: length_penalty is {self.length_penalty}; it must be a finite number")


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """Sample from the smallest set of tokens whose probability reaches `top_p` (arXiv 1904.09751).

    `temperature` divides the logits before. With a `seed` the texts are the same in every call; None takes a
    fresh seed per call. The other fields are those of `Greedy`.

    Raises ConfigError for a value out of its range.
    """

    top_p: float = 0.9
    temperature: float = 1.0
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_common(self)
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"Nucleus: top_p is {self.top_p}; it must be above 0 and at most 1")
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ConfigError(f"Nucleus: temperature is {self.temperature}; it must be above 0; use Greedy for none")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"Nucleus: seed is {self.seed}; it must be 0 or more, or None")


Decoding = Greedy | Beam | Nucleus


def _check_common(decoding: Decoding) -> None:
    name = type(decoding).__name__
    if decoding.max_new_tokens < 1:
        raise ConfigError(f"{name}: max_new_tokens is {decoding.max_new_tokens}; it must be at least 1")
    if not 0 <= decoding.min_new_tokens <= decoding.max_new_tokens:
        raise ConfigError(
            f"{name}: min_new_tokens is {decoding.min_new_tokens}; "
            f"it must be between 0 and max_new_tokens ({decoding.max_new_tokens})"
        )
    if not (decoding.repetition_penalty > 0.0 and math.isfinite(decoding.repetition_penalty)):
        raise ConfigError(
            f"{name}: repetition_penalty is {decoding.repetition_penalty}; it must be above 0 (1 means none)"
        )
