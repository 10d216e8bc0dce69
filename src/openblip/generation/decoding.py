"""How to decode: three strategies as frozen settings. No torch here, so that `--help` can read them.

A strategy holds no state; `generation.search` runs it, and `generation.language` for language models. Each raises
ConfigError for a value out of its range.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from openblip.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Take the most likely token at every step.

    `max_new_tokens` and `min_new_tokens` count generated tokens without the prompt: the end token cannot be
    chosen before `min_new_tokens` others were. `repetition_penalty` > 1 makes tokens that were already
    generated less likely (CTRL, arXiv 1909.05858, section 4.1); tokens of the prompt are not penalised.
    `no_repeat_ngram_size` > 0 rules out a token that would complete a second time so many tokens in a row that were
    generated before: 2 lets no pair occur twice.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

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
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        _check_common(self)
        _check(self, "num_beams", lambda beams: beams >= 1, "at least 1", whole=True)
        _check(self, "length_penalty", math.isfinite, "that is finite")


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """Sample from the smallest set of tokens whose probability reaches `top_p` (arXiv 1904.09751).

    `temperature` divides the logits before, and `top_k` > 0 leaves the k most likely tokens to choose from. With a
    `seed` the texts are the same in every call; None takes a fresh seed per call. The other fields are those of
    `Greedy`.
    """

    top_p: float = 0.9
    top_k: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_common(self)
        _check(self, "top_p", lambda p: 0.0 < p <= 1.0, "above 0 and at most 1")
        _check(self, "top_k", lambda k: k >= 0, "0 (off) or more", whole=True)
        _check(self, "temperature", lambda t: t > 0.0 and math.isfinite(t), "above 0; use Greedy for none")
        if self.seed is not None:
            _check(self, "seed", lambda seed: seed >= 0, "0 or more, or None", whole=True)


Decoding = Greedy | Beam | Nucleus


def check_decoding(decoding: object, num_captions: int = 1) -> None:
    """Raise ConfigError for anything but a strategy (its name, say, or its class), and for more texts than it gives."""
    if not isinstance(decoding, Decoding):
        raise ConfigError(
            f"decoding is {decoding!r:.80}: give openblip.Beam(), openblip.Greedy() or openblip.Nucleus(), with "
            "settings in the brackets."
        )
    if num_captions < 1:
        raise ConfigError(f"num_captions is {num_captions}; it must be at least 1")
    most, writes = num_captions, ""
    if isinstance(decoding, Greedy):
        most, writes = 1, "Greedy writes one"
    elif isinstance(decoding, Beam):
        most, writes = decoding.num_beams, f"Beam with num_beams {decoding.num_beams} writes no more"
    if num_captions > most:
        advice = "use Nucleus, or Beam with more beams"
        raise ConfigError(f"{num_captions} captions per image were asked for, but {writes}; {advice}")


def _check_common(decoding: Decoding) -> None:
    _check(decoding, "max_new_tokens", lambda most: most >= 1, "at least 1", whole=True)
    longest = decoding.max_new_tokens
    in_range = f"between 0 and max_new_tokens ({longest})"
    _check(decoding, "min_new_tokens", lambda fewest: 0 <= fewest <= longest, in_range, whole=True)
    finite = "above 0 (1 means none)"
    _check(decoding, "repetition_penalty", lambda penalty: penalty > 0.0 and math.isfinite(penalty), finite)
    _check(decoding, "no_repeat_ngram_size", lambda size: size >= 0, "0 (off) or more", whole=True)


def _check(decoding: Decoding, name: str, holds: Callable[[Any], bool], demand: str, *, whole: bool = False) -> None:
    """Raise ConfigError for a setting that is no number, or no whole one, or not as demanded. Numbers of numpy become
    Python's.
    """
    value = getattr(decoding, name)
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real) or not holds(value):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{type(decoding).__name__}: {name} is {value!r}; it must be {kind} {demand}")
    object.__setattr__(decoding, name, int(value) if isinstance(value, Integral) else float(value))
