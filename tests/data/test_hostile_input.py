"""Hostile input: what is damaged, endless, too large or too deep is a reject with a reason, and costs nothing else."""

import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from openblip.data import sample as samples
from openblip.data.images import read_image
from openblip.data.reader import read_source
from openblip.data.sample import Reject
from openblip.data.sources import open_source, storage
from openblip.errors import ImageError, SourceError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.fuzz import HTML, SVG, fuzz, png, png_bomb  # noqa: E402


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, *members: tuple[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def read(spec: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Captions and reasons by key."""
    read_whole, rejects = dict[str, Any](), dict[str, str]()
    for entry in read_source(open_source(spec), lambda sample: read_image(sample.image, name=sample.key)):
        if isinstance(entry, Reject):
            rejects[entry.key] = entry.reason
        else:
            read_whole[entry[0].key] = entry[0].captions
    return read_whole, rejects


def test_mutated_inputs_of_every_source() -> None:
    tally = fuzz(120, seed=20_261)
    assert tally.violations == []
    assert sum(tally.outcomes.values()) == 120
    assert len({kind for kind, _ in tally.outcomes}) == 12


def test_pickles_in_data_are_never_loaded(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "loaded"),))

    payload = pickle.dumps(Exploit())
    members = [(f"a.{ending}", payload) for ending in ("pkl", "pyd", "pickle", "npy", "pth")]
    spec = write_tar(tmp_path / "0.tar", ("a.jpg", jpeg()), ("a.txt", b"a dog"), *members, ("b.jpg", payload))
    kinds = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    schema = pa.schema([pa.field("image", pa.binary()), pa.field("caption", pa.string(), metadata=kinds)])
    pq.write_table(pa.table({"image": [jpeg()], "caption": ["a dog"]}, schema=schema), tmp_path / "1.parquet")
    assert read(spec)[0] == {"a": ("a dog",)}
    assert [*read(str(tmp_path / "1.parquet"))[0].values()] == [("a dog",)]
    assert not (tmp_path / "loaded").exists()


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (HTML, "a web page"),
        (SVG, "a drawing in SVG"),
        (b"PK\3\4rest", "a zip archive"),
        (png(70_000, 70_000), "limit|damaged image header"),
        (png_bomb(13_000, 13_800), "limit|damaged image header"),
        (jpeg()[:300], "damaged"),
    ],
)
def test_what_is_no_image_says_so(payload: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        read_image(payload)


def test_devices_pipes_and_links_to_themselves_are_rejects(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(jpeg())
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    (tmp_path / "good.txt").write_bytes(b"a dog")
    captions, rejects = read(str(tmp_path))
    assert captions == {"good": ("a dog",)}
    assert rejects.keys() == {"pipe", "zero", "loop"}
    assert all("not a plain file" in rejects[key] for key in ("pipe", "zero"))
    rows = [
        {"image": name, "caption": name} for name in ("/dev/zero", "file:///dev/zero", "/proc/self/mem", "good.jpg")
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    captions, rejects = read(str(tmp_path / "pairs.jsonl"))
    assert [*captions.values()] == [("good.jpg",)]
    assert len(rejects) == 3


def test_what_is_too_large_or_too_deep_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MOST_TEXT_BYTES", 500_000)
    monkeypatch.setattr(storage, "MOST_FILE_BYTES", 100_000)
    deep = b'{"caption": "x", "a": ' + b"[" * 100 + b"]" * 100 + b"}"
    texts = {
        "deep": deep, "many": json.dumps({"caption": ["a dog"] * 1001}).encode(),
        "long": json.dumps({"caption": "a" * 100_001}).encode(), "huge": b'{"caption": "' + b"a" * 600_000 + b'"}',
        "good": b'{"caption": "a dog"}',
    }  # fmt: skip
    members = [pair for key, text in texts.items() for pair in ((f"{key}.jpg", jpeg()), (f"{key}.json", text))]
    members += [("big.jpg", jpeg() + bytes(200_000)), ("big.txt", b"a dog")]
    captions, rejects = read(write_tar(tmp_path / "0.tar", *members))
    assert captions == {"good": ("a dog",)}
    for key, reason in {"deep": "64 levels", "many": "1001", "long": "100001", "huge": "limit", "big": "limit"}.items():
        assert reason in rejects[key]


def test_a_line_without_an_end_is_one_broken_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MOST_TEXT_BYTES", 1000)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    row = b'{"image": "a.jpg", "caption": "a dog"}\n'
    (tmp_path / "pairs.jsonl").write_bytes(row + b'{"caption": "' + b"a" * 5000 + b'"}\n' + row.replace(b"dog", b"cat"))
    captions, rejects = read(str(tmp_path / "pairs.jsonl"))
    assert [*captions.values()] == [("a dog",), ("a cat",)]
    assert [reason.rpartition(": ")[2] for reason in rejects.values()] == ["a row of more than 1000 bytes"]


@pytest.mark.parametrize("begin", [b'{"image": "a.jpg", "caption": "', b"[", b'[{"image": "a.jpg", "caption": "'])
def test_a_first_line_without_an_end_is_one_broken_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(samples, "MOST_TEXT_BYTES", 1000)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    row = b'{"image": "a.jpg", "caption": "a dog"}\n'
    (tmp_path / "pairs.jsonl").write_bytes(begin + b"a" * 2_000_000 + b"\n" + row + row.replace(b"dog", b"cat"))
    captions, rejects = read(str(tmp_path / "pairs.jsonl"))
    assert [*captions.values()] == [("a dog",), ("a cat",)]
    assert [reason.rpartition(": ")[2] for reason in rejects.values()] == ["a row of more than 1000 bytes"]


def test_a_header_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MOST_TEXT_BYTES", 1000)
    (tmp_path / "pairs.csv").write_bytes(b"image," + b"a" * 2_000_000 + b"\na.jpg,a dog\n")
    with pytest.raises(
        SourceError, match=r"pairs\.csv: its first line, the names of columns, has more than 1000 bytes"
    ):
        open_source(str(tmp_path / "pairs.csv"))


@pytest.mark.parametrize("line", ["30 size=\u00b2\n", f"5011 size={'9' * 5000}\n", f"{'9' * 5000} a=b\n"])
def test_wild_numbers_in_an_extended_header_end_a_shard_with_a_reason(tmp_path: Path, line: str) -> None:
    header = tarfile.TarInfo("pax")
    fields = line.encode()
    header.type, header.size = tarfile.XHDTYPE, len(fields)
    wild = header.tobuf() + fields + bytes(-len(fields) % 512)
    path = Path(write_tar(tmp_path / "0.tar", ("a.jpg", jpeg()), ("a.txt", b"a dog")))
    end = 3 * 512 + len(jpeg()) + -len(jpeg()) % 512  # of both members
    path.write_bytes(path.read_bytes()[:end] + wild)
    captions, rejects = read(str(path))
    assert captions == {"a": ("a dog",)}
    assert "damaged extended header" in rejects[""]


def test_damaged_places_in_arrow_data_do_not_end_the_process(tmp_path: Path) -> None:
    table = pa.table({"image": [jpeg()] * 3, "caption": ["a", "b", "c"]})
    path = tmp_path / "0.arrow"
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    offsets = (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + (2).to_bytes(4, "little")
    data = path.read_bytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, (0).to_bytes(4, "little") + (2**30).to_bytes(4, "little") * 2))
    with pytest.raises(SourceError, match="nothing can be read"):
        read(str(path))


def test_a_reject_is_short_and_does_not_control_a_terminal() -> None:
    reject = Reject("0", "\x1b[2J", "x" * 5000)
    assert len(reject.reason) < 1100
    assert "\x1b" not in str(reject)
    assert "\\x1b[2J" in str(reject)
