"""Images and videos of samples: what a view is taken of, and how a bad one is named; batches."""

import io
from typing import Any

import numpy as np
import pytest
from clip_files import GREY_STEP, clip
from PIL import Image

from openblip.data.batch import image_pixels, pixel_reader
from openblip.data.sample import Sample
from openblip.errors import VideoError


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(level).integers(0, 200, (24, 32, 3), dtype=np.uint8)
    values[:4] = level
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def sample(image: bytes) -> Sample:
    return Sample("k", "shard", image, (), "source#1")


def plain(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(image.resize((8, 8), Image.Resampling.NEAREST)).transpose(2, 0, 1)


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_an_image_is_one_view() -> None:
    pixels = image_pixels(sample(png(3)), plain, rng())
    assert pixels.shape == (3, 8, 8)
    assert pixels[0, 0, 0] == 3


def test_a_videos_frames_are_spread_evenly() -> None:
    frames = pixel_reader(4)(sample(clip(20)), plain, rng())
    assert frames.shape == (4, 3, 8, 8)
    numbers = [round(frame[:, 4, 4].mean() / GREY_STEP) for frame in frames]
    assert numbers == sorted(numbers)
    assert min(np.diff(numbers)) >= 4


def test_all_frames_of_a_video_have_the_same_view() -> None:
    """A crop that jumps about would be a movement that is not there."""
    seen: list[Any] = []

    def noting(image: Image.Image, generator: np.random.Generator) -> np.ndarray:
        seen.append(generator.random(3).tolist())
        return plain(image, generator)

    pixel_reader(3)(sample(clip(6)), noting, rng())
    assert seen == [rng().random(3).tolist()] * 3


def test_a_video_that_cannot_be_decoded_is_named() -> None:
    with pytest.raises(VideoError, match="shard/k"):
        pixel_reader(2)(sample(b"no video"), plain, rng())


def test_a_number_of_frames_makes_videos_of_a_source() -> None:
    assert np.array_equal(pixel_reader(None)(sample(png(3)), plain, rng()), image_pixels(sample(png(3)), plain, rng()))
    assert len(pixel_reader(5)(sample(clip(20)), plain, rng())) == 5
