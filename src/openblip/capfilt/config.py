"""What a CapFilt run does, also the options of `openblip capfilt`. No torch here, so that `--help` answers at once."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro

from openblip.data.config import DecodingAhead
from openblip.data.decision import check_threshold
from openblip.errors import Condition, ConfigError
from openblip.generation.decoding import Beam, Greedy, Nucleus, check_decoding


@dataclass(frozen=True, kw_only=True)
class FilterCheckOptions:
    """Whether the filter is tried on clean pairs before it is used, and what it must reach there."""

    check: str | None = None
    """Clean pairs that neither model was trained on: any data source, 100 images at least. Before anything else the
    filter scores their images with their own captions and with those of others; its AUC, precision and recall stand in
    the manifest and on the page."""
    check_floor: float = 0.8
    """What the lower end of the 95% interval of its AUC must reach, with captions of random other images; below, the
    filter is not used."""
    no_check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Use the filter without a check, or whatever the check says."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.check_floor <= 1.0:
            raise ConfigError(f"check-floor is {self.check_floor}; an AUC lies in 0 to 1, and guessing reaches 0.5")


@dataclass(frozen=True, kw_only=True)
class CapFiltConfig(FilterCheckOptions, DecodingAhead):
    """One CapFilt run: which pairs, which two checkpoints, how captions are written (BLIP section 3.3).

    Defaults are the paper's: one caption per image by nucleus sampling with p = 0.9, and a text is kept when its ITM
    probability is above 0.5. Raises `ConfigError` for values that cannot work together.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The noisy pairs: tar shards ("{0000..0127}.tar"), parquet, jsonl, csv, COCO json, a folder, any data source."""
    captioner: str
    """Checkpoint that writes captions: a folder, or the name of a shipped model."""
    filter: str
    """Checkpoint that scores texts against images: a folder, or the name of a shipped model."""
    threshold: float = 0.5
    """A text is kept when its ITM probability is strictly above this; `openblip capfilt-select` changes it later."""
    num_captions: int = 1
    """Captions written per image."""
    decoding: Annotated[Greedy | Beam | Nucleus, tyro.conf.Suppress] = Nucleus()  # noqa: RUF009 (frozen)
    """How the captioner decodes; its seed is the field below."""
    prompt: str | None = None
    """The first words of every caption; the checkpoint's own when not given."""
    seed: int = 0
    """Seed of the sampling; every image draws from (seed, shard, key), so batches and order do not matter."""
    batch_size: int = 64
    """Images in one step of the models. Changes speed and memory, not the rows."""
    dtype: str = "auto"
    """Precision of the models: float32, bfloat16, float16, int8 (of a BLIP on a CPU), or auto, the fastest at no loss
    that shows."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Of a captioner that is a BLIP-2: its language model in so many bits, for a GPU with less memory."""
    keep_embeddings: bool = False
    """Keep the filter's embeddings of images and texts beside the captions, for scores that compare with neighbours."""

    conditions: ClassVar = (
        Condition("check-floor", lambda config: config.check is not None, "nothing is checked without --check PAIRS"),
        Condition("check-floor", lambda config: not config.no_check, "with --no-check the filter is used anyway"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_captions", "batch_size", "num_workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"capfilt: {name} is {value}; it must be at least 1")
        check_threshold(self.threshold)
        check_decoding(self.decoding, self.num_captions)
        if isinstance(self.decoding, Nucleus) and self.decoding.seed is not None:
            raise ConfigError("capfilt: the decoding has a seed of its own; give it as CapFiltConfig.seed")

    def row_settings(self) -> dict[str, Any]:
        """The settings, other than data and models, that change rows of the output, as they are compared and shown."""
        decoding = {name: value for name, value in asdict(self.decoding).items() if name != "seed"}
        return {
            "num_captions": self.num_captions,
            "decoding": type(self.decoding).__name__.lower(),
            **decoding,
            "prompt": self.prompt,
            "seed": self.seed,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "jpeg": self.jpeg,
            "keep_embeddings": self.keep_embeddings,
        }
