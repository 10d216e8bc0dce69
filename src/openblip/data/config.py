"""The data part of a run's configuration."""

from dataclasses import dataclass

from openblip.data.transforms import Augmentation


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pairs a training reads, and how."""

    source: str | None = None
    """Training pairs: tar shards, parquet, jsonl, csv, a folder, capfilt:DIR, or a mixture
    a.tar@0.7,b.tar@0.3. The user must say.
    """
    images: str | None = None
    """Folder of the images that a COCO captions json names."""
    validation: str | None = None
    """Samples on which the model is measured during the training: any one data source."""
    validation_limit: int | None = None
    """Number of samples that are used for it, the first of the source; None uses all."""
    augmentation: Augmentation | None = None
    """Random views; None: the plain squash resize."""
    num_workers: int = 1
    """Processes that decode images; 0 decodes in the training process."""
    max_text_length: int = 30
    """Tokens per caption, statement, dialog or instruction, [CLS] and [SEP] included."""
    num_frames: int | None = None
    """Uniform frames of each clip; None: the source has pictures."""
    shuffle_window_shards: int = 4
    """Shards whose samples are shuffled together."""
