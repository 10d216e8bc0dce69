"""Hostile input is read correctly or rejected with a reason: no crash, hang, loaded pickle or memory beyond 2 GiB.

Method: mutated data sets of every kind of source go through what CapFilt reads with: the source is opened, its shards
are read in order, and images are decoded and resized in threads. Each data set has four samples. Half of the inputs
damage the image, the texts or the place of one sample: the other three must be read whole. The other half damages the
container, its bytes or its members. A child process reads them under limits of time and memory; when it dies, that
input is a violation, and a new child goes on. Fields that nest deep are also written as json, as the export does.

    python -m benchmarks.fuzz [--inputs 10000] [--seed 0] [--only NUMBER]

`--only` makes the input of one number, prints what comes out of it, and leaves its files in the folder that is named.
"""

import argparse
import binascii
import csv
import io
import json
import os
import pickle
import resource
import select
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.harness import ROOT, Report, parser

SAMPLES = 4
SECONDS, MEMORY_BYTES = 20.0, 2 << 30
LONGEST_REASON = 2500  # characters: a reject must not repeat what is wrong with it at full length
KINDS = (
    "tar", "img2dataset", "parquet", "arrow", "jsonl", "csv", "tsv", "folder", "metadata.csv", "metadata.jsonl", "coco",
    "huggingface",
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "QOI", "APNG", "MPO")
SUFFIXES = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif", "APNG": "png"}
HTML = b"<!DOCTYPE html><html><body><h1>404</h1><script>alert(1)</script></body></html>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/><script>alert(1)</script></svg>'


class Unpickled:
    """Whoever loads its pickle has lost."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch openblip-fuzz-was-unpickled",))


# Images.


def good_image(random: Random, format_name: str) -> bytes:
    """A small image in a format, or a JPEG where this build of Pillow cannot write it."""
    from PIL import Image, features

    if (format_name == "AVIF" and not features.check("avif")) or (format_name == "QOI" and "QOI" not in Image.SAVE):
        format_name = "JPEG"
    modes = {"PNG": ["RGB", "RGBA", "L", "P", "I;16", "1"], "TIFF": ["RGB", "I;16", "F", "CMYK", "RGBA"]}
    mode = random.choice(modes.get(format_name, ["RGB"]))
    size = (random.randint(3, 40), random.randint(3, 40))
    image = Image.frombytes("RGB", size, random.randbytes(3 * size[0] * size[1]))
    image = Image.new(mode, size, 7) if mode in ("I;16", "F") else image.convert(mode)
    options: dict[str, Any] = {}
    if format_name in ("GIF", "APNG", "MPO") or (format_name in ("WEBP", "TIFF") and random.random() < 0.3):
        options = {"save_all": True, "append_images": [image.rotate(90), image] * random.choice([1, 20])}
    if format_name in ("JPEG", "MPO"):
        exif = Image.Exif()
        exif[0x0112] = random.randint(0, 9)
        options["exif"] = exif
        options["progressive"] = random.random() < 0.3
    file = io.BytesIO()
    image.save(file, {"APNG": "PNG"}.get(format_name, format_name), **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", binascii.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")]
    )


def png_bomb(width: int, height: int) -> bytes:
    """A whole image of zeros, a thousandth of its size."""
    packer, rows = zlib.compressobj(9), (1 + 3 * width) * height
    zeros = bytes(1 << 20)
    data = b"".join(packer.compress(zeros[: min(1 << 20, rows - start)]) for start in range(0, rows, 1 << 20))
    return png(width, height, data=data + packer.flush())


def special_image(random: Random, image: bytes) -> bytes:
    """What is no image, or one made to hurt."""
    zeros = zlib.compress(bytes(random.choice([10_000, 20_000_000])), 9)
    row = zlib.compress(bytes(13 * 4))
    jpeg = good_image(random, "JPEG")
    makers: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: HTML,
        lambda: SVG,
        lambda: b"<?xml version='1.0'?>" + SVG,
        lambda: b"GIF89a",
        lambda: b"\x00",
        lambda: pickle.dumps(Unpickled()),
        lambda: b"\x93NUMPY" + random.randbytes(200),
        lambda: image + HTML,
        lambda: image + b"PK\3\4" + random.randbytes(100),
        lambda: b"PK\3\4" + image,
        lambda: zlib.compress(image),
        lambda: png(70_000, 70_000),
        lambda: png(13_000, 13_000),
        lambda: png(2**31 - 1, 1),
        lambda: png(0, 5),
        lambda: png(4, 4, png_chunk(b"zTXt", b"a\0\0" + zeros), data=row),
        lambda: png(4, 4, *[png_chunk(b"tEXt", b"a\0" + b"b" * 5000)] * 400, data=row),
        lambda: png(4, 4, png_chunk(b"iCCP", b"icc\0\0" + zeros), data=row),
        lambda: png(4, 4, png_chunk(b"eXIf", b"Exif\0\0MM" + random.randbytes(60_000)), data=row),
        lambda: png(4, 4, png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), data=row),
        lambda: png(4, 4, data=zeros),
        lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\xf0\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0",
        lambda: jpeg[:2] + (b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65_527)) * 40 + jpeg[2:],
        lambda: (
            jpeg[:2]
            + b"".join(
                b"\xff\xe2\xff\xff" + b"ICC_PROFILE\0" + bytes([n, 255]) + random.randbytes(65_519)
                for n in range(1, 40)
            )
            + jpeg[2:]
        ),
        lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        lambda: b"P6 100000 100000 255\n" + bytes(10),
        lambda: b"P6 13000 13000 255\n",
        lambda: b"P5 4 4 70000\n" + bytes(9),
        lambda: b"\x00\x00\x0a\x00\x00\x00\x00\x00\x00\x00\x00\x00" + struct.pack("<HH", 13_000, 13_000) + b"\x18\x00",
        lambda: b"qoif" + struct.pack(">IIBB", 13_000, 13_000, 3, 0),
        lambda: b"II*\0" + struct.pack("<I", 2**32 - 1),
        lambda: b"II*\0\x08\0\0\0\xff\xff" + random.randbytes(500),
        lambda: b"\0\0\1\0\xff\xff" + b"\x10\x10\0\0\1\0\x20\0" + struct.pack("<II", 100, 22) + png(5000, 5000),
    ]
    return random.choice(makers)()


def damaged_bytes(random: Random, data: bytes) -> bytes:
    """Some bytes changed, cut, doubled or put elsewhere."""
    content = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5, 30])):
        if not content:
            break
        place, length = random.randrange(len(content)), random.choice([1, 2, 4, 8, 64, 1000])
        match random.randrange(8):
            case 0:
                content[place] ^= 1 << random.randrange(8)
            case 1:
                content[place : place + length] = random.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * length
            case 2:
                content[place : place + length] = random.randbytes(length)
            case 3:
                del content[place:]
            case 4:
                del content[place : place + length]
            case 5:
                content[place:place] = content[place : place + length]
            case 6:
                content[place : place + 4] = struct.pack(
                    random.choice("<>") + "I", random.choice([0, 1, 2**31, 2**32 - 1])
                )
            case _:
                content[place:place] = random.choice([HTML, b"\0" * 512, b"\n", b'"', b"\xff\xfe", b"{", b"PAR1"])
    return bytes(content)


def hostile_image(random: Random, image: bytes) -> bytes:
    if random.random() < 0.35:
        return special_image(random, image)
    if random.random() < 0.1:
        return image[: random.randrange(len(image))] + good_image(random, random.choice(FORMATS))
    return damaged_bytes(random, image)


# Texts.


def nested(depth: int, random: Random) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value] if random.random() < 0.5 else {"a": value}
    return value


def hostile_caption(random: Random) -> Any:
    """A value of a json field that should have been a caption."""
    makers: list[Callable[[], Any]] = [
        lambda: "",
        lambda: None,
        lambda: 7,
        lambda: True,
        lambda: {"text": "a dog"},
        list,
        lambda: ["a", None],
        lambda: [["a dog"]],
        lambda: ["a dog"] * random.choice([2, 200, 50_000]),
        lambda: "dog " * 500_000,
        lambda: "a" * 3_000_000,
        lambda: "\udcff\ud800 dog",
        lambda: "\0\0",
        lambda: "\x1b[2J\x1b]0;owned\x07",
        lambda: "\u202egod",
        lambda: "<script>alert(1)</script>",
        lambda: "'; DROP TABLE captions; --",
        lambda: "__import__('os').system('true')",
        lambda: nested(random.choice([50, 400, 900]), random),
        lambda: float("nan"),
        lambda: 10**400,
        lambda: "[" * 2000,
        lambda: "\N{ZERO WIDTH JOINER}" * 5000,
        lambda: "e" + "\u0301" * 100_000,
        lambda: "\n\r\t",
        lambda: 'a,b;c\td|e"f\'g\n"',
    ]
    return random.choice(makers)()


def hostile_json(random: Random, image_name: str | None = None) -> bytes:
    """The json of a sample, which may be broken."""
    fields: dict[str, Any] = {"caption": "a dog"} | ({"image": image_name} if image_name else {})
    makers: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: b"{",
        lambda: b"[" * 100_000,
        lambda: b'{"a":' * 5000 + b"1" + b"}" * 5000,
        lambda: b'{"caption": ' + b"9" * 10_000 + b"}",
        lambda: b'{"caption": "\xff\xfe dog"}',
        lambda: b"null",
        lambda: b"7",
        lambda: b'{"caption": "a", "caption": 3}',
        lambda: b"\xef\xbb\xbf" + json.dumps(fields).encode(),
        lambda: json.dumps(fields).encode("utf-16-be"),  # no byte-order mark: at the start it speaks for the whole file
        lambda: json.dumps(fields | {f"f{n}": n for n in range(20_000)}).encode(),
        lambda: json.dumps(fields | {"image_id": nested(5, random)}).encode(),
        lambda: pickle.dumps(Unpickled()),
        lambda: json.dumps(fields | {"question": random.choice([7, "q", None]), "answers": 3, "weight": "x"}).encode(),
        lambda: json.dumps(fields | {"conversations": random.choice([7, "[", [3]]), "label": {}}).encode(),
        lambda: json.dumps(
            fields | {"references": 8, "noise": 3, "key": random.choice([[], "../../x", "\0", "a" * 9999])}
        ).encode(),
    ]
    if random.random() < 0.6:
        return json.dumps(
            fields | {random.choice(["caption", "captions", "text", "other"]): hostile_caption(random)}
        ).encode()
    return random.choice(makers)()


def hostile_path(random: Random) -> str:
    return random.choice(
        [
            "../" * 12 + "etc/passwd",
            "/etc/passwd",
            "/dev/zero",
            "/dev/stdin",
            "/proc/self/mem",
            ".",
            "",
            "missing.jpg",
            "\0",
            "file:///dev/zero",
            "nosuch://x/y.jpg",
            "a" * 5000,
            "0.jpg/../0.jpg",
            "\udcff.jpg",
            "fifo.jpg",
            "loop.jpg",
        ]
    )


# Data sets. Each writer damages sample `which` where `part` says so, and returns the SOURCE.


@dataclass
class Case:
    """One hostile data set."""

    number: int
    kind: str
    damage: str  # "image", "text", "place" or "container"
    random: Random
    folder: Path
    which: int
    images: list[tuple[str, bytes]] = field(default_factory=list)  # suffix and content

    def text(self, index: int) -> bool:
        return self.damage == "text" and index == self.which

    def misplaced(self, index: int) -> bool:
        return self.damage == "place" and index == self.which

    @property
    def whole(self) -> set[str]:
        """The captions of the samples that must be read."""
        untouched = range(SAMPLES) if self.damage != "container" else ()
        return {caption(index) for index in untouched if index != self.which}


def caption(index: int) -> str:
    return f"a whole sample {index}"


def make_case(number: int, seed: int, folder: Path) -> tuple[Case, str]:
    """The input of a number, written, and its SOURCE."""
    random = Random(f"{seed}/{number}")
    damage = random.choice(["image", "text", "place", "container", "container", "container"])
    kind = KINDS[number % len(KINDS)]
    case = Case(number, kind, damage, random, folder, random.randrange(SAMPLES))
    for index in range(SAMPLES):
        format_name = random.choice(FORMATS)
        suffix, image = SUFFIXES.get(format_name, format_name.lower()), good_image(random, format_name)
        if damage == "image" and index == case.which:
            image = hostile_image(random, image)
        case.images.append((suffix, image))
    writer = {"tar": write_tar, "img2dataset": write_tar, "parquet": write_parquet, "arrow": write_parquet}
    writer |= {"huggingface": write_parquet, "coco": write_coco, "folder": write_folder}
    writer |= {"metadata.csv": write_folder, "metadata.jsonl": write_folder}
    return case, writer.get(kind, write_table)(case)


def write_tar(case: Case) -> str:
    random, members = case.random, list[tuple[tarfile.TarInfo, bytes]]()

    def add(name: str, data: bytes, **header: Any) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        for key, value in header.items():
            setattr(member, key, value)
        members.append((member, data))

    for index, (suffix, image) in enumerate(case.images):
        text = hostile_json(random) if case.text(index) else json.dumps({"caption": caption(index)}).encode()
        key = f"{index:05d}"
        if case.misplaced(index):
            key = random.choice(
                ["../" * 5 + "etc/x", "/abs/x", "a" * 3000, "x\0y", "a\nb", "x\udcff", "..", "con", "\x1b[2J"]
            )
            match random.randrange(6):
                case 0:
                    add(
                        f"{key}.{suffix}",
                        b"",
                        type=random.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]),
                        linkname="/etc/passwd",
                    )
                case 1:
                    add(
                        f"{key}.{suffix}", b"", type=random.choice([tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
                    )
                case 2:
                    add(f"{key}.{suffix}", image, pax_headers={"comment": "x" * random.choice([10, 2_000_000])})
                case 3:
                    add(f"{key}.pkl", pickle.dumps(Unpickled()))
                    add(f"{key}.pyd", pickle.dumps(Unpickled()))
                case 4:
                    add(f"{key}.{suffix}", image)
                    add(f"{key}.{suffix}", image)
            if random.random() < 0.5:
                add(f"{key}.json", text)
            continue
        add(f"{key}.{suffix}", image)
        suffixes = ["json", "txt"] if case.text(index) else ["json"]
        data = {"json": text, "txt": random.choice([b"\xff\xfe\xfd", b"", b"dog " * 700_000, b"\0"])}
        ending = random.choice(suffixes)
        add(f"{key}.{ending}", data[ending])
    path = case.folder / "00000.tar"
    if case.damage == "container" and random.random() < 0.4:  # members in another order, twice, or missing
        random.shuffle(members)
        members = [member for member in members if random.random() < 0.9] + random.sample(members, 2)
    kind = random.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(path, "w", format=kind, errors="surrogateescape") as tar:
        for member, data in members:
            try:
                tar.addfile(member, io.BytesIO(data))
            except ValueError:  # a name that this format cannot hold
                tar.format = tarfile.PAX_FORMAT
                member.name = member.name.encode("utf-8", "backslashreplace").decode()
                tar.addfile(member, io.BytesIO(data))
    if case.damage == "container" and random.random() < 0.7:
        data = path.read_bytes()
        if random.random() < 0.3:  # a number in a header
            block = 512 * random.randrange(len(data) // 512)
            wild = random.choice(
                [b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"99999999999\0", b" " * 12]
            )
            header = bytearray(data[block : block + 512])
            header[124:136] = wild
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % (sum(header) & 0o777777)
            data = data[:block] + bytes(header) + data[block + 512 :]
        elif random.random() < 0.2:
            lines = [f"{n} size={'9' * 5000}\n" for n in (5011, 5, 0)] + [
                "30 size=\u00b2\n",
                "12 path=a\n",
                "9" * 5000 + " a=b\n",
            ]
            fields = random.choice(lines).encode()
            member = tarfile.TarInfo("pax")
            member.type, member.size = tarfile.XHDTYPE, len(fields)
            data = member.tobuf() + fields + bytes(-len(fields) % 512) + data
        else:
            data = damaged_bytes(random, data)
        path.write_bytes(data)
    if case.kind == "img2dataset":
        stats = json.dumps({"successes": 4}).encode()
        (case.folder / "00000_stats.json").write_bytes(damaged_bytes(random, stats) if random.random() < 0.5 else stats)
    return str(path)


def write_parquet(case: Case) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    random, rows = case.random, list[dict[str, Any]]()
    for index, (_, image) in enumerate(case.images):
        row: dict[str, Any] = {"key": f"k{index}", "image": image, "caption": caption(index)}
        if case.text(index):
            text = hostile_caption(random)
            row["caption"] = text if isinstance(text, str) else random.choice(["", None, "dog " * 600_000])
            row["caption"] = row["caption"] and row["caption"].encode("utf-8", "replace").decode()
        if case.misplaced(index):
            row["key"], row["image"] = random.choice(
                [("../../x", image), (None, None), ("k0", image), ("", b""), ("\0", image)]
            )
        rows.append(row)
    if case.kind == "huggingface" or random.random() < 0.3:
        for row in rows:
            row["image"] = {
                "bytes": row["image"],
                "path": random.choice([None, hostile_path(random).replace("\udcff", "x")]),
            }
    table = pa.Table.from_pylist(rows)
    if case.damage == "text" and random.random() < 0.3:  # bytes that are not UTF-8, called a string
        data = [caption(n).encode() if n != case.which else b"\xff\xfe" * 9 for n in range(SAMPLES)]
        table = table.set_column(2, "caption", pa.array(data, pa.binary()).view(pa.string()))
    if case.damage == "container" and random.random() < 0.4:
        metadata = random.choice(
            [
                {b"pandas": b"[" * 100_000},
                {b"huggingface": b'{"info": 7}'},
                {b"ARROW:extension:name": b"x"},
                {b"": b"\xff" * 99},
            ]
        )
        table = table.replace_schema_metadata(metadata)
        if random.random() < 0.5:
            kinds = {
                b"ARROW:extension:name": b"arrow.py_extension_type",
                b"ARROW:extension:metadata": pickle.dumps(Unpickled()),
            }
            table = table.set_column(2, pa.field("caption", pa.string(), metadata=kinds), table["caption"])
        more = random.choice(
            [pa.array([7] * SAMPLES), pa.array([[["x"]]] * SAMPLES), pa.array([None] * SAMPLES, pa.null())]
        )
        table = table.append_column(random.choice(["caption", "text", "key", "image", "jpg", "a" * 5000]), more)
    folder = case.folder / "train" if case.kind == "huggingface" else case.folder
    folder.mkdir(exist_ok=True)
    path = folder / ("data-00000-of-00001.arrow" if case.kind == "huggingface" else f"0.{case.kind}")
    if path.suffix == ".parquet":
        pq.write_table(
            table, path, row_group_size=random.choice([1, 2, 100]), compression=random.choice(["zstd", "snappy"])
        )
    else:
        new = pa.ipc.new_stream if random.random() < 0.5 or case.kind == "huggingface" else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=random.choice([1, 100]))
    if case.kind == "huggingface":
        info = json.dumps({"_data_files": [{"filename": path.name}], "_split": "train"}).encode()
        (folder / "state.json").write_bytes(info)
        (folder / "dataset_info.json").write_bytes(b'{"features": {}}')
    if case.damage == "container" and random.random() < 0.8:
        path.write_bytes(damaged_bytes(random, path.read_bytes()))
    return str(folder if case.kind == "huggingface" else path)


def write_images(case: Case) -> list[str]:
    """The images as files of a folder, with a few things beside them that are no plain files."""
    names = []
    for index, (suffix, image) in enumerate(case.images):
        names.append(f"{index}.{suffix}")
        (case.folder / names[-1]).write_bytes(image)
    if case.damage in ("place", "container"):
        os.mkfifo(case.folder / "fifo.jpg")
        os.symlink("loop.jpg", case.folder / "loop.jpg")
        os.symlink("/dev/zero", case.folder / "zero.jpg")
        os.symlink(".", case.folder / "itself.jpg")
    return names


def write_table(case: Case) -> str:
    random, names = case.random, write_images(case)
    images = [hostile_path(random) if case.misplaced(index) else name for index, name in enumerate(names)]
    path = case.folder / f"pairs.{case.kind}"
    if case.kind == "jsonl":
        lines = [json.dumps({"image": name, "caption": caption(index)}).encode() for index, name in enumerate(images)]
        if case.damage == "text":
            lines[case.which] = hostile_json(random, images[case.which]).replace(b"\n", b" ")
        content = b"\n".join(lines) + b"\n"
    else:
        file = io.StringIO(newline="")
        rows = csv.writer(file, delimiter="," if case.kind == "csv" else "\t")
        rows.writerow(["image", "caption"])
        for index, name in enumerate(images):
            text = hostile_caption(random) if case.text(index) else caption(index)
            rows.writerow([name, text])
        content = file.getvalue().encode("utf-8", "replace")
    if case.damage == "container":
        content = damaged_bytes(random, content)
    path.write_bytes(content)
    return str(path)


def write_folder(case: Case) -> str:
    random, names = case.random, write_images(case)
    if case.kind == "folder":
        for index, _ in enumerate(names):
            ending = random.choice(["txt", "json"])
            text = caption(index) if ending == "txt" else json.dumps({"caption": caption(index)})
            content = text.encode()
            if case.text(index):
                content = hostile_json(random)
            if case.misplaced(index):
                os.mkfifo(case.folder / f"{index}.{ending}")
                continue
            if case.damage == "container":
                content = damaged_bytes(random, content)
            (case.folder / f"{index}.{ending}").write_bytes(content)
        return str(case.folder)
    inner = replace_kind(case, case.kind.removeprefix("metadata."))
    content = (case.folder / f"pairs.{inner}").read_bytes()
    (case.folder / f"pairs.{inner}").unlink()
    (case.folder / case.kind).write_bytes(content.replace(b"image", b"file_name"))
    return str(case.folder)


def replace_kind(case: Case, kind: str) -> str:
    """Write the rows of a metadata file as those of a table; the images are there already."""
    for path in case.folder.iterdir():
        path.unlink()
    outer, case.kind = case.kind, kind
    write_table(case)
    case.kind = outer
    return kind


def write_coco(case: Case) -> str:
    random, names = case.random, write_images(case)
    images, annotations = list[Any](), list[Any]()
    for index, name in enumerate(names):
        images.append({"id": index, "file_name": hostile_path(random) if case.misplaced(index) else name})
        text = hostile_caption(random) if case.text(index) else caption(index)
        annotations.append({"id": index, "image_id": index, "caption": text})
    if case.damage == "container" and random.random() < 0.5:
        images.append(random.choice([7, None, {"id": 0, "file_name": "0.jpg"}, {"id": [], "file_name": {}}]))
        annotations.append(random.choice([7, None, {"image_id": 99, "caption": "x"}, {"image_id": 1}]))
    content = json.dumps({"images": images, "annotations": annotations}).encode()
    if case.damage == "container" and random.random() < 0.7:
        content = damaged_bytes(random, content)
    path = case.folder / "captions.json"
    path.write_bytes(content)
    return str(path)


# What CapFilt does with it.


def read_case(case: Case, source_spec: str) -> tuple[str, str]:
    """Read a data set as CapFilt does. The result, and what is wrong with it: empty unless something is."""
    from openblip.data.config import Preprocessing
    from openblip.data.images import read_image
    from openblip.data.reader import read_source
    from openblip.data.sample import Reject, Sample
    from openblip.data.sources import open_source
    from openblip.errors import OpenBlipError

    preprocess = Preprocessing(image_size=64)

    def prepare(sample: Sample) -> Any:
        with read_image(sample.image, name=sample.key, scaled_for=64) as image:
            return preprocess(image)

    captions, rejects = set[str](), list[Reject]()
    outcome = "read"
    try:
        source = open_source(source_spec, images=str(case.folder) if case.kind == "coco" else None)
        for shard in source.shards():
            try:
                for entry in read_source(source, prepare, shards=[shard], num_workers=2):
                    if isinstance(entry, Reject):
                        rejects.append(entry)
                        continue
                    sample, pixels = entry
                    assert pixels.shape == (3, 64, 64)
                    captions.update(sample.captions)
                    json.dumps(dict(sample.info), default=str)
            except OpenBlipError as error:
                outcome = "shard failed with a reason"
                rejects.append(Reject(shard, "", str(error)))
    except OpenBlipError as error:
        # More than a tenth of rows that are not UTF-8 is a file in another encoding, which is refused as a whole.
        is_lost = case.whole and "rows are not UTF-8 text" not in str(error)
        return "source refused with a reason", f"good samples are lost: {error}" if is_lost else ""
    if outcome == "read" and rejects:
        outcome = "samples rejected with reasons"
    for reject in rejects:
        if not reject.reason.strip() or len(str(reject)) > LONGEST_REASON:
            return outcome, f"a reason of {len(str(reject))} characters"
    if lost := case.whole - captions:
        return outcome, f"good samples are lost: {sorted(lost)}; {[reject.reason for reject in rejects]}"
    return outcome, ""


def run_inputs(first: int, last: int, seed: int) -> None:
    """In a child: read the inputs, one line of json before and after each."""
    loaded: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            loaded.append(str(arguments))

    make_case(0, seed, Path(tempfile.mkdtemp(dir=os.environ["TMPDIR"])))  # imports
    sys.addaudithook(audit)
    before = peak_bytes()
    for number in range(first, last):
        print(json.dumps({"start": number}), flush=True)
        folder = Path(tempfile.mkdtemp(dir=os.environ["TMPDIR"]))
        case, source = make_case(number, seed, folder)
        started = time.perf_counter()
        try:
            outcome, wrong = read_case(case, source)
        except BaseException as error:
            outcome, wrong = "raised", f"{type(error).__name__}: {error!s:.300}"
        seconds, peak = time.perf_counter() - started, peak_bytes()
        if loaded:
            wrong = f"a pickle was loaded: {loaded.pop()}"
        if peak - before > MEMORY_BYTES:
            wrong = f"{(peak - before) / 2**20:.0f} MiB of memory"
            before = peak
        shutil.rmtree(folder, ignore_errors=True)
        answer = {"done": number, "kind": case.kind, "damage": case.damage, "outcome": outcome, "wrong": wrong}
        print(json.dumps(answer | {"seconds": seconds, "peak": peak}), flush=True)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Tally:
    """What came out of all inputs."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind of source and result
    damages: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak: int = 0

    def add(self, answer: dict[str, Any]) -> None:
        self.outcomes[answer["kind"], answer["outcome"]] += 1
        self.damages[answer["damage"], answer["outcome"]] += 1
        self.slowest, self.peak = max(self.slowest, answer["seconds"]), max(self.peak, answer["peak"])
        if answer["wrong"]:
            self.violations.append(f"input {answer['done']} ({answer['kind']}, {answer['damage']}): {answer['wrong']}")
            print(self.violations[-1], flush=True)


def fuzz(inputs: int, seed: int, first: int = 0) -> Tally:
    """Read the inputs in child processes, and count."""
    tally, number = Tally(), first
    while number < first + inputs:
        number = run_child_process(tally, number, first + inputs, seed)
    return tally


def run_child_process(tally: Tally, first: int, last: int, seed: int) -> int:
    """Read inputs until they end or the child does; the number of the next one."""
    with tempfile.TemporaryDirectory(prefix="openblip-fuzz-") as scratch:
        command = [sys.executable, "-c", f"from benchmarks.fuzz import run_inputs; run_inputs({first}, {last}, {seed})"]
        env = {**os.environ, "TMPDIR": scratch, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        limit = MEMORY_BYTES * 4  # address space: threads and libraries reserve more than they use
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        assert child.stdout is not None
        begun: int | None = None
        while True:
            ready, _, _ = select.select([child.stdout], [], [], SECONDS if begun is not None else 120.0)
            line = child.stdout.readline() if ready else b""
            if not line:
                child.kill()
                code = child.wait()
                if code == 0 and ready:
                    return last
                if begun is None:
                    raise RuntimeError(f"the child ended with {code} before its first input")
                what = f"the process died ({code})" if ready else f"nothing came in {SECONDS:.0f} s"
                case = {"done": begun, "kind": KINDS[begun % len(KINDS)], "damage": "?", "outcome": "crash or hang"}
                tally.add(case | {"wrong": what, "seconds": 0.0, "peak": 0})
                return begun + 1
            answer = json.loads(line)
            if "start" in answer:
                begun = answer["start"]
            else:
                tally.add(answer)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--inputs", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", type=int, help="the number of one input")
    chosen = options.parse_args()
    if chosen.only is not None:
        show(chosen.only, chosen.seed)
        return
    run(chosen)


def show(number: int, seed: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"openblip-fuzz-{number}-"))
    case, source = make_case(number, seed, folder)
    print(f"{case.kind}, {case.damage}, sample {case.which}: {source}")
    print(read_case(case, source))


def run(options: argparse.Namespace) -> None:
    report = Report("fuzz", __doc__, options)
    tally = fuzz(options.inputs, options.seed)
    for name, counts in (("source", tally.outcomes), ("damaged", tally.damages)):
        results = sorted({result for _, result in counts})
        print(f"\n| {name} | {' | '.join(results)} |\n|---|{'---|' * len(results)}")
        for kind in sorted({kind for kind, _ in counts}):
            print(f"| {kind} |", " | ".join(f"{counts[kind, result]:,}" for result in results), "|")
    report.facts["counts"] = {f"{kind}: {result}": count for (kind, result), count in sorted(tally.outcomes.items())}
    report.add("inputs", options.inputs, unit="", target=10_000)
    report.add("violations", len(tally.violations), unit="", target=0, at_most=True)
    report.add("the slowest input", tally.slowest, unit="s", target=SECONDS, at_most=True)
    report.add("largest memory of the process", tally.peak / 2**30, unit="GiB", target=3.0, at_most=True)
    report.save()


if __name__ == "__main__":
    main()
