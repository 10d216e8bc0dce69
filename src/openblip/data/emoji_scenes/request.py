"""What is asked for: a kind of sample, a split, a number and a seed. It decides all that is written."""

from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from openblip.data.emoji_scenes.vocabulary import SPLITS, Split
from openblip.errors import ConfigError

Kind = Literal[
    "captions", "questions", "statements", "dialogs", "clips", "clip-questions", "classes", "documents"
]
KIND_NAMES: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneRequest:
    """What decides every byte that is written."""

    kind: Kind = "captions"
    split: Split
    num_samples: int
    seed: int
    noise: float
    samples_per_shard: int

    def __post_init__(self) -> None:
        if self.kind not in KIND_NAMES:
            raise ConfigError(
                f"emoji scenes come in no kind '{self.kind}'; choose one of {', '.join(KIND_NAMES)}"
            )
        if self.split not in SPLITS:
            raise ConfigError(f"emoji scenes have no split '{self.split}'; choose one of {', '.join(SPLITS)}")
        if self.num_samples < 1 or self.samples_per_shard < 1:
            raise ConfigError("num_samples and samples_per_shard must be at least 1")
        if not 0.0 <= self.noise <= 1.0:
            raise ConfigError(f"noise is a probability, so it lies in 0..1, not at {self.noise}")

    def rng(self, index: int, purpose: str) -> Random:
        """A stream of its own for each sample and purpose, so that samples do not depend on each other."""
        # Captions were there before the other kinds; their streams keep their names, and their scenes.
        own = "" if self.kind == "captions" else f"{self.kind}/"
        return Random(f"{own}{self.split}/{self.seed}/{index}/{purpose}")
