"""What a bootstrap is told. No torch here: `--help` reads it."""

from dataclasses import dataclass

from openblip.recipes.catalog import Family


@dataclass(frozen=True, kw_only=True)
class BootstrapConfig:
    """What `bootstrap` starts from, and how it goes on; also the options of `openblip bootstrap`."""

    web: str
    """Noisy pairs: any data source."""
    human: str
    """Clean pairs: any data source; for fine-tuning and for every pre-training after the first."""
    out: str
    """Folder of the whole loop; the same command again goes on where it was stopped."""
    test: str | None = None
    """Pairs to evaluate on; without, the last 5% of every shard of the human pairs are held out."""
    rounds: int = 1
    """How often the web pairs are cleaned and a model is trained anew."""
    threshold: float = 0.5
    """Texts with an ITM probability above this are kept."""
    num_captions: int = 1
    """Captions written per image."""
    seed: int = 0
    """Of the sampled captions; the trainings have seeds of their own."""
    recipe: Family
    """The settings of the three trainings."""

    @property
    def human_for_training(self) -> str:
        return self.human if self.test is not None else f"{self.human}[:95%]"

    @property
    def pairs_for_test(self) -> str:
        return self.test if self.test is not None else f"{self.human}[95%:]"
