"""Pictures, pairs of them and clips: what a view is taken of, and what a bad one is called."""

import io
from typing import Any

import numpy as np
import pytest
from clip_files import GREY_STEP, clip
from PIL import Image

from openblip.data.media import Clip, Pair, Picture, media
from openblip.data.sample import Sample
from openblip.data.transforms import Augmentation
from openblip.errors import ImageError, SourceError, VideoError


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(level).integers(0, 200, (24, 32, 3), dtype=np.uint8)
    values[:4] = level
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def sample(image: bytes, second: bytes | None = None) -> Sample:
    return Sample("k", "shard", image, (), "source#1", {}, second)


def plain(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(image.resize((8, 8), Image.Resampling.NEAREST)).transpose(2, 0, 1)


def random_view(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return Augmentation()(image, rng, 16)


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_a_picture_is_its_own() -> None:
    found = Picture()(sample(png(3)), plain, rng())
    assert found.shape == (3, 8, 8)
    assert found[0, 0, 0] == 3


def test_a_pair_is_the_left_and_the_right_picture() -> None:
    found = Pair()(sample(png(3), png(7)), plain, rng())
    assert found.shape == (2, 3, 8, 8)
    assert found[:, 0, 0, 0].tolist() == [3, 7]


def test_each_picture_of_a_pair_has_a_view_of_its_own() -> None:
    twins = Pair()(sample(png(3), png(3)), random_view, rng())
    assert not np.array_equal(twins[0], twins[1])
    assert np.array_equal(twins, Pair()(sample(png(3), png(3)), random_view, rng()))


@pytest.mark.parametrize(("side", "pictures"), [("left", (b"x", png(1))), ("right", (png(1), b"x"))])
def test_the_damaged_picture_of_a_pair_is_named(side: str, pictures: tuple[bytes, bytes]) -> None:
    with pytest.raises(ImageError, match=rf"shard/k \({side}\)"):
        Pair()(sample(*pictures), plain, rng())
    with pytest.raises(SourceError, match="no second picture"):
        Pair()(sample(png(1)), plain, rng())


def test_a_clips_frames_are_spread_evenly() -> None:
    found = Clip(4)(sample(clip(20)), plain, rng())
    assert found.shape == (4, 3, 8, 8)
    numbers = [round(frame[:, 4, 4].mean() / GREY_STEP) for frame in found]
    assert numbers == sorted(numbers)
    assert min(np.diff(numbers)) >= 4


def test_all_frames_of_a_clip_have_the_same_view() -> None:
    """A crop that jumps about would be a movement that is not there."""
    seen: list[Any] = []

    def noting(image: Image.Image, generator: np.random.Generator) -> np.ndarray:
        seen.append(generator.random(3).tolist())
        return plain(image, generator)

    Clip(3)(sample(clip(6)), noting, rng())
    assert seen == [rng().random(3).tolist()] * 3


def test_a_clip_that_cannot_be_decoded_is_named() -> None:
    with pytest.raises(VideoError, match="shard/k"):
        Clip(2)(sample(b"no clip"), plain, rng())


def test_a_number_of_frames_makes_clips_of_a_source() -> None:
    assert media(None) == Picture()
    assert media(5) == Clip(5)
