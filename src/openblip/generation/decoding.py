"""How to decode: three strategies as frozen settings. No torch here, so that `--help` can read them.

A strategy holds no state; `generation.search` runs it, and `generation.language` for language models. Each raises
ConfigError for a value out of its range.
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
    """

    num_beams: int = 3
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check_common(self)
        _check(self, "num_beams", self.num_beams >= 1, "at least 1")
        _check(self, "length_penalty", math.isfinite(self.length_penalty), "a finite number")


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """Sample from the smallest set of tokens whose probability reaches `top_p` (arXiv 1904.09751).

    `temperature` divides the logits before. With a `seed` the texts are the same in every call; None takes a
    fresh seed per call. The other fields are those of `Greedy`.
    """

    top_p: float = 0.9
    temperature: float = 1.0
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_common(self)
        positive = self.temperature > 0.0 and math.isfinite(self.temperature)
        _check(self, "top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _check(self, "temperature", positive, "above 0; use Greedy for none")
        _check(self, "seed", self.seed is None or self.seed >= 0, "0 or more, or None")


Decoding = Greedy | Beam | Nucleus


def _check_common(decoding: Decoding) -> None:
    longest, penalty = decoding.max_new_tokens, decoding.repetition_penalty
    _check(decoding, "max_new_tokens", longest >= 1, "at least 1")
    in_range = 0 <= decoding.min_new_tokens <= longest
    _check(decoding, "min_new_tokens", in_range, f"between 0 and max_new_tokens ({longest})")
    _check(decoding, "repetition_penalty", penalty > 0.0 and math.isfinite(penalty), "above 0 (1 means none)")


def _check(decoding: Decoding, name: str, holds: bool, demand: str) -> None:
    """Raise ConfigError for a setting that is not as demanded."""
    if not holds:
        raise ConfigError(f"{type(decoding).__name__}: {name} is {getattr(decoding, name)}; it must be {demand}")
