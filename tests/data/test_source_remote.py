"""What is fetched of remote shards."""

import json
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_files import read_all, write_lines
from counting_files import CountingFile, CountingFileSystem

from openblip.data.sources import open_source, storage
from openblip.errors import SourceError
from source_items import items_of

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "_BLOCK_BYTES", MIB)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    CountingFileSystem.reset()


@pytest.fixture
def tar(tmp_path, write_tar):
    """200 samples, 10 MB."""
    samples = [(f"{n:03d}", bytes([n]) * 50_000, json.dumps({"caption": f"text {n}"}).encode()) for n in range(200)]
    members = [member for key, image, text in samples for member in ((f"{key}.jpg", image), (f"{key}.json", text))]
    return write_tar(tmp_path / "shards" / "0000.tar", members)


def test_a_tar_is_fetched_once_in_few_requests(tar):
    local = read_all(tar)
    assert [s.image for s in read_all(f"counting://{tar}")[0]] == [s.image for s in local[0]]
    assert CountingFileSystem.num_bytes <= tar.stat().st_size
    assert CountingFileSystem.num_requests <= tar.stat().st_size // MIB + 1


def test_a_parquet_file_is_fetched_once_in_few_requests(tmp_path):
    rows = {"image": [bytes([n]) * 50_000 for n in range(200)], "caption": [f"text {n}" for n in range(200)]}
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(rows), path, row_group_size=100, compression="none", use_dictionary=False)
    source = open_source(f"counting://{path}")
    CountingFileSystem.reset()
    assert len(items_of(source)) == 200
    assert CountingFileSystem.num_bytes <= 1.4 * path.stat().st_size  # at most two blocks a row group twice
    assert CountingFileSystem.num_requests <= path.stat().st_size // MIB + 6


def test_large_payloads_that_are_not_wanted_are_not_fetched(tmp_path, write_tar):
    members = [member for n in range(5) for member in ((f"{n}.mp4", bytes(8 * MIB)), (f"{n}.json", b"{}"))]
    source = open_source(f"counting://{write_tar(tmp_path / 'videos.tar', members)}")
    assert len(items_of(source, images=False)) == 5
    assert CountingFileSystem.num_bytes <= 12 * MIB


def test_pieces_are_read_of_one_local_copy(tar, tmp_path):
    source = open_source(f"counting://{tar}")
    numbers = [n for j in range(8) for n, _ in source.read("0000", pieces=(j, 8))]
    assert sorted(numbers) == list(range(200))
    assert CountingFileSystem.num_bytes <= tar.stat().st_size
    (copy,) = tmp_path.glob("openblip-shards-*/*.shard")
    assert copy.read_bytes() == tar.read_bytes()


def test_several_readers_make_one_copy(tar):
    path = f"counting://{tar}"
    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(lambda _: storage.open_copied(path).read(), range(8))} == {tar.read_bytes()}
    assert CountingFileSystem.num_bytes <= tar.stat().st_size


def test_a_changed_file_is_copied_anew(tar):
    path = f"counting://{tar}"
    assert storage.open_copied(path).read() == tar.read_bytes()
    tar.write_bytes(b"x" * tar.stat().st_size)
    assert storage.open_copied(path).read() == tar.read_bytes()


def test_copies_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_COPIES_BYTES", 2500)
    for number in range(4):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]) * 1000)
        assert storage.open_copied(f"counting://{tmp_path}/{number}.tar").read() == bytes([number]) * 1000
    copies = [path.read_bytes()[:1] for path in tmp_path.glob("openblip-shards-*/*.shard")]
    assert sorted(copies) == [b"\2", b"\3"]
    (tmp_path / "large.tar").write_bytes(b"x" * 3000)
    assert storage.open_copied(f"counting://{tmp_path}/large.tar").read() == b"x" * 3000
    assert len([*tmp_path.glob("openblip-shards-*/*.shard")]) == 2


def test_many_names_are_not_looked_for_one_by_one(tar, tmp_path, monkeypatch):
    for number in range(40):
        (tmp_path / f"{number:02d}.tar").touch()
    asked = []
    monkeypatch.setattr(CountingFileSystem, "exists", lambda self, path: asked.append(path) or path.endswith("0.tar"))
    source = open_source(f"counting://{tmp_path}/{{00..30}}.tar")
    assert len(source.shards()) == 31
    assert len(asked) == 2
    with pytest.raises(SourceError, match="no such file"):
        open_source(f"counting://{tmp_path}/{{00..31}}.tar")


def test_images_of_a_remote_table_come_in_order(tmp_path, make_image):
    names = [f"{number}.jpg" for number in range(100)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(make_image(number))
    (tmp_path / "7.jpg").unlink()
    write_lines(tmp_path / "t.jsonl", [*({"image": name, "caption": name} for name in names), "{broken"])
    (shard,) = (source := open_source(f"counting://{tmp_path}/t.jsonl")).shards()
    read = list(source.read(shard))
    assert [located.number for located in read] == list(range(101))
    images = [located.item.image for located in read if located.number not in (7, 100)]
    assert images == [make_image(number) for number in range(100) if number != 7]
    assert "7.jpg" in read[7].item.reason


def test_what_a_client_library_raises_is_an_error_of_the_shard(tar, monkeypatch):
    source = open_source(f"counting://{tar}")

    def fail(self, start, end):
        raise RuntimeError("denied")

    monkeypatch.setattr("counting_files.CountingFile._fetch_range", fail)
    with pytest.raises(SourceError, match=r"cannot be read.*denied"):
        items_of(source)


def test_lines_of_a_remote_table_are_read_many_at_once(tmp_path, monkeypatch):
    """A file of fsspec copies a block for every line."""
    reads = []
    read = CountingFile.read
    monkeypatch.setattr(CountingFile, "read", lambda file, size=-1: reads.append(size) or read(file, size))
    path = tmp_path / "t.csv"
    path.write_text("image,caption\n" + "".join(f"{n}.jpg,a dog in the garden\n" for n in range(1000)))
    source = open_source(f"counting://{path}")
    assert len(items_of(source, images=False)) == 1000
    assert len(reads) < 10


def test_no_more_than_the_limit_is_fetched_of_a_file_that_a_row_names(tmp_path, make_image, monkeypatch):
    for name in ("a.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(make_image(1))
    (tmp_path / "large.jpg").write_bytes(bytes(50 << 20))
    write_lines(tmp_path / "t.jsonl", [{"image": name, "caption": "a"} for name in ("a.jpg", "large.jpg", "c.jpg")])
    monkeypatch.setattr(storage.read_bytes, "__defaults__", (100_000,))
    (shard,) = (source := open_source(f"counting://{tmp_path}/t.jsonl")).shards()
    CountingFileSystem.reset()
    first, large, last = [located.item for located in source.read(shard)]
    assert first.image == last.image == make_image(1)
    assert "more than the limit of 100000 bytes" in large.reason
    assert CountingFileSystem.num_bytes < 20 << 20
