"""What a run comes to once everything it names is built, whatever kind of run it is."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from openblip.data.batch import SampleProcessor
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.tasks.base import Task


class Assembled(NamedTuple):
    """What the trainer trains, what it reads, and how its result is written."""

    task: Task
    processor: SampleProcessor
    tokenizer: Tokenizer | None
    """None where the task makes its own tokens."""
    preprocessing: Preprocessing
    save: Callable[[Path], None]
    """Writes the final weights to a folder; its config.json comes last."""
