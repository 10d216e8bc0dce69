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
from memory_source import MemorySource, load, take

from marks import slow
from openblip.data import feature_cache
from openblip.data.batch import Example, ImageTextProcessor, shared_fields
from openblip.data.config import Preprocessing
from openblip.data.feature_cache import FeatureCache, PartWriter, build_cache, open_cache, to_array
from openblip.data.sample import Sample
from openblip.data.sources import Mixture, open_mixture
from openblip.errors import ConfigError, ImageError
from openblip.files import hash_bytes
from source_items import items_of

PREPROCESSING = Preprocessing(image_size=8)
PROJECTION = torch.randn(3 * 64, 12, generator=torch.Generator().manual_seed(0))


def encode(pixels, dtype=torch.float32):
    """(n, 3, 8, 8) -> (n, 4, 3)"""
    return (PREPROCESSING.normalize(pixels).flatten(1) @ PROJECTION).unflatten(1, (4, 3)).to(dtype)


def one_by_one(pixels, dtype=torch.float32):
    """An image's features must not depend on the others of its batch."""
    return torch.cat([encode(image[None], dtype) for image in pixels])


@pytest.fixture
def different_shards(tmp_path, write_shards, make_image):
    """Writes shards of images no two of which are the same."""

    def write(sizes, **corrupt):
        own = {f"{i:05d}": make_image(17 * i) for i in range(sum(sizes))}
        return str(write_shards(tmp_path / "shards", sizes, corrupt={**own, **corrupt}))

    return write


@pytest.fixture
def source(different_shards):
    return open_mixture(different_shards([5, 3]))


@pytest.fixture
def folder(tmp_path):
    open_cache(tmp_path / "cache", {"encoder": "tiny"})
    return tmp_path / "cache"


def loaded(mixture, num_workers=0, **options):
    return take(load(mixture, processor=ImageTextProcessor(**options), num_workers=num_workers), 20)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float32, torch.float16)])
def test_training_reads_what_it_would_compute(source, folder, dtype, num_workers):
    build_cache(folder, source, PREPROCESSING, lambda p: one_by_one(p, dtype), num_workers=num_workers)
    cached = loaded(source, num_workers, read_pixels=FeatureCache(folder))
    for plain, features in zip(loaded(source), cached, strict=True):
        assert features.batch.pixels.dtype == dtype
        assert torch.equal(features.batch.pixels, one_by_one(plain.batch.pixels, dtype))
        assert features.batch.keys == plain.batch.keys
        assert features.batch.captions == plain.batch.captions
        assert features.cursor == plain.cursor


def test_an_image_is_encoded_once(source, folder, tmp_path, write_tar, make_image):
    """Also under other names, in another shard and in another source."""
    encoded = []
    for _ in range(2):
        build_cache(folder, source, PREPROCESSING, lambda p: encoded.extend(p) or one_by_one(p))
        assert len(encoded) == 8
    same = write_tar(
        tmp_path / "other" / "0.tar",
        [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("jpg", make_image(17 * 7)), ("txt", b"a cat"))],
    )
    build_cache(folder, open_mixture(str(same)), PREPROCESSING, lambda p: encoded.extend(p) or one_by_one(p))
    assert len(encoded) == 8
    assert len(FeatureCache(folder).keys) == 8


def test_unreadable_images_are_rejected_as_without_cache(folder, different_shards):
    mixture = open_mixture(different_shards([6], **{"00002": b"no picture"}))
    build_cache(folder, mixture, PREPROCESSING, one_by_one)
    plain = [batch.rejects for batch in loaded(mixture)]
    assert [batch.rejects for batch in loaded(mixture, read_pixels=FeatureCache(folder))] == plain
    assert any(plain)


def test_an_image_that_has_changed(source, folder, different_shards, make_image):
    build_cache(folder, source, PREPROCESSING, one_by_one)
    other = different_shards([5, 3], **{"00001": make_image(99)})
    with pytest.raises(ConfigError, match=r"0000/00001: its image was another one .* Remove that folder"):
        loaded(open_mixture(other), read_pixels=FeatureCache(folder))


def test_another_encoder_is_refused_with_the_difference(folder):
    open_cache(folder, {"encoder": "tiny"})
    with pytest.raises(ConfigError, match="encoder was tiny, is now large; layer was None, is now -2"):
        open_cache(folder, {"encoder": "large", "layer": -2})


def test_features_of_nobody_are_refused(source, folder):
    build_cache(folder, source, PREPROCESSING, one_by_one)
    (folder / "encoder.json").unlink()
    with pytest.raises(ConfigError, match="says of which encoder"):
        open_cache(folder, {"encoder": "tiny"})


def test_a_failure_leaves_no_part(source, folder):
    def failing(pixels):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        build_cache(folder, source, PREPROCESSING, failing)
    assert list((folder / "parts").iterdir()) == []


@pytest.mark.parametrize("name", [".bin", ".json", ".keys"])
def test_a_damaged_part_is_named(source, folder, name):
    build_cache(folder, source, PREPROCESSING, one_by_one)
    path = next((folder / "parts").glob(f"*{name}"))
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(ConfigError, match=r"remove .*json|damaged part"):
        FeatureCache(folder)


def fill_two_parts(folder, spec):
    def encode(pixels):
        while len(list((folder / "parts").glob("*.json"))) == 2:
            time.sleep(1)  # until it is killed
        return one_by_one(pixels)

    build_cache(folder, open_mixture(spec), PREPROCESSING, encode)


def test_killed_and_resumed(folder, different_shards):
    spec = different_shards([2] * 6)
    process = multiprocessing.get_context("fork").Process(target=fill_two_parts, args=(folder, spec))
    process.start()
    deadline = time.monotonic() + 60
    while len(list((folder / "parts").glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    written = list((folder / "parts").glob("*.json"))
    assert 2 <= len(written) < 6
    kept = {path: path.stat().st_mtime_ns for path in written}
    build_cache(folder, open_mixture(spec), PREPROCESSING, one_by_one)
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in kept.items())
    assert len(FeatureCache(folder).keys) == 12


def test_killed_inside_a_shard(folder, different_shards, monkeypatch):
    """What was written of it is not read again."""
    monkeypatch.setattr(feature_cache, "SAMPLES_PER_PART", 3)
    mixture = open_mixture(different_shards([11]))
    build_cache(folder, mixture, PREPROCESSING, one_by_one)
    parts = sorted((folder / "parts").glob("*.json"))
    contents = [json.loads(path.read_text()) for path in parts]
    assert [(part["pictures"], part["end"]) for part in contents] == [(3, 3), (3, 6), (3, 9), (2, None)]
    for path in parts[2:]:
        path.unlink()
    encoded = []
    build_cache(folder, mixture, PREPROCESSING, lambda p: encoded.extend(p) or one_by_one(p))
    assert len(encoded) == 5
    assert len(FeatureCache(folder).keys) == 11


def test_a_shard_that_has_grown_is_read_again(folder, make_image):
    class Counted(MemorySource):
        def num_samples(self, shard):
            return len(self.content[shard])

    samples = [Sample(str(i), "s", make_image(17 * i), ("a",), str(i)) for i in range(6)]
    encoded = []
    for size in (4, 4, 6):
        mixture = Mixture((Counted("a", {"s": samples[:size]}),))
        build_cache(folder, mixture, PREPROCESSING, lambda p: encoded.extend(p) or one_by_one(p))
    assert len(encoded) == 6
    assert len(FeatureCache(folder).keys) == 6


@pytest.mark.parametrize(("sizes", "shares"), [([1] * 7, [3, 2, 2]), ([8], [3, 3, 2])])
def test_processes_share_the_work(folder, different_shards, sizes, shares):
    """Shard by shard where there are enough, else by pieces of shards."""
    mixture = open_mixture(different_shards(sizes))
    encoded = []
    for rank in range(3):

        def encoding(pixels, rank=rank):
            encoded.extend([rank] * len(pixels))
            return one_by_one(pixels)

        build_cache(folder, mixture, PREPROCESSING, encoding, rank=rank, world_size=3)
    assert [encoded.count(rank) for rank in range(3)] == shares
    assert len(FeatureCache(folder).keys) == sum(sizes)


def test_a_cache_travels_to_workers(source, folder):
    build_cache(folder, source, PREPROCESSING, one_by_one)
    cache = FeatureCache(folder)
    key = hash_bytes(items_of(source.sources[0])[0].image)
    read = cache.read(key)
    again = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(again.read(key), read)
    assert cache.read(bytes(16)) is None


def test_keys_that_share_their_first_half(folder):
    """One of them is looked up behind the other."""
    keys = [b"same-one" + bytes([i]) * 8 for i in range(3)]
    with PartWriter.open(folder, "a") as part:
        part.add(keys[:2], torch.arange(2.0).view(2, 1, 1))
        part.rejects[keys[2].hex()] = "damaged"
    cache = FeatureCache(folder)
    assert [cache.read(key).item() for key in keys[:2]] == [0.0, 1.0]
    assert cache.read(keys[2]) is None
    assert keys[2] in cache
    assert b"same-one" + b"x" * 8 not in cache


def test_bits_survive(folder):
    values = torch.tensor([1.0, -0.0, float("inf"), 1e-40, 3.14159])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        there_and_back = shared_fields([Example("", "", to_array(values.to(dtype)), None)])["pixels"][0]
        assert there_and_back.dtype == dtype
        assert torch.equal(there_and_back.view(torch.uint8), values.to(dtype).view(torch.uint8))


def test_a_reject_keeps_its_reason(folder, source):
    sample = items_of(source.sources[0])[0]
    with PartWriter.open(folder, "a") as part:
        part.rejects[hash_bytes(sample.image).hex()] = "0000/00000: not an image"
    cache = FeatureCache(folder)
    with pytest.raises(ImageError, match="0000/00000: not an image"):
        cache(sample, None, None)
