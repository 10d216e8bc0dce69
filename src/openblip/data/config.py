"""The data part of a run's configuration."""

from dataclasses import dataclass

from openblip.data.transforms import Augmentation


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pairs a training reads, and how."""

    source: str | None = None
    """Training pairs: tar shards, parquet, jsonl, csv, a folder, capfilt:DIR, or several with the probabilities
    with which they are drawn, a.tar@0.7,b.tar@0.3; without these every sample is drawn equally often. The user
    must say."""
    images: str | None = None
    """Folder of the images that an annotation file or a table names."""
    validation: str | None = None
    """Samples on which the model is measured during the training: any one data source."""
    validation_limit: int | None = None
    """Number of samples that are used for it, the first of the source; None uses all."""
    augmentation: Augmentation | None = None
    """Random views of images; None: every image is squashed to a square."""
    num_workers: int = 1
    """Processes that read and decode, for each training process; 0: the training process does. Rounded down to a
    divisor of its streams, which are 64 in all (8 for each process where there are not 1, 2, 4 or 8)."""
    max_text_length: int = 30
    """Tokens per caption, statement, dialog or instruction, [CLS] and [SEP] included."""
    num_frames: int | None = None
    """Frames of each video, evenly spaced; None: the source has images."""
