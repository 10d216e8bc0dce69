"""The BLIP-base that benchmarks time: random weights of a fixed seed in the shapes of the released model at 384 pixels.

The same weights are read by OpenBLIP and by its peers, from folders in transformers' format that are written once to
the temporary folder. What is generated means nothing, so every benchmark fixes its length.
"""

import os
import shutil
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_SIZE, NUM_TOKENS, VOCAB_SIZE = 384, 20, 30522  # the vocabulary of bert-base-uncased, before [DEC] and [ENC]
WORDS = """
a an the two three man woman dog cat horse car bus train boat table chair plate pizza cake street field beach snow
water tree grass sky red blue green white black small large old young sitting standing riding holding eating next
to on in of with near under over and is are looking at playing wooden grassy hill city people group
"""


def captioner_folder() -> Path:
    """A captioner, as transformers' BlipForConditionalGeneration."""
    return _folder("captioner", ("lm",))


def filter_folder() -> Path:
    """A filter, as transformers' BlipForImageTextRetrieval."""
    return _folder("filter", ("itc", "itm"))


def images(count: int, size: tuple[int, int] = (640, 480)) -> list[Image.Image]:
    """Smooth random images with some noise, which JPEG stores like photographs."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noise = rng.integers(-8, 9, (*smooth.shape[:2], 1), dtype=np.int16)
        result.append(Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)))
    return result


def texts(count: int) -> list[str]:
    """Captions of 5 to 14 words, each of them in the vocabulary."""
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS.split(), rng.integers(5, 15))) for _ in range(count)]


def pixels(model: Any, count: int) -> tuple[Tensor, Tensor]:
    """Prepared images: uint8 for OpenBLIP, and normalised, in the same order, for its peers."""
    prepared = model.prepare(images(count))
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.preprocessing.mean, model.preprocessing.std))
    return prepared, (prepared / 255 - mean) / std


def _folder(name: str, heads: tuple[str, ...]) -> Path:
    from openblip.checkpoints.checkpoint import BlipCheckpoint
    from openblip.checkpoints.loading import save_checkpoint
    from openblip.data.config import Preprocessing
    from openblip.data.tokenizer import Tokenizer
    from openblip.models.blip import Blip
    from openblip.models.config import BlipConfig
    from openblip.nn.config import TextConfig, VisionConfig

    def write(folder: Path) -> None:
        tokenizer = Tokenizer.load(_vocabulary(folder / "words"))
        config = BlipConfig(
            vision=VisionConfig(image_size=IMAGE_SIZE),
            text=TextConfig(vocab_size=tokenizer.vocab_size),
            heads=heads,  # type: ignore[arg-type]
        )
        torch.manual_seed(0)
        checkpoint = BlipCheckpoint(Blip(config).eval(), tokenizer, Preprocessing(image_size=IMAGE_SIZE))
        save_checkpoint(checkpoint, folder / "model", "huggingface")

    return written_once(f"blip-base-{name}", write) / "model"


def _vocabulary(folder: Path) -> Path:
    """A vocab.txt of BERT's size: special tokens, characters, the words above, and words that no text has."""
    folder.mkdir()
    characters = string.ascii_lowercase + string.digits + string.punctuation
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    known += [word for word in WORDS.split() if word not in known]
    entries = known + [f"filler{number}" for number in range(VOCAB_SIZE - len(known))]
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n")
    return folder


def written_once(name: str, write: Callable[[Path], None]) -> Path:
    """A folder of this name, which stays for later runs; `write` fills it where it is not there yet."""
    root = Path(tempfile.gettempdir()) / "openblip-benchmarks"
    target = root / name
    if not target.exists():
        root.mkdir(exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=root))
        try:
            write(unfinished)
            os.replace(unfinished, target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


# Peers.


def transformers_captioner(dtype: torch.dtype) -> Any:
    """transformers' model of the same folder. Its BLIP has one attention, written out, so no other can be chosen."""
    from transformers import BlipForConditionalGeneration

    return BlipForConditionalGeneration.from_pretrained(captioner_folder(), dtype=dtype).eval()


def transformers_filter(dtype: torch.dtype) -> Any:
    from transformers import BlipForImageTextRetrieval

    return BlipForImageTextRetrieval.from_pretrained(filter_folder(), dtype=dtype).eval()
