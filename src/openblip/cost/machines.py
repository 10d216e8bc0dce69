"""Machines as an estimate sees them: what one has, and how fast it is. No torch here.

A machine is a JSON file with the fields of `Machine`. `openblip estimate --measure` makes one of the machine that it
runs on; those in devices/ come with the package.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from openblip.errors import ConfigError
from openblip.files import read_json, write_json

DEVICES = Path(__file__).parent / "devices"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine of several that are alike, with accelerators, or without them: then its cores run the models too.

    Speeds of models are operations per second of one accelerator (`models.flops` counts them), of a machine without
    accelerators those of all its cores. They were measured on BLIP with ViT-B/16, and serve for models of other shapes.
    """

    name: str
    source: str
    """How the numbers were found: where and when they were measured, or what they were taken from."""
    cores: int
    accelerators: int = 0
    encode_flops: float
    """Of the image encoder, with the keys and values of the image."""
    write_flops: float
    """Of the decoder that writes captions, one token after the other."""
    score_flops: float
    """Of the text encoder that scores texts, ITM and ITC."""
    train_flops: float
    """Of a training step."""
    decode_seconds: float
    """Of one core for each image, however small: reading, decoding, resizing to 384 pixels."""
    decode_seconds_per_megapixel: float
    """And for every million pixels of it."""
    augment_seconds: float = 0.0
    """Of one core for the random view of an image that a training sees."""
    network_bytes: float = 1.25e9
    """Bytes per second that it can receive; 1.25e9 is a network of 10 gigabits."""
    start_seconds: float = 60.0
    """From the start of a machine's work, also after a failure, to its first image."""
    hours_between_failures: float = 1000.0
    """Mean time until it fails or is taken away, as the provider of cheap machines may do."""

    def __post_init__(self) -> None:
        for name in ("cores", "encode_flops", "write_flops", "score_flops", "train_flops", "network_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"machine {self.name}: {name} is {getattr(self, name)}; it must be positive.")

    def save(self, path: Path) -> None:
        """Write the machine's file."""
        write_json(path, asdict(self))


def load_machine(name: str) -> Machine:
    """The machine of a file, or one of those that come with the package, by its name. ConfigError: there is none."""
    path = DEVICES / f"{name}.json"
    if not path.is_file():
        path = Path(name)
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in DEVICES.glob("*.json")))
            raise ConfigError(f"There is no machine {name}: name a file that --measure has written, or one of {known}.")
    values = read_json(path)
    if not isinstance(values, dict) or (wrong := sorted(set(values) - {field.name for field in fields(Machine)})):
        raise ConfigError(f"{path} is not the file of a machine: {wrong if isinstance(values, dict) else values}.")
    try:
        return Machine(**values)
    except TypeError as error:
        raise ConfigError(f"{path} is not the file of a machine: {error}.") from error
