"""The loader: full batches for ever, in a fixed order whoever reads, exactly resumable, rejects named."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory_source import TOKENIZER, MemorySource, load, names, numbered, take

from marks import slow
from openblip.data import loader as loader_module
from openblip.data.batch import ImageTextProcessor
from openblip.data.config import Augmentation
from openblip.data.loader import Order, Pool, Position, block_size, join_cursors
from openblip.data.sample import Reject, Sample
from openblip.data.sources import Mixture
from openblip.errors import ConfigError, OpenBlipError, SourceError


def assert_same(left, right):
    assert names(left) == names(right)
    assert [b.batch.captions for b in left] == [b.batch.captions for b in right]
    assert [b.cursor for b in left] == [b.cursor for b in right]
    assert [b.rejects for b in left] == [b.rejects for b in right]
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.batch.pixels, b.batch.pixels)
        assert torch.equal(a.batch.tokens.ids, b.batch.tokens.ids)
        assert torch.equal(a.batch.image_ids, b.batch.image_ids)


@pytest.fixture
def no_small_pools(monkeypatch):
    """Few samples are read as many are."""
    monkeypatch.setattr(loader_module, "SMALL_POOL_SAMPLES", 0)


@pytest.fixture
def is_streamed(request):
    if request.param:
        request.getfixturevalue("no_small_pools")
    return request.param


@pytest.fixture(params=["streamed", "in memory"])
def odd_mixture(request, tmp_path, write_shards, write_tar, make_image):
    """Two weighted sources, with damaged images, a sample without image, and a shard that is none."""
    if request.param == "streamed":
        request.getfixturevalue("no_small_pools")
    write_shards(tmp_path / "a", [50, 30, 40], corrupt={"00002": b"no image", "00090": b""}, num_captions=3)
    write_shards(tmp_path / "b", [70], num_captions=3)
    odd = [("x.txt", b"no image")]
    for i in range(60):
        odd += [(f"{i}.jpg", make_image(i)), (f"{i}.txt", b"odd")]
    write_tar(tmp_path / "a" / "odd.tar", odd)
    (tmp_path / "a" / "zero.tar").write_bytes(b"")
    return f"{tmp_path / 'a'}@0.7,{tmp_path / 'b'}@0.3"


@pytest.mark.usefixtures("no_small_pools")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_that_no_sample_has_are_counted_once(tmp_path, write_tar, make_image, num_workers):
    members = [
        member for i in range(8) for member in ((f"{i}.jpg", make_image(i)), (f"{i}.txt", b"x"), (f"{i}.cls", b"1"))
    ]
    loader = load(write_tar(tmp_path / "a.tar", members), num_workers=num_workers)
    assert take(loader, 60)
    assert loader.count_unused() == {".cls": 8}


def test_batch_shapes(tmp_path, write_shards):
    batch = take(load(write_shards(tmp_path, [6])), 1)[0].batch
    assert len(batch) == 4
    assert batch.pixels.shape == (4, 3, 8, 8)
    assert batch.pixels.dtype == torch.uint8
    assert batch.image_ids.dtype == torch.int64
    assert (batch.image_ids >= 0).all()
    assert batch.shards == ["0000"] * 4
    width = TOKENIZER.encode(batch.captions).ids.shape[1]
    assert batch.tokens.ids.shape[1] == 8 * -(-width // 8)
    assert torch.equal(batch.tokens.ids[:, :width], TOKENIZER.encode(batch.captions).ids)
    assert batch.to("cpu").keys == batch.keys


def test_every_sample_of_a_small_pool_is_drawn_once_per_epoch(make_image):
    source = numbered("a", [3, 5, 0, 4], make_image())
    drawn = names(take(load(source, batch_size=5), 12))
    assert all(len(set(drawn[i : i + 12])) == 12 for i in range(0, 60, 12))


@pytest.mark.slow
def test_every_sample_is_drawn_about_equally_often(make_image, no_small_pools):
    source = numbered("a", [30, 50, 20, 10, 40], make_image())
    drawn = names(take(load(source, batch_size=150), 20))
    counts = Counter(drawn)
    assert len(counts) == 150
    assert min(counts.values()) >= 10
    assert max(counts.values()) <= 30
    assert drawn[:150] != sorted(drawn[:150])
    assert names(take(load(source, batch_size=150), 20)) == drawn
    assert names(take(load(source, batch_size=150, seed=4), 20)) != drawn


def test_a_shard_per_stream_is_read_through_before_it_comes_again(make_image):
    source = numbered("a", [20] * 64, make_image())
    counts = Counter(names(take(load(source, batch_size=64), 20)))
    assert set(counts.values()) == {1}
    assert len(counts) == 64 * 20


@pytest.mark.parametrize("size", [10, *slow(1, 2)])
@pytest.mark.parametrize("is_streamed", [False, True], indirect=True)  # with most pieces of the shard empty
def test_small_sources_fill_large_batches(make_image, size, is_streamed):
    batches = take(load(numbered("a", [size], make_image()), batch_size=128), 2)
    counts = Counter(names(batches))
    assert len(counts) == size
    assert min(counts.values()) >= (128 if is_streamed else 240) / size


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_gives_exactly_the_remaining_batches(odd_mixture, num_workers):
    options = {"augmentation": Augmentation(), "batch_size": 24}
    whole = take(load(odd_mixture, **options), 16)
    assert any(batch.rejects for batch in whole)
    for done in (1, 2, 13):
        cursor = json.loads(json.dumps(whole[done - 1].cursor))
        resumed = take(load(odd_mixture, cursor=cursor, num_workers=num_workers, **options), 16 - done)
        assert_same(resumed, whole[done:])
    assert len(json.dumps(cursor)) < 8000


@pytest.mark.parametrize("num_workers", [2, *slow(1, 3, 8)])
def test_workers_change_nothing(odd_mixture, num_workers):
    plain = take(load(odd_mixture, augmentation=Augmentation()), 24)
    assert_same(take(load(odd_mixture, augmentation=Augmentation(), num_workers=num_workers), 24), plain)


def test_what_a_worker_gets_can_be_pickled(odd_mixture):
    """Where workers are not forked, it is sent to them."""
    dataset = load(odd_mixture).worker
    (part,), (other,) = (itertools.islice(d, 1) for d in (dataset, pickle.loads(pickle.dumps(dataset))))
    assert torch.equal(part.packed().pixels, other.packed().pixels)
    assert part.positions == other.positions


@pytest.mark.parametrize("world_size", [2, *slow(4)])
def test_processes_together_see_what_one_sees(odd_mixture, world_size):
    one = take(load(odd_mixture, batch_size=24), 10)
    ranks = [
        take(load(odd_mixture, batch_size=24 // world_size, rank=rank, world_size=world_size), 10)
        for rank in range(world_size)
    ]
    for step, joint in enumerate(one):
        parts = [names([rank[step]]) for rank in ranks]
        assert [pair for row in zip(*parts, strict=True) for pair in row] == names([joint])
        assert sum(len(rank[step].rejects) for rank in ranks) == len(joint.rejects)
        assert join_cursors([rank[step].cursor for rank in ranks]) == joint.cursor
    # One process goes on where several have stopped, and the other way round.
    joined = join_cursors([rank[4].cursor for rank in ranks])
    assert names(take(load(odd_mixture, batch_size=24, cursor=joined), 5)) == names(one[5:])
    rest = take(load(odd_mixture, batch_size=12, rank=1, world_size=2, cursor=one[4].cursor), 5)
    assert names(rest) == names(one[5:])[1::2]


@pytest.mark.slow
def test_another_batch_size_goes_on_in_the_same_order(odd_mixture):
    whole = names(take(load(odd_mixture, batch_size=6), 20))
    cursor = take(load(odd_mixture, batch_size=6), 5)[-1].cursor
    assert names(take(load(odd_mixture, batch_size=15, cursor=cursor), 6)) == whole[30:]
    parts = [names(take(load(odd_mixture, batch_size=5, rank=r, world_size=4, cursor=cursor), 4)) for r in range(4)]
    for step in range(4):
        rows = [pair for part in parts for pair in part[5 * step : 5 * step + 5]]
        assert sorted(rows) == sorted(whole[30 + 20 * step : 50 + 20 * step])


@pytest.mark.slow
def test_resuming_reads_from_the_open_blocks_on(make_image, monkeypatch):
    monkeypatch.setattr(loader_module, "MAX_BLOCK_SAMPLES", 16)
    source = numbered("a", [200] * 64, make_image())
    cursor = take(load(source, batch_size=64), 60)[-1].cursor
    source.reads.clear()
    take(load(source, batch_size=64, cursor=cursor), 1)
    starts = [position[0][1] for position in cursor["positions"].values()]
    assert min(starts) > 40
    assert min(number for _, number in source.reads) == min(starts)


def test_nothing_is_read_before_the_first_batch_and_little_for_it(make_image):
    source = numbered("a", [1000] * 64, make_image())
    loader = load(source, batch_size=64)
    assert not source.reads
    iterator = iter(loader)
    next(iterator)
    assert len(source.reads) < 64 * 110  # of every stream the first block, one ahead, and a sample
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("openblip-read")]


def test_blocks_hold_few_samples_and_bytes(make_image, monkeypatch, no_small_pools):
    monkeypatch.setattr(loader_module, "MAX_BLOCK_SAMPLES", 5)
    source = numbered("a", [60], make_image())
    whole = take(load(source), 60)
    assert {p[0][1] // 64 for batch in whole for p in batch.cursor["positions"].values()} == {0}
    monkeypatch.setattr(loader_module, "MAX_BLOCK_BYTES", 2 * len(make_image()))
    source = numbered("a", [30] * 64, make_image())
    for batch in take(load(source, batch_size=64), 20):
        for ((_, number, taken),) in batch.cursor["positions"].values():
            assert number % 2 == 0
            assert taken < 2


@pytest.mark.slow
def test_samples_with_one_number_stay_together(make_image, monkeypatch):
    """As the kept texts of one image do, in a CapFilt run."""

    class Twofold(MemorySource):
        def read_selected(self, shard, selection):
            for number, item in super().read_selected(shard, selection):
                for text in "ab":
                    yield number, Sample(f"{item.key}-{text}", shard, item.image, (text,), item.image_id)

    monkeypatch.setattr(loader_module, "MAX_BLOCK_SAMPLES", 3)
    source = Twofold("a", numbered("a", [20] * 64, make_image()).content)
    whole = take(load(source, batch_size=64), 40)
    assert set(Counter(names(whole)).values()) == {1}
    assert names(take(load(source, batch_size=64, cursor=whole[6].cursor), 33)) == names(whole[7:])


def test_views_and_captions_depend_on_the_sample_alone(odd_mixture):
    options = {"augmentation": Augmentation()}
    one = take(load(odd_mixture, batch_size=48, **options), 1)[0].batch
    two = [take(load(odd_mixture, batch_size=8, rank=r, world_size=2, **options), 3) for r in (0, 1)]
    rows = {name: row for row, name in enumerate(zip(one.shards, one.keys, one.captions, strict=True))}
    for loaded in two[0] + two[1]:
        batch = loaded.batch
        for i, name in enumerate(zip(batch.shards, batch.keys, batch.captions, strict=True)):
            assert torch.equal(batch.pixels[i], one.pixels[rows[name]])


def test_every_caption_of_a_sample_is_used_over_the_epochs(make_image):
    batches = take(load(numbered("a", [2], make_image(), captions=3), batch_size=64), 10)
    captions = {caption for loaded in batches for caption in loaded.batch.captions}
    assert captions == {f"sample {n:05d} text {i}" for n in (0, 1) for i in range(3)}


@pytest.mark.parametrize(
    ("num_workers", "is_streamed"), [(0, False), *slow((0, True), (2, True))], indirect=["is_streamed"]
)
def test_rejects_are_replaced_and_named(tmp_path, write_tar, write_shards, make_image, num_workers, is_streamed):
    corrupt = {"00001": b"", "00003": b"text", "00004": make_image(size=(300, 300))[:-100]}
    write_shards(tmp_path, [8], corrupt=corrupt)
    odd = [("a.jpg", make_image()), ("b.jpg", make_image()), ("b.txt", b"!!!"), ("c.txt", b"no image")]
    write_tar(tmp_path / "odd.tar", [*odd, ("d.jpg", b"x")])
    (tmp_path / "page.tar").write_bytes(b"<html>not found</html>" * 100)
    batches = take(load(tmp_path, batch_size=64, num_workers=num_workers), 4)
    assert {key for _, key in names(batches)} == {"00000", "00002", "00005", "00006", "00007"}
    rejects = {(r.shard, r.key): r.reason for batch in batches for r in batch.rejects}
    assert set(rejects) == {("0000", k) for k in corrupt} | {("odd", k) for k in "abcd"} | {("page", "")}
    assert rejects["odd", "a"] == rejects["odd", "b"] == "no caption"
    assert "empty" in rejects["0000", "00001"]
    assert "no image" in rejects["odd", "c"]
    assert "not a tar archive" in rejects["page", ""]


def test_rejects_come_once_per_epoch(make_image):
    shards = {}
    for shard in map(str, range(64)):
        good = [Sample(str(i), shard, make_image(), ("a",), f"{shard}/{i}") for i in range(3)]
        shards[shard] = [good[0], Reject(shard, "x", "broken"), good[1], good[2]]
    batches = take(load(MemorySource("a", shards), batch_size=64), 9)
    assert Counter(r.shard for batch in batches for r in batch.rejects) == dict.fromkeys(shards, 3)


@pytest.mark.parametrize(("num_workers", "is_streamed"), [(0, False), (0, True), (1, True)], indirect=["is_streamed"])
def test_a_source_without_usable_samples_raises(tmp_path, write_shards, write_tar, num_workers, is_streamed):
    folder = write_shards(tmp_path / "all", [3, 3], corrupt={f"{i:05d}": b"bad" for i in range(6)})
    with pytest.raises(SourceError, match=r"^\S+all: no sample can be used; the last, 0001/00005: .*known format\b"):
        take(load(folder, num_workers=num_workers), 1)
    write_tar(tmp_path / "none" / "a.tar", [("a.txt", b"x")])
    with pytest.raises(SourceError, match=r"no sample can be used; the last, a/a: no image"):
        take(load(tmp_path / "none", num_workers=num_workers), 1)
    write_shards(tmp_path / "good", [5])
    with pytest.raises(SourceError, match=r"all: no sample can be used"):
        take(load(f"{folder},{tmp_path / 'good'}", num_workers=num_workers), 50)


class Flaky(MemorySource):
    """The connection is lost at sample 7, as often as `failures` says."""

    failures = 1

    def read_selected(self, shard, selection):
        for number, item in super().read_selected(shard, selection):
            if number == 7 and self.failures:
                self.failures -= 1
                raise ConnectionError("connection lost")
            yield number, item


def test_a_lost_connection_is_tried_again(make_image, monkeypatch):
    monkeypatch.setattr(loader_module, "_RETRY_PAUSES", (0.0, 0.0, 0.0))
    plain = numbered("a", [12] * 64, make_image())
    flaky = Flaky("a", plain.content)
    assert_same(take(load(flaky, batch_size=64), 14), take(load(plain, batch_size=64), 14))
    flaky.failures = 10**9
    with pytest.raises(SourceError, match=r"a: shard 00.. cannot be read: connection lost"):
        take(load(flaky, batch_size=64), 14)


@pytest.mark.slow
def test_mixture_weights_are_probabilities_of_draws(make_image):
    sources = (numbered("a", [2], make_image()), numbered("b", [50], make_image()))
    batches = take(load(Mixture(sources, (0.8, 0.2)), batch_size=200), 4)
    ids = Counter(image_id for batch in batches for image_id in batch.batch.image_ids.tolist())
    assert 0.75 < sum(count for _, count in ids.most_common(2)) / 800 < 0.85
    batches = take(load(Mixture(sources), batch_size=200), 10)
    counts = Counter(image_id for batch in batches for image_id in batch.batch.image_ids.tolist())
    assert len(counts) == 52
    assert max(counts.values()) < 90  # 38.5 expected of each


@pytest.mark.parametrize("is_streamed", [True, False], indirect=True)
def test_weights_of_samples_are_chances_of_draws_and_resume_exactly(make_image, is_streamed):
    source = numbered("a", [30, 30], make_image())
    weights = (0.1, 0.5, 1.0)
    for samples in source.content.values():
        samples[:] = [replace(sample, weight=weights[int(sample.key) % 3]) for sample in samples]
    batches = take(load(source, batch_size=32), 100)
    counts = Counter(int(key) % 3 for _, key in names(batches))
    shares = [counts[kind] / counts.total() for kind in range(3)]
    assert shares == pytest.approx([weight / 1.6 for weight in weights], abs=0.02)
    assert len({key for _, key in names(batches) if int(key) % 3 == 1}) == 20, "each has its turn"
    resumed = take(load(source, batch_size=32, cursor=batches[39].cursor), 60)
    assert_same(resumed, batches[40:])


def test_equal_samples_of_two_sources_are_different_images(tmp_path, write_shards):
    write_shards(tmp_path / "a", [1])
    write_shards(tmp_path / "b", [1])
    batch = take(load(f"{tmp_path / 'a'},{tmp_path / 'b'}", batch_size=16), 1)[0].batch
    assert len(set(batch.image_ids.tolist())) == 2


def test_the_global_generator_is_left_alone(tmp_path, write_shards):
    folder = write_shards(tmp_path, [8])
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(load(folder, augmentation=Augmentation(), num_workers=1), 2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"num_workers": -1}, {"rank": 2, "world_size": 2}, {"seed": -1}]
)
def test_impossible_settings(make_image, options):
    with pytest.raises(ConfigError):
        load(numbered("a", [2], make_image()), **options)


def make_order(source, seed=3, rank=0, world_size=1, cursor=None):
    mixture = source if isinstance(source, Mixture) else Mixture((source,))
    return Order(mixture, seed=seed, rank=rank, world_size=world_size, cursor=cursor)


@pytest.mark.parametrize(("num_shards", "pieces"), [(1, 64), (5, 13), (64, 1), *slow((63, 2), (200, 1))])
def test_every_piece_is_read_once_per_epoch(num_shards, pieces):
    (pool,) = make_order(numbered("a", [600] * num_shards, b"")).pools
    assert pool.pieces_per_shard == pieces
    size = num_shards * pieces
    epochs = []
    for epoch in range(3):
        read = [pool.piece(slot) for slot in range(epoch * size, (epoch + 1) * size)]
        assert {piece.epoch for piece in read} == {epoch}
        epochs.append([(piece.shard, piece.pieces) for piece in read])
        assert set(epochs[-1]) == {(f"{i:04d}", (j, pieces)) for i in range(num_shards) for j in range(pieces)}
        assert len(epochs[-1]) == size
    assert epochs[0] != epochs[1] != epochs[2]


def test_samples_of_a_small_pool_are_pieces():
    """So an epoch has each of them once, however few there are."""
    (pool,) = make_order(numbered("a", [3, 0, 2], b"")).pools
    epochs = [[pool.piece(slot).item.key for slot in range(5 * e, 5 * e + 5)] for e in range(4)]
    assert all(sorted(epoch) == [f"{i:05d}" for i in range(5)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [pool.piece(slot).epoch for slot in (0, 4, 5, 19)] == [0, 0, 1, 3]


@pytest.mark.parametrize(("sizes", "is_small"), [([512], True), ([513], False), ([256, 257], False), ([1] * 64, False)])
def test_how_small_a_pool_is(sizes, is_small):
    source = numbered("a", sizes, b"12345678")
    (pool,) = make_order(source).pools
    assert (pool.items is not None) == is_small
    assert len(source.reads) <= 2 * 513


def test_a_pool_of_few_large_images_is_not_kept_in_memory(monkeypatch):
    monkeypatch.setattr("openblip.data.loader.SMALL_POOL_BYTES", 100)
    assert make_order(numbered("a", [12], b"12345678")).pools[0].items is not None
    assert make_order(numbered("a", [13], b"12345678")).pools[0].items is None


def test_the_seed_decides_the_order():
    shards = make_order(numbered("a", [1] * 100, b"")).pools[0].shards
    orders = [[Pool(0, shards, 64, seed).piece(slot).shard for slot in range(100)] for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]
    samples = [Pool(0, shards, 64, seed).sample_order(5, 0, 50) for seed in (3, 3, 4)]
    assert samples[0] == samples[1] != samples[2]
    assert sorted(samples[0]) == list(range(50)) != samples[0]


@pytest.mark.parametrize(
    ("world_size", "streams"), [(1, 64), (2, 64), (4, 64), (8, 64), (3, 24), (6, 48), (16, 128), (64, 512)]
)
def test_streams_are_divided_among_processes(world_size, streams):
    orders = [make_order(numbered("a", [1], b""), rank=r, world_size=world_size) for r in range(world_size)]
    assert sorted(stream for order in orders for stream in order.streams) == list(range(streams))


def test_first_blocks_are_small_and_later_ones_are_not():
    def sizes(stream):
        position, found = Position(stream, 0, 0), []
        while len(found) < 9:
            found.append(block_size(stream, position, 1, 1))
            position = position._replace(number=position.number + found[-1])
        return found

    assert sizes(0) == [4, 8, 16, 32, 64, 128, 256, 256, 256]
    assert sizes(7) == [32, 64, 128, 256, 256, 256, 256, 256, 256]
    assert block_size(0, Position(64, 0, 0), 1, 1) == 256
    assert block_size(0, Position(64, 0, 0), 1, 4) == 64


def test_weights_choose_the_pool():
    order = make_order(Mixture((numbered("a", [1], b""), numbered("b", [1], b"")), (0.8, 0.2)))
    chosen = Counter(order.choose_pool(s, row) for s in range(64) for row in range(100))
    assert 0.78 < chosen[0] / 6400 < 0.82


def test_a_mixture_without_weights_is_one_pool():
    order = make_order(Mixture((numbered("a", [1, 1], b""), numbered("b", [1], b""))))
    assert [[source.name for source, _ in pool.shards] for pool in order.pools] == [["a", "a", "b"]]


def test_a_cursor_of_other_data_is_refused():
    source = numbered("a", [3, 3, 3], b"")
    order = make_order(source)
    cursor = json.loads(json.dumps(order.cursor(0, order.positions)))
    with pytest.raises(ConfigError, match="seed was 3, is 4"):
        make_order(source, seed=4, cursor=cursor)
    with pytest.raises(ConfigError, match="shards was"):
        make_order(numbered("a", [3, 3], b""), cursor=cursor)
    with pytest.raises(ConfigError, match="weights was None"):
        make_order(Mixture((source,), (1.0,)), cursor=cursor)


def test_a_cursor_serves_processes_that_divide_its_streams():
    source = numbered("a", [3], b"")
    orders = [make_order(source, rank=r, world_size=2) for r in range(2)]
    cursors = [order.cursor(0, order.positions) for order in orders]
    with pytest.raises(ConfigError, match="one process of several"):
        make_order(source, cursor=cursors[0])
    joined = join_cursors(cursors)
    assert make_order(source, cursor=joined).cursor(0, make_order(source).positions) == joined
    assert len(make_order(source, rank=15, world_size=16, cursor=joined).streams) == 4
    with pytest.raises(ConfigError, match=r"64 streams .* cannot go on with 3 processes"):
        make_order(source, world_size=3, cursor=joined)
    with pytest.raises(ConfigError, match="draw was"):
        join_cursors([cursors[0], orders[1].cursor(8, orders[1].positions)])


def children():
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {int(pid) for pid in listing.stdout.split()}


def test_closing_ends_the_workers(tmp_path, write_shards):
    folder = write_shards(tmp_path, [30])
    iterator = iter(load(folder, num_workers=2))
    before = children()
    next(iterator)
    assert len(children() - before) >= 2
    iterator.close()
    deadline = time.monotonic() + 60
    while len(children() - before) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children() - before) <= 1  # `ps` itself


SCRIPT = """
import json, signal, sys, time
sys.path.insert(0, sys.argv[1])
from memory_source import load, names
from openblip.data import loader
ending, source, log = sys.argv[2:]
cursor = None
if ending == "kill":
    loader.SMALL_POOL_SAMPLES = 0
    try:
        lines = [line for line in open(log).read().splitlines(True) if line.endswith("\\n")]
    except FileNotFoundError:
        lines = []
    open(log, "w").write("".join(lines))
    cursor = json.loads(lines[-1])["cursor"] if lines else None
interrupts = []  # as a training does: an exception at any moment would also be met where Python ignores it
signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
print("running", flush=True)
for n, loaded in enumerate(load(source, num_workers=2, batch_size=8, cursor=cursor)):
    if ending == "kill":
        with open(log, "a") as file:
            file.write(json.dumps({"names": names([loaded]), "cursor": loaded.cursor}) + "\\n")
    if n == 3:
        print("in the middle", flush=True)
        if ending == "exit":
            sys.exit(0)
    if interrupts:
        raise KeyboardInterrupt
    time.sleep(0.01)
"""


def run_script(ending, source, log=""):
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), ending, str(source), str(log)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["exit", "interrupt", "orphan"])
def test_the_process_ends_without_hanging_or_noise_of_workers(tmp_path, write_shards, ending):
    process = run_script(ending, write_shards(tmp_path, [30]))
    assert process.stdout.readline() == "running\n"
    assert process.stdout.readline() == "in the middle\n"
    if ending == "interrupt":
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the workers, too
    if ending == "orphan":
        process.kill()  # it alone; the pipes close when its workers have ended too
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == (ending == "interrupt")
    if ending == "orphan":
        return
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no process of the group is left


@pytest.fixture
def silent_deaths():
    """Workers may die without torch's handler, which raises in whatever runs at that moment, in pytest too."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, handler)


@pytest.mark.slow
def test_workers_end_when_they_are_told_to_and_not_with_a_training_that_stops(tmp_path, write_shards, request):
    loader = load(write_shards(tmp_path, [30]), num_workers=2)
    batches = iter(loader)
    next(batches)
    request.getfixturevalue("silent_deaths")  # now that torch has set its handler
    worker, other = multiprocessing.active_children()
    loader.state.value = loader_module.STOPPING  # the signal is the whole group's
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(2)
    assert worker.is_alive()
    assert len(next(batches).batch) == 4
    loader.state.value = loader_module.RUNNING
    os.kill(other.pid, signal.SIGTERM)
    other.join(60)
    assert not other.is_alive()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        for _ in batches:
            pass
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_worker_that_is_stuck_does_not_keep_the_loader_from_closing(tmp_path, write_shards, monkeypatch):
    samples = iter(range(4))
    monkeypatch.setattr(ImageTextProcessor, "__call__", stall_when(lambda: next(samples, None) is None))
    batches = iter(load(write_shards(tmp_path, [30]), num_workers=1))
    next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 60  # the worker hangs for longer
    assert multiprocessing.active_children() == []


def stall_when(is_over):
    """A sample processor that hangs from some sample on, as reading from a lost network drive does."""
    process = ImageTextProcessor.__call__

    def process_or_hang(*arguments):
        if is_over():
            time.sleep(600)
        return process(*arguments)

    return process_or_hang


def test_memory_that_cannot_be_shared_is_said(tmp_path, write_shards, monkeypatch):
    def fail(pixels):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(OpenBlipError, match=r"No space left.*--data\.num-workers"):
        take(load(write_shards(tmp_path, [30]), num_workers=1), 1)


@pytest.mark.slow
def test_killed_at_random_moments_the_sequence_is_that_of_an_uninterrupted_run(tmp_path, write_shards, no_small_pools):
    folder = write_shards(tmp_path / "data", [40, 25, 60], corrupt={"00012": b"bad"})
    log = tmp_path / "log.jsonl"
    moments = random.Random(0)
    for _ in range(3):
        process = run_script("kill", folder, log)
        assert process.stdout.readline() == "running\n"
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    lines = [json.loads(line) for line in log.read_text().splitlines(True) if line.endswith("\n")]
    assert len(lines) >= 12  # four of each run
    whole = take(load(folder, batch_size=8), len(lines))
    assert [[tuple(name) for name in line["names"]] for line in lines] == [names([batch]) for batch in whole]
