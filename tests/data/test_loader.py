import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from openblip.data.batch import ImageTextProcessor
from openblip.data.loader import Loader
from openblip.data.sources import Mixture, ShardIndex, open_mixture
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Augmentation, Preprocessing
from openblip.errors import ConfigError, SourceError

TOKENIZER = Tokenizer.train(["sample text 0123456789"], 150)


def load(spec, **options):
    settings = {
        "processor": ImageTextProcessor(),
        "batch_size": 4,
        "seed": 3,
        "shuffle_window_shards": 2,
    } | options
    return Loader(
        open_mixture(str(spec)), tokenizer=TOKENIZER, preprocessing=Preprocessing(image_size=8), **settings
    )


def take(loader, num_batches):
    return list(itertools.islice(loader, num_batches))


def keys(batches):
    return [key for loaded in batches for key in loaded.batch.keys]


def assert_same(left, right):
    assert [b.batch.keys for b in left] == [b.batch.keys for b in right]
    assert [b.batch.captions for b in left] == [b.batch.captions for b in right]
    assert [b.cursor for b in left] == [b.cursor for b in right]
    assert [b.rejects for b in left] == [b.rejects for b in right]
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.batch.pixels, b.batch.pixels)
        assert torch.equal(a.batch.tokens.ids, b.batch.tokens.ids)
        assert torch.equal(a.batch.image_ids, b.batch.image_ids)


def test_batch_shapes(tmp_path, write_shards):
    batch = take(load(write_shards(tmp_path, [6])), 1)[0].batch
    assert len(batch) == 4
    assert batch.pixels.shape == (4, 3, 8, 8)
    assert batch.pixels.dtype == torch.uint8
    assert batch.image_ids.dtype == torch.int64
    assert (batch.image_ids >= 0).all()
    assert len(set(batch.image_ids.tolist())) == 4
    assert batch.shards == ["0000"] * 4
    assert torch.equal(batch.tokens.ids, TOKENIZER.encode(batch.captions).ids)
    assert batch.to("cpu").keys == batch.keys


def test_an_epoch_is_every_sample_once_in_an_order_of_its_own(tmp_path, write_shards):
    folder = write_shards(tmp_path, [3, 4, 1, 2, 2])
    drawn = keys(take(load(folder), 9))
    everything = [f"{i:05d}" for i in range(12)]
    epochs = [drawn[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != everything
    assert keys(take(load(folder), 9)) == drawn
    assert keys(take(load(folder, seed=4), 9)) != drawn


def test_small_sources_fill_large_batches(tmp_path, write_shards):
    batches = take(load(write_shards(tmp_path, [10]), batch_size=64), 2)
    counts = Counter(keys(batches[:1]))
    assert sum(counts.values()) == 64
    assert set(counts.values()) == {6, 7}
    assert len(batches[1].batch) == 64


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_gives_exactly_the_remaining_batches(
    tmp_path, write_shards, write_tar, make_image, num_workers
):
    write_shards(tmp_path / "a", [5, 3, 4], corrupt={"00002": b"no picture", "00009": b""}, num_captions=3)
    write_shards(tmp_path / "b", [7], num_captions=3)
    odd = [("x.txt", b"no image")]  # rejected by the index, once per epoch
    for i in range(6):
        odd += [(f"{i}.jpg", make_image(i)), (f"{i}.txt", b"odd")]
    write_tar(tmp_path / "a" / "odd.tar", odd)
    spec = f"{tmp_path / 'a'}@0.7,{tmp_path / 'b'}@0.3"
    options = {"augmentation": Augmentation(), "batch_size": 5}
    whole = take(load(spec, **options), 12)  # about three epochs
    for done in (1, 5, 11):
        cursor = json.loads(json.dumps(whole[done - 1].cursor))
        resumed = take(load(spec, cursor=cursor, num_workers=num_workers, **options), 12 - done)
        assert_same(resumed, whole[done:])


def test_workers_change_nothing(tmp_path, write_shards):
    folder = write_shards(tmp_path, [20, 30], corrupt={"00007": b"x"}, num_captions=2)
    plain = take(load(folder, augmentation=Augmentation()), 15)
    assert_same(take(load(folder, augmentation=Augmentation(), num_workers=2), 15), plain)


def test_resuming_reads_nothing_that_was_consumed(tmp_path, write_shards):
    folder = write_shards(tmp_path, [40])
    whole = take(load(folder), 10)
    read = []

    class Spy:
        def __init__(self, record):
            self.record, self.key, self.shard = record, record.key, record.shard

        def read(self):
            read.append(self.key)
            return self.record.read()

    class SpySource:
        def __init__(self, source):
            self.name, self.shards, self.source = source.name, source.shards, source

        def index(self, shard):
            found = self.source.index(shard)
            return ShardIndex([Spy(record) for record in found.records], found.rejects)

    loader = load(folder, cursor=whole[6].cursor)
    loader.mixture = Mixture((SpySource(loader.mixture.sources[0]),), (1.0,))
    take(loader, 3)
    assert read == keys(whole[7:10])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_are_one_rank_with_a_larger_batch(tmp_path, write_shards, world_size):
    write_shards(tmp_path / "a", [5, 6, 7])
    write_shards(tmp_path / "b", [4])
    spec = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    one = take(load(spec, batch_size=4 * world_size), 5)
    ranks = [take(load(spec, rank=rank, world_size=world_size), 5) for rank in range(world_size)]
    for step, joint in enumerate(one):
        together = [list(zip(*(r[step].batch.shards, r[step].batch.keys), strict=True)) for r in ranks]
        interleaved = [pair for pairs in zip(*together, strict=True) for pair in pairs]
        assert interleaved == list(zip(joint.batch.shards, joint.batch.keys, strict=True))
        assert all(r[step].cursor == joint.cursor for r in ranks)


def test_views_and_captions_depend_on_the_sample_alone(tmp_path, write_shards):
    folder = write_shards(tmp_path, [6, 6], num_captions=5)
    one = take(load(folder, augmentation=Augmentation(), batch_size=12), 1)[0].batch
    two = [
        take(load(folder, augmentation=Augmentation(), batch_size=3, rank=rank, world_size=2), 2)
        for rank in (0, 1)
    ]
    where = {key: i for i, key in enumerate(one.keys)}
    for loaded in two[0] + two[1]:
        for i, key in enumerate(loaded.batch.keys):
            assert loaded.batch.captions[i] == one.captions[where[key]]
            assert torch.equal(loaded.batch.pixels[i], one.pixels[where[key]])


def test_every_caption_of_a_sample_is_used_over_the_epochs(tmp_path, write_shards):
    folder = write_shards(tmp_path, [2], num_captions=3)
    captions = {
        caption for loaded in take(load(folder, batch_size=2), 30) for caption in loaded.batch.captions
    }
    assert captions == {f"sample {n} text {i}" for n in (0, 1) for i in range(3)}


def test_rejects_are_skipped_counted_and_named(tmp_path, write_tar, write_shards, make_image):
    corrupt = {"00001": b"", "00003": b"text", "00004": make_image(size=(300, 300))[:-100]}
    write_shards(tmp_path, [8], corrupt=corrupt)
    write_tar(
        tmp_path / "odd.tar",
        [
            ("a.jpg", make_image()),
            ("b.jpg", make_image()),
            ("b.txt", b"!!!"),
            ("c.txt", b"no image"),
            ("d.jpg", b"x"),
        ],
    )
    batches = take(load(tmp_path, batch_size=5, shuffle_window_shards=5), 1)
    assert len(batches[0].batch) == 5
    assert sorted(batches[0].batch.keys) == ["00000", "00002", "00005", "00006", "00007"]
    rejects = {(r.shard, r.key): r.reason for r in batches[0].rejects}
    later = take(load(tmp_path, batch_size=5, cursor=batches[0].cursor, shuffle_window_shards=5), 1)[
        0
    ].rejects
    rejects |= {(r.shard, r.key): r.reason for r in later}
    assert set(rejects) == {("0000", k) for k in corrupt} | {("odd", k) for k in "abcd"}
    assert rejects["odd", "a"] == rejects["odd", "b"] == "no caption"
    assert "empty" in rejects["0000", "00001"]
    assert "no image" in rejects["odd", "c"]


def test_shard_rejects_come_once_per_epoch_and_from_rank_0(tmp_path, write_tar, make_image):
    members = [("a.jpg", make_image()), ("a.txt", b"a"), ("a.jpg", make_image())]
    write_tar(tmp_path / "s.tar", members)
    ranks = [take(load(tmp_path, batch_size=2, rank=rank, world_size=2), 2) for rank in (0, 1)]
    assert sum(len(loaded.rejects) for loaded in ranks[0]) == 8  # eight epochs of one sample
    assert sum(len(loaded.rejects) for loaded in ranks[1]) == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_source_without_usable_samples_raises(tmp_path, write_shards, write_tar, num_workers):
    folder = write_shards(tmp_path / "all", [3, 3], corrupt={f"{i:05d}": b"bad" for i in range(6)})
    with pytest.raises(SourceError, match=r"no sample can be used.*0000"):
        take(load(folder, num_workers=num_workers), 1)
    write_tar(tmp_path / "none" / "a.tar", [("a.txt", b"x")])
    with pytest.raises(SourceError, match=r"no usable sample; a/a: no image"):
        take(load(tmp_path / "none", num_workers=num_workers), 1)


def test_mixture_weights_are_draw_probabilities(tmp_path, write_shards):
    write_shards(tmp_path / "a", [2])
    write_shards(tmp_path / "b", [50])
    loader = load(f"{tmp_path / 'a'}@0.8,{tmp_path / 'b'}@0.2", batch_size=200)
    counts = Counter(key in ("00000", "00001") for key in keys(take(loader, 4)))
    assert 0.72 < counts[True] / 800 < 0.9


def test_equal_samples_of_two_sources_are_different_images(tmp_path, write_shards):
    write_shards(tmp_path / "a", [1])
    write_shards(tmp_path / "b", [1])
    batch = take(load(f"{tmp_path / 'a'},{tmp_path / 'b'}", batch_size=16), 1)[0].batch
    assert len(set(batch.image_ids.tolist())) == 2


def test_a_cursor_of_other_data_is_refused(tmp_path, write_shards):
    folder = write_shards(tmp_path, [3, 3, 3])
    cursor = take(load(folder), 1)[0].cursor
    with pytest.raises(ConfigError, match="seed was 3, is 4"):
        take(load(folder, seed=4, cursor=cursor), 1)
    (folder / "0002.tar").unlink()
    with pytest.raises(ConfigError, match="num_shards"):
        take(load(folder, cursor=cursor), 1)


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
def test_impossible_settings(tmp_path, write_shards, options):
    with pytest.raises(ConfigError):
        take(load(write_shards(tmp_path, [2]), **options), 1)


def children():
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {int(pid) for pid in found.stdout.split()}


def test_closing_ends_the_workers(tmp_path, write_shards):
    folder = write_shards(tmp_path, [30])
    iterator = iter(load(folder, num_workers=2))
    before = children()
    next(iterator)
    assert len(children() - before) >= 2
    iterator.close()
    deadline = time.monotonic() + 10
    while len(children() - before) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children() - before) <= 1  # `ps` itself


SCRIPT = """
import sys, time
from openblip.data.batch import ImageTextProcessor
from openblip.data.loader import Loader
from openblip.data.sources import open_mixture
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
loader = Loader(open_mixture(sys.argv[1]), processor=ImageTextProcessor(),
                tokenizer=Tokenizer.train(["sample text"], 150),
                preprocessing=Preprocessing(image_size=8), batch_size=4, seed=0, num_workers=2)
for n, loaded in enumerate(loader):
    if n == 3:
        print("running", flush=True)
        if sys.argv[2] == "exit":
            sys.exit(0)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("ending", ["exit", "interrupt"])
def test_the_process_ends_without_hanging_or_noise_of_workers(tmp_path: Path, write_shards, ending):
    folder = write_shards(tmp_path, [30])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "running\n"
    if ending == "interrupt":
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the workers, too
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == (ending == "interrupt")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of the group is left
