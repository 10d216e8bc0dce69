"""What the CapFilt tests are made of: tiny random-weight checkpoints, pictures, tar shards."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw

from openblip.checkpoints.checkpoint import BlipCheckpoint, save_native
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokenizer
from openblip.models.blip import Blip
from openblip.models.config import Head
from shared_files import as_json
from tiny_blip import TINY

TEXT = "red green blue square dog cat bird on the grass a photo of two small large near above"
WORDS = TEXT.split()


def write_checkpoint(
    folder: Path, *, seed: int, image_size: int, heads: tuple[Head, ...] = ("itc", "itm", "lm")
) -> str:
    """A tiny BLIP with random weights, larger than at the start of training: its scores and words vary."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train([TEXT] * 2, vocab_size=250)
    text = replace(TINY.text, vocab_size=tokenizer.vocab_size, max_positions=64)
    model = Blip(replace(TINY, vision=replace(TINY.vision, image_size=image_size), text=text, heads=heads))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    save_native(folder, BlipCheckpoint(model, tokenizer, Preprocessing(image_size=image_size), "a photo of"))
    return str(folder)


def picture(seed: int, *, format: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    """An encoded picture of random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(encoded, format)
    return encoded.getvalue()


def drawing(seed: int) -> Image.Image:
    """Coloured rectangles, in which a perceptual hash finds shapes."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (200, 150), tuple(rng.integers(0, 256, 3).tolist()))
    for _ in range(8):
        x, y, width, height = rng.integers(0, 120, 4).tolist()
        ImageDraw.Draw(image).rectangle((x, y, x + width, y + height), tuple(rng.integers(0, 256, 3).tolist()))
    return image


def sample_members(key: str, seed: int, captions: Sequence[str]) -> list[tuple[str, bytes]]:
    """A picture and the json of a sample."""
    return [(f"{key}.jpg", picture(seed)), (f"{key}.json", as_json(captions=list(captions), width=40))]


def all_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of every caption file, shard by shard."""
    return [row for path in sorted(out.glob("captions/*.parquet")) for row in pq.read_table(path).to_pylist()]
