"""The feature cache: what it gives back, what it refuses, and that it survives being killed and shared."""

import json
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch

from openblip.data import feature_filling
from openblip.data.batch import ImageTextProcessor, to_tensor
from openblip.data.feature_filling import blocks, fill
from openblip.data.features import (
    CachedFeatures,
    FeatureStore,
    PartWriter,
    claim,
    is_written,
    picture_key,
    to_array,
)
from openblip.data.loader import Loader
from openblip.data.sources import open_mixture
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import ConfigError, ImageError

PREPROCESSING = Preprocessing(image_size=8)
TOKENIZER = Tokenizer.train(["sample text 0123456789"], 150)
PROJECTION = torch.randn(3 * 64, 12, generator=torch.Generator().manual_seed(0))


def encode(pixels, dtype=torch.float32):
    """(n, 3, 8, 8) -> (n, 4, 3)"""
    return (PREPROCESSING.normalize(pixels).flatten(1) @ PROJECTION).unflatten(1, (4, 3)).to(dtype)


def one_by_one(pixels, dtype=torch.float32):
    """As `run_frozen` sees to it: no picture's features depend on the others."""
    return torch.cat([encode(picture[None], dtype) for picture in pixels])


@pytest.fixture
def different_shards(tmp_path, write_shards, make_image):
    """Writes shards of pictures no two of which are the same."""

    def write(sizes, **corrupt):
        own = {f"{i:05d}": make_image(17 * i) for i in range(sum(sizes))}
        return str(write_shards(tmp_path / "shards", sizes, corrupt={**own, **corrupt}))

    return write


@pytest.fixture
def source(different_shards):
    return open_mixture(different_shards([5, 3]))


@pytest.fixture
def folder(tmp_path):
    claim(tmp_path / "cache", {"encoder": "tiny"})
    return tmp_path / "cache"


def loaded(mixture, processor, batch_size=4, num_batches=6, num_workers=0):
    loader = Loader(
        mixture,
        tokenizer=TOKENIZER,
        preprocessing=PREPROCESSING,
        batch_size=batch_size,
        seed=3,
        processor=processor,
        num_workers=num_workers,
    )
    return [next(batches) for batches in [iter(loader)] for _ in range(num_batches)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_reads_what_it_would_compute(source, folder, dtype, num_workers):
    fill(folder, source, PREPROCESSING, lambda p: one_by_one(p, dtype), num_workers=num_workers)
    cached = ImageTextProcessor(read_pixels=CachedFeatures(FeatureStore.open(folder)))
    for plain, features in zip(
        loaded(source, ImageTextProcessor()), loaded(source, cached, num_workers=num_workers), strict=True
    ):
        assert features.batch.pixels.dtype == dtype
        assert torch.equal(features.batch.pixels, one_by_one(plain.batch.pixels, dtype))
        assert features.batch.keys == plain.batch.keys
        assert features.batch.captions == plain.batch.captions
        assert features.cursor == plain.cursor


def test_a_picture_is_encoded_once(source, folder, tmp_path, write_tar, make_image):
    """Also under other names, in another shard and in another source."""
    counted = []

    def counting(pixels):
        counted.extend(pixels)
        return one_by_one(pixels)

    fill(folder, source, PREPROCESSING, counting)
    assert len(counted) == 8
    fill(folder, source, PREPROCESSING, counting)
    assert len(counted) == 8
    same = write_tar(
        tmp_path / "other" / "0.tar",
        [
            (f"{i}.{kind}", data)
            for i in range(3)
            for kind, data in (("jpg", make_image(17 * 7)), ("txt", b"a cat"))
        ],
    )
    fill(folder, open_mixture(str(same)), PREPROCESSING, counting)
    assert len(counted) == 8
    assert len(FeatureStore.open(folder)) == 8


def test_unreadable_pictures_are_rejected_as_without_cache(folder, different_shards):
    mixture = open_mixture(different_shards([6], **{"00002": b"no picture"}))
    fill(folder, mixture, PREPROCESSING, one_by_one)
    cached = ImageTextProcessor(read_pixels=CachedFeatures(FeatureStore.open(folder)))
    plain = [batch.rejects for batch in loaded(mixture, ImageTextProcessor())]
    assert [batch.rejects for batch in loaded(mixture, cached)] == plain
    assert any(plain)


def test_a_picture_that_has_changed(source, folder, different_shards, make_image):
    fill(folder, source, PREPROCESSING, one_by_one)
    other = different_shards([5, 3], **{"00001": make_image(99)})
    cached = ImageTextProcessor(read_pixels=CachedFeatures(FeatureStore.open(folder)))
    with pytest.raises(ConfigError, match="0000/00001: its picture was another one"):
        loaded(open_mixture(other), cached)


def test_another_encoder_is_refused_with_the_difference(folder):
    claim(folder, {"encoder": "tiny"})
    with pytest.raises(ConfigError, match="encoder was tiny, is now large; layer was None, is now -2"):
        claim(folder, {"encoder": "large", "layer": -2})


def test_features_of_nobody_are_refused(source, folder):
    fill(folder, source, PREPROCESSING, one_by_one)
    (folder / "encoder.json").unlink()
    with pytest.raises(ConfigError, match="says whose"):
        claim(folder, {"encoder": "tiny"})


def test_a_failure_leaves_no_part(source, folder):
    def failing(pixels):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fill(folder, source, PREPROCESSING, failing)
    assert list((folder / "parts").iterdir()) == []


@pytest.mark.parametrize("name", [".bin", ".json", ".keys"])
def test_a_damaged_part_is_named(source, folder, name):
    fill(folder, source, PREPROCESSING, one_by_one)
    path = next((folder / "parts").glob(f"*{name}"))
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(ConfigError, match=r"remove .*json|damaged part"):
        FeatureStore.open(folder)


def slow_fill(folder, spec, seconds):
    def slow(pixels):
        time.sleep(seconds)
        return one_by_one(pixels)

    fill(folder, open_mixture(spec), PREPROCESSING, slow)


def test_killed_and_resumed(folder, different_shards):
    spec = different_shards([2] * 6)
    process = multiprocessing.get_context("fork").Process(target=slow_fill, args=(folder, spec, 0.1))
    process.start()
    deadline = time.monotonic() + 30
    while len(list((folder / "parts").glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    mixture = open_mixture(spec)
    before = [block.name for block in blocks(mixture) if is_written(folder, block.name)]
    assert 2 <= len(before) < 6
    kept = {path: path.stat().st_mtime_ns for name in before for path in (folder / "parts").glob(f"{name}.*")}
    fill(folder, mixture, PREPROCESSING, one_by_one)
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in kept.items())
    assert len(FeatureStore.open(folder)) == 12


def test_processes_share_the_work(folder, different_shards):
    """Whatever each of them finds written when it comes to look."""
    mixture = open_mixture(different_shards([1] * 7))
    encoded = []
    for rank in range(3):

        def encoding(pixels, rank=rank):
            encoded.append(rank)
            return one_by_one(pixels)

        fill(folder, mixture, PREPROCESSING, encoding, rank=rank, world_size=3)
    assert encoded == [0, 0, 0, 1, 1, 2, 2]
    assert len(FeatureStore.open(folder)) == 7


def test_long_shards_are_cut_into_parts(folder, different_shards, monkeypatch):
    monkeypatch.setattr(feature_filling, "BLOCK", 3)
    mixture = open_mixture(different_shards([8]))
    fill(folder, mixture, PREPROCESSING, one_by_one)
    sizes = [json.loads(path.read_text())["pictures"] for path in (folder / "parts").glob("*.json")]
    assert sorted(sizes) == [2, 3, 3]


def test_a_store_travels_to_workers(source, folder):
    fill(folder, source, PREPROCESSING, one_by_one)
    store = FeatureStore.open(folder)
    key = picture_key(next(iter(source.sources[0].index("0000").records)).read().image)
    read = store.read(key)
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.read(key), read)
    assert store.read(bytes(16)) is None


def test_keys_that_share_their_first_half(folder):
    """One of them is looked up behind the other."""
    keys = [b"same-one" + bytes([i]) * 8 for i in range(3)]
    with PartWriter(folder, "a") as part:
        part.add(keys[:2], torch.arange(2.0).view(2, 1, 1))
        part.reject(keys[2], "damaged")
    store = FeatureStore.open(folder)
    assert [store.read(key).item() for key in keys[:2]] == [0.0, 1.0]
    assert store.read(keys[2]) is None
    assert keys[2] in store
    assert b"same-one" + b"x" * 8 not in store


def test_bits_survive(folder):
    values = torch.tensor([1.0, -0.0, float("inf"), 1e-40, 3.14159])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        there_and_back = to_tensor(to_array(values.to(dtype)))
        assert there_and_back.dtype == dtype
        assert torch.equal(there_and_back.view(torch.uint8), values.to(dtype).view(torch.uint8))


def test_a_reject_keeps_its_reason(folder, source):
    record = next(iter(source.sources[0].index("0000").records))
    sample = record.read()
    with PartWriter(folder, "a") as part:
        part.reject(picture_key(sample.image), "0000/00000: not an image")
    media = CachedFeatures(FeatureStore.open(folder))
    with pytest.raises(ImageError, match="0000/00000: not an image"):
        media(sample, None, None)
