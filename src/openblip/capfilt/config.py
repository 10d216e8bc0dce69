"""What a CapFilt run does. No torch here: the command line reads it before anything heavy is imported."""

from dataclasses import asdict, dataclass
from typing import Any

from openblip import Beam, Greedy, Nucleus
from openblip.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CapFiltConfig:
    """One CapFilt run: which pairs, which two checkpoints, how captions are written (BLIP section 3.3).

    Defaults are the paper's: one caption per image by nucleus sampling with p = 0.9, and a text is kept when
    its ITM probability is above 0.5. Raises `ConfigError` for values that cannot work together.
    """

    source: str
    """The noisy pairs: any source of `openblip.data.sources`."""
    captioner: str
    """Checkpoint that writes the synthetic captions."""
    filter: str
    """Checkpoint that scores web and synthetic texts."""
    images: str | None = None
    """Folder of the images, for sources that list only their names (COCO json)."""
    threshold: float = 0.5
    """A text is kept when its ITM probability is strictly above this. Changes no row: see
    `capfilt-select`."""
    num_captions: int = 1
    """Synthetic captions per image."""
    decoding: Greedy | Beam | Nucleus = Nucleus()  # noqa: RUF009 (frozen)
    """How the captioner decodes; its seed is the field below."""
    prompt: str | None = None
    """Start of every caption; None takes the checkpoint's own."""
    seed: int = 0
    """Seed of the sampling; every image draws from (seed, shard, key), so batches and order do not matter."""
    batch_size: int = 64
    """Images per model call. Changes speed and memory, not the rows."""
    num_workers: int = 4
    """Threads that read and decode images."""
    dtype: str = "float32"
    """Precision of both checkpoints, by its name in `openblip.load`."""

    def __post_init__(self) -> None:
        for name in ("num_captions", "batch_size", "num_workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"capfilt: {name} is {getattr(self, name)}; it must be at least 1")
        check_threshold(self.threshold)
        if isinstance(self.decoding, Nucleus) and self.decoding.seed is not None:
            raise ConfigError("capfilt: the decoding has a seed of its own; give it as CapFiltConfig.seed")
        most = {Greedy: 1, Beam: getattr(self.decoding, "num_beams", 1)}.get(type(self.decoding))
        if most is not None and self.num_captions > most:
            raise ConfigError(
                f"capfilt: {self.num_captions} captions per image, but {type(self.decoding).__name__} "
                f"gives at most {most}; use nucleus sampling, or beam with more beams"
            )

    def row_settings(self) -> dict[str, Any]:
        """Every setting, other than data and models, that changes a row of the output; batch size and workers
        do not."""
        decoding = {name: value for name, value in asdict(self.decoding).items() if name != "seed"}
        return {
            "num_captions": self.num_captions,
            "decoding": type(self.decoding).__name__.lower(),
            **decoding,
            "prompt": self.prompt,
            "seed": self.seed,
            # Runs of versions that knew only float32 do not name it, and can be continued.
            **({} if self.dtype == "float32" else {"dtype": self.dtype}),
        }


def check_threshold(threshold: float) -> None:
    """Raises `ConfigError` unless the threshold is a probability (NaN is none)."""
    if not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"capfilt: threshold is {threshold}; it is compared with a probability, so give 0 to 1")
