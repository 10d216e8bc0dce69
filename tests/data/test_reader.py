"""The ordered pass: everything once and in order, read ahead, shared, limited, with rejects in their places."""

import itertools
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from memory_source import MemorySource, numbered

from openblip.data.reader import in_batches, read_ahead, read_source, texts_of_sources
from openblip.data.sample import Located, Reject, Sample
from openblip.data.sources import Mixture, open_source
from openblip.errors import ImageError, SourceError
from source_items import items_of


def sample(key, shard="s", texts=("a",)):
    return Sample(key, shard, b"image", texts, f"{shard}/{key}")


@pytest.fixture
def source():
    """Samples 0 to 4, a reject of the structure between them, and two more in another shard."""
    first = [sample("0"), Reject("s", "x", "broken"), *(sample(str(i)) for i in (1, 2, 3, 4))]
    return MemorySource("memory", {"s": first, "t": [sample("5", "t"), sample("6", "t")]})


class Unreadable(MemorySource):
    """The image of sample 2 is missing; the text of a sample says so before."""

    def read_selected(self, shard, selection):
        for number, item in super().read_selected(shard, selection):
            is_missing = isinstance(item, Sample) and item.key == "2" and selection.images
            yield Located(number, Reject(shard, "2", "no such file") if is_missing else item)


def key_of(entry):
    return entry.key if isinstance(entry, Reject) else entry[0].key


def keys(entries):
    return [key_of(entry) for entry in entries]


def test_all_samples_in_order_with_what_was_prepared(source):
    entries = list(read_source(source, lambda s: s.key * 2))
    assert keys(entries) == ["0", "x", "1", "2", "3", "4", "5", "6"]
    assert entries[1] == Reject("s", "x", "broken")
    assert entries[2] == (sample("1"), "11")
    assert keys(read_source(source, len_of, shards=["t"])) == ["5", "6"]


def len_of(item):
    return len(item.image)


@pytest.mark.parametrize("error", [SourceError("bad"), ImageError("bad"), FileNotFoundError(2, "bad")])
def test_what_cannot_be_prepared_is_a_reject(source, error):
    def prepare(item):
        if item.key == "3":
            raise error

    (reject,) = [e for e in read_source(source, prepare) if isinstance(e, Reject) and e.key == "3"]
    assert "bad" in reject.reason


@pytest.mark.parametrize("error", [ConnectionError(), OSError(5, "disk"), RuntimeError("a bug")])
def test_errors_of_the_machine_are_raised_at_their_place(source, error):
    def prepare(item):
        if item.key == "3":
            raise error

    entries = read_source(source, prepare)
    assert keys(itertools.islice(entries, 4)) == ["0", "x", "1", "2"]
    with pytest.raises(type(error)):
        next(entries)


def test_errors_of_a_shard_are_raised_at_their_place(source):
    source.content["t"] = [sample("5", "t"), SourceError("t: cannot be read")]
    entries = read_source(source, len_of)
    assert keys(itertools.islice(entries, 7)) == ["0", "x", "1", "2", "3", "4", "5"]
    with pytest.raises(SourceError, match="cannot be read"):
        next(entries)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 4])
def test_shares_interleave_to_the_whole(source, count, limit):
    source = Unreadable("memory", source.content)
    whole = keys(read_source(source, len_of, limit=limit))
    assert whole == ["0", "x", "1", "2", "3", "4", "5", "6"][: 8 if limit is None else 5]
    for index in range(count):
        share = (index, count)
        assert keys(read_source(source, len_of, share=share, limit=limit)) == whole[index::count]


def test_images_of_other_shares_and_of_skipped_samples_are_not_read(source):
    assert keys(read_source(source, len_of, share=(0, 4))) == ["0", "3"]
    assert source.reads == [("s", 0), ("s", 1), ("s", 4)]  # the reject is counted by every process
    source.reads.clear()
    entries = read_source(source, len_of, skip=lambda shard, key: (shard, key) != ("t", "6"))
    assert keys(entries) == ["x", "6"]
    assert source.reads == [("s", 1), ("t", 1)]


def test_the_limit_ends_the_reading(source):
    source.content["t"] = [SourceError("never opened")]
    assert keys(read_source(source, len_of, limit=4)) == ["0", "x", "1", "2", "3"]


def test_it_reads_ahead_and_not_further():
    source = numbered("a", [100], b"")
    entries = read_source(source, len_of, ahead=10)
    next(entries)
    deadline = time.monotonic() + 60
    while len(source.reads) < 11 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(source.reads) == 11  # ten wait prepared, and one waits for its place
    entries.close()
    assert not reading_threads()


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("openblip-read")]


def test_batches_hold_samples_of_equal_length_and_the_rejects_among_them(source):
    lengths = {"1": 2, "2": 2, "3": 2, "4": 5}
    batches = list(in_batches(read_source(source, lambda s: lengths.get(s.key, 1)), 4, frames=lambda length: length))
    found = [([item.key for item, _ in batch.samples], [reject.key for reject in batch.rejects]) for batch in batches]
    assert found == [(["0"], ["x"]), (["1", "2"], []), (["3"], []), (["4"], []), (["5", "6"], [])]
    assert [len(b.samples) for b in in_batches(read_source(source, len_of), 3)] == [3, 3, 1]
    rejects = MemorySource("r", {"s": [Reject("s", str(n), "broken") for n in range(5)]})
    assert [len(b.rejects) for b in in_batches(read_source(rejects, len_of), 2)] == [2, 2, 1], "named without delay"
    assert not reading_threads()


def test_nested_reading_ends_its_threads_when_it_is_left_or_fails():
    source = numbered("a", [100], b"")

    def prepare(item):
        if int(item.key) == 50:
            raise RuntimeError("a bug")

    for leave in (True, False):
        batches = read_ahead(
            in_batches(read_source(source, prepare), 4), lambda b: len(b.samples), num_workers=1, ahead=1
        )
        assert next(batches) == 4
        assert reading_threads()
        if leave:
            batches.close()
        else:
            with pytest.raises(RuntimeError, match="a bug"):
                list(batches)
        assert not reading_threads()


def test_texts_are_read_without_images(source):
    other = MemorySource("other", {"u": [sample("7", "u", ("b", "c")), sample("8", "u", ("d",))]})
    mixture = Mixture((source, other))
    assert list(texts_of_sources(mixture, lambda s: s.captions, 100)) == ["a"] * 7 + ["b", "c", "d"]
    assert list(texts_of_sources(mixture, lambda s: s.captions, 6)) == ["a"] * 3 + ["b", "c", "d"]

    def without_text(item):
        raise SourceError("no text")

    assert list(texts_of_sources(mixture, without_text, 6)) == []


def test_a_real_source_counts_as_the_one_in_memory(tmp_path, write_tar, make_image):
    """Rejects of the structure come whoever reads, and duplicates stand after their sample."""
    members = [("a.jpg", make_image()), ("a.jpg", make_image()), ("a.txt", b"a"), ("b.txt", b"b")]
    members += [(f"{i}.{kind}", make_image(i)) for i in range(5) for kind in ("jpg", "txt")]
    write_tar(tmp_path / "s.tar", members)
    from openblip.data.sources import open_source

    tar = open_source(str(tmp_path))
    whole = [(item.key, isinstance(item, Reject)) for item in items_of(tar)]
    shares = [list(read_source(tar, len_of, share=(index, 3))) for index in range(3)]
    for index in range(3):
        assert [(key_of(e), isinstance(e, Reject)) for e in shares[index]] == whole[index::3]


@pytest.mark.parametrize("path", ["{}/t.parquet", "memory://shares/t.csv"])
def test_shares_and_limits_of_sources_that_read_several_samples_together(tmp_path, path):
    """What was counted is read, by one process alone."""
    table = pa.table({"image": [b"x"] * 50, "caption": [str(n) for n in range(50)]})
    pq.write_table(table, tmp_path / "t.parquet")
    remote = MemoryFileSystem()
    remote.pipe({f"/shares/{n}.jpg": b"x" for n in range(50)})
    remote.pipe("/shares/t.csv", "\n".join(["image,caption", *(f"{n}.jpg,{n}" for n in range(50))]).encode())
    source = open_source(path.format(tmp_path))

    def captions(**options):
        return [int(sample.captions[0]) for sample, _ in read_source(source, lambda sample: None, **options)]

    assert captions(limit=40) == list(range(40))
    assert [captions(share=(i, 2)) for i in range(2)] == [list(range(0, 50, 2)), list(range(1, 50, 2))]
