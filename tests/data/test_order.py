"""The order of samples: which pieces of shards a stream reads, in which blocks, and what a cursor says."""

import json
from collections import Counter

import pytest
from memory_source import numbered

from marks import slow
from openblip.data.loader import Order, Pool, Position, block_size, join_cursors
from openblip.data.sources import Mixture
from openblip.errors import ConfigError


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
