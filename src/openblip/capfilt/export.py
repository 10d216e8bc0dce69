"""The pairs that a CapFilt run keeps, written out with their images."""

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from openblip.capfilt.folder import CapFiltFolder, config_hash
from openblip.data.captions import read_captions, read_kept_pairs, read_texts, text_columns
from openblip.data.images import read_image
from openblip.data.reader import items_without_images, read_source
from openblip.data.sample import Reject, Sample, Source, file_kind
from openblip.data.sources import open_source
from openblip.data.sources.capfilt import pair_key
from openblip.errors import ConfigError, ImageError, SourceError
from openblip.files import atomic_file, hash_bytes, locate, read_json, write_json, write_text
from openblip.progress import Progress

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
MARKER = "export.json"
MEGABYTE = 1_000_000
# What Hugging Face's datasets reads first in a folder. Without it, it would take export.json for data, the types of all
# samples from the first five, and only images with the first one's ending.
CARD = """---
configs:
- config_name: default
  data_files: "{files}"
dataset_info:
  features:
{features}---
Image-text pairs that CapFilt of OpenBLIP kept, as {kind}.
"""
_ROWS_PER_GROUP = 100  # of pairs with their images
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as Hugging Face's datasets stores images
_UID = re.compile(r"[0-9a-fA-F]{32}")
# A dot ends the key of a member's name, and no name may leave the folder that it is unpacked in.
_UNSAFE = re.compile(r"[%.\\\x00-\x1f\x7f]|^/")


ExportFormat = Literal["tar", "parquet", "huggingface", "uids"]


class ExportSummary(NamedTuple):
    """What was written, and the kept pairs that were not because their original can no longer be read."""

    pairs: int
    shards: int
    """Files of pairs."""
    rejects: list[Reject]


class Pair(NamedTuple):
    """A kept text with its image, whose bytes are of a format that a tar shard may hold."""

    key: str
    suffix: str
    image: bytes
    text: dict[str, Any]
    """Caption, source, scores, `image_id`, and shard and key of the origin."""
    info: dict[str, Any]
    """The fields of the sample's own json, without those that have no value."""


def export(
    directory: str | Path, out: str | Path, format: ExportFormat = "tar", *, shard_size: int | None = None
) -> ExportSummary:
    """Write what `capfilt:DIR` keeps to `out`.

    tar: `<shard>.tar` of webdataset. A pair is `<key>.jpg` (or png, webp: the original bytes and suffix; other formats
    become png) and `<key>.json`: the sample's own json with `caption`, `source`, `itm`, `itc`, `logprob`, later scores,
    the `weight` of a decision that has one, `image_id` and the origin's shard and key. Fields without a value are left
    out, `logprob` of web texts among them, since readers that infer types from the first samples fail on them. Keys are
    those of `capfilt:DIR`, with dots and other characters that a tar key cannot hold percent-encoded.

    parquet: `<shard>.parquet` with the same columns, an `image` of `{bytes, path}`, the sample's json as the text
    `info`, and its `uid`. huggingface: the same in `data/train-*.parquet`, a data set of Hugging Face.

    uids: no images but the sorted `uid`s of the samples as npy files of pairs of 64-bit numbers, which DataComp's tools
    take: `uids.npy` of all samples with a kept text, `uids-web.npy` and `uids-synthetic.npy` of those with a kept web
    or synthetic text.

    shard_size: megabytes of images that a file holds at most, unless one image is larger. A shard of the run is then
    written as `<shard>.part0000.tar` and so on, or parquet; without it a shard is one file.

    The same data gives the same bytes, in any folder. A shard of which nothing is kept is not written.

    Raises:
        ConfigError: `directory` is not a CapFilt run, or `out` holds something other than such an export of it; a
            `shard_size` below 1, or one of uids, which have no shards.
        SourceError: the original data is gone, no shard of the run is finished, or no sample states a uid.
    """
    if shard_size is not None and (shard_size < 1 or format == "uids"):
        reason = "has no effect on a list of uids" if format == "uids" else "must be at least 1, in megabytes"
        raise ConfigError(f"capfilt-export: --shard-size {reason}")
    folder, target = CapFiltFolder(directory), locate(out)
    manifest = folder.read_manifest()
    source = open_source(f"capfilt:{directory}")
    shards = source.shards()
    path = target / MARKER
    first = shards[0]
    if path.is_file():
        earlier = read_json(path)
        first = earlier.get("shard", first)
        # Earlier versions stated the hash of the settings, no shard, and wrote tar shards alone.
        run = _texts_hash(folder, first) if "shard" in earlier else config_hash(manifest)
        if run is None or earlier.get("run") != run:
            raise ConfigError(f"{target} holds the export of another CapFilt run; choose another --out")
        if (format_before := earlier.get("format", "tar")) != format:
            raise ConfigError(f"{target} holds an export as {format_before}; choose another --out")
    elif target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty and no export of a CapFilt run; choose another --out")
    marker = {"run": _texts_hash(folder, first), "shard": first, "format": format}
    marker |= {"threshold": manifest["threshold"], "openblip": manifest["openblip"]}
    write_json(path, {**marker, "complete": False})
    if format == "uids":
        summary = _write_uids(target, source)
        write_json(path, {**marker, "complete": True, "pairs": summary.pairs})
        return summary
    rejects: list[Reject] = []
    suffixes: set[str] = set()
    num_pairs: dict[str, int] = {}
    written: set[Path] = set()
    files = {shard: target / f"{shard}.{'tar' if format == 'tar' else 'parquet'}" for shard in shards}
    if format == "huggingface":
        names = [f"train-{number:05d}-of-{len(shards):05d}.parquet" for number in range(len(shards))]
        files = {shard: target / "data" / name for shard, name in zip(shards, names, strict=True)}
    schema = _pair_schema(folder, first)
    with Progress("exporting", total=len(shards), unit="shards") as bar:
        for shard, file in files.items():
            pairs = _pairs(source, shard, folder, rejects)
            parts = [pairs] if shard_size is None else _parts(pairs, shard_size * MEGABYTE)
            for number, part in enumerate(parts):
                name = file.name if shard_size is None else f"{file.stem}.part{number:04d}{file.suffix}"
                path_of_part = file.with_name(name)
                count = (
                    _write_tar(path_of_part, part, suffixes)
                    if format == "tar"
                    else _write_table(path_of_part, part, schema)
                )
                if count:
                    num_pairs[shard] = num_pairs.get(shard, 0) + count
                    written.add(path_of_part)
            bar.advance()
    ending = next(iter(files.values()))
    for earlier_file in list(ending.parent.glob(f"*{ending.suffix}")):
        if earlier_file not in written:  # nothing of it is kept now, or the parts are others
            earlier_file.unlink()
    if format == "tar":
        types = {"__key__": "string", "json": "json"} | dict.fromkeys(suffixes, "image")
        features = "".join(f"  - name: {name}\n    dtype: {kind}\n" for name, kind in sorted(types.items()))
        card = CARD.format(files="*.tar", features=features, kind="tar shards of webdataset")
        write_text(target / "README.md", card)
    elif format == "huggingface":
        features = "".join(f"  - name: {name}\n    dtype: {kind}\n" for name, kind in _feature_types(schema).items())
        write_text(target / "README.md", CARD.format(files="data/train-*", features=features, kind="parquet files"))
    write_json(path, {**marker, "complete": True, "pairs": num_pairs})
    return ExportSummary(sum(num_pairs.values()), len(written), rejects)


def _texts_hash(folder: CapFiltFolder, shard: str) -> str | None:
    """A hash of the texts of a shard, which tells runs apart wherever they lie; None where the run lacks the shard."""
    if not folder.is_done(shard):
        return None
    texts = read_captions(folder.root, shard).select(["key", "source", "index", "caption"])
    return hash_bytes(json.dumps(texts.to_pydict())).hex()


def _pairs(source: Source, shard: str, folder: CapFiltFolder, rejects: list[Reject]) -> Iterator[Pair]:
    """The kept pairs of a shard; those that cannot be read join `rejects`."""
    decision = folder.decision
    columns = text_columns(folder.root, shard)
    rows = {pair_key(row): row for row in read_kept_pairs(folder.root, shard, decision, columns)}
    for entry in read_source(source, _image_file, shards=[shard]):
        if isinstance(entry, Reject):
            rejects.append(entry)
            continue
        sample, (suffix, image) = entry
        row = rows[sample.key]
        text = {name: value for name, value in row.items() if name not in ("key", "shard", "index", "weight")}
        text |= {"weight": row["weight"]} if decision.weight is not None else {}
        text |= {"image_id": _image_id(sample, source), "origin_shard": row["shard"], "origin_key": row["key"]}
        info = {name: value for name, value in sample.info.items() if name not in ("caption", "captions")}
        info |= {name: os.path.basename(path) for name, path in info.items() if _is_local_file(path)}
        yield Pair(tar_key(sample.key), suffix, image, text, _without_empty(info))


def _parts(pairs: Iterator[Pair], most_bytes: int) -> Iterator[Iterator[Pair]]:
    """The pairs of one file after the other, with at most so many bytes of images, or one image. Each is to be read to
    its end before the next."""
    waiting = list(islice(pairs, 1))

    def part() -> Iterator[Pair]:
        num_bytes = 0
        while waiting and (not num_bytes or num_bytes + len(waiting[0].image) <= most_bytes):
            pair = waiting.pop()
            num_bytes += len(pair.image)
            yield pair
            waiting.extend(islice(pairs, 1))

    while waiting:
        yield part()


def _write_tar(path: Path, pairs: Iterator[Pair], suffixes: set[str]) -> int:
    """Write the pairs of a shard, and return their number; endings of images join `suffixes`."""
    num_pairs = 0
    with atomic_file(path) as partial, tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
        for pair in pairs:
            num_pairs += 1
            info = json.dumps(pair.info | _without_empty(pair.text), default=str).encode()
            for name, payload in ((f"{pair.key}.{pair.suffix}", pair.image), (f"{pair.key}.json", info)):
                member = tarfile.TarInfo(name)  # time, owner and mode stay the constants of TarInfo
                member.size = len(payload)
                archive.addfile(member, io.BytesIO(payload))
            suffixes.add(pair.suffix)
    return num_pairs


def _pair_schema(folder: CapFiltFolder, shard: str) -> pa.Schema:
    """The columns of pairs in parquet files, with what tells Hugging Face's datasets that one has images."""
    texts = read_texts(folder.root, shard).schema
    own = [texts.field(name) for name in texts.names if name not in ("key", "shard", "index")]
    fields = [("key", pa.string()), ("image", _IMAGE), *((field.name, field.type) for field in own)]
    fields += [("weight", pa.float64())] if folder.decision.weight is not None else []
    fields += [(name, pa.string()) for name in ("image_id", "origin_shard", "origin_key", "uid", "info")]
    schema = pa.schema(fields)
    features = {
        name: {"_type": "Image"} if kind == "image" else {"dtype": kind, "_type": "Value"}
        for name, kind in _feature_types(schema).items()
    }
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature_types(schema: pa.Schema) -> dict[str, str]:
    """What Hugging Face's datasets calls the types of columns."""
    names = {"float": "float32", "double": "float64", "halffloat": "float16"}
    kinds = {field.name: names.get(str(field.type), str(field.type)) for field in schema}
    return kinds | {"image": "image"}


def _write_table(path: Path, pairs: Iterator[Pair], schema: pa.Schema) -> int:
    """Write the pairs of a shard, and return their number."""
    num_pairs = 0
    with atomic_file(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        while group := list(islice(pairs, _ROWS_PER_GROUP)):
            rows = [
                {
                    **pair.text,
                    "key": pair.key,
                    "image": {"bytes": pair.image, "path": f"{pair.key}.{pair.suffix}"},
                    "image_id": str(pair.text["image_id"]),
                    "uid": None if "uid" not in pair.info else str(pair.info["uid"]),
                    "info": json.dumps(pair.info, default=str),
                }
                for pair in group
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            num_pairs += len(group)
    return num_pairs


def _write_uids(target: Path, source: Source) -> ExportSummary:
    """Write the uids of the kept pairs; no image is read."""
    uids: dict[str, set[tuple[int, int]]] = {"": set(), "-web": set(), "-synthetic": set()}
    rejects: list[Reject] = []
    for item in items_without_images(source):
        if isinstance(item, Reject):
            rejects.append(item)
            continue
        uid = str(item.info.get("uid", ""))
        if not _UID.fullmatch(uid):
            reason = f"its uid is {uid!r}, not 32 hexadecimal digits" if uid else "it states no uid"
            rejects.append(Reject(item.shard, item.key, reason))
            continue
        number = int(uid[:16], 16), int(uid[16:], 16)
        uids[""].add(number)
        source_of_text = item.key.rsplit("-", 2)[1]  # as `pair_key` has it
        for name in ("web", "synthetic") if source_of_text == "joined" else (source_of_text,):
            uids[f"-{name}"].add(number)
    if rejects and not uids[""]:
        raise SourceError(f"{source.name}: a list of uids needs samples with a `uid` of DataComp; {rejects[0]}")
    for name, numbers in uids.items():
        with atomic_file(target / f"uids{name}.npy") as partial, partial.open("wb") as file:
            np.save(file, np.array(sorted(numbers), np.dtype("u8,u8")))
    return ExportSummary(len(uids[""]), 0, rejects)


def tar_key(key: str) -> str:
    """`key` as the name of a tar member: unsafe characters percent-encoded, different keys stay different."""
    return _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", key)


def _image_id(sample: Sample, source: Source) -> Any:
    """The data set's own id of the image, else shard and key, or the image's name in a table; never a folder's name."""
    if (stated := sample.info.get("image_id")) is not None:
        return stated
    name = sample.image_id.removeprefix(source.image_id_prefix(sample.shard))[1:]  # after the / or # behind it
    return hash_bytes(name).hex() if os.path.isabs(name) else name


def _is_local_file(value: Any) -> bool:
    """Whether a field of a sample is the absolute path of an image or video, which says nothing elsewhere."""
    return isinstance(value, str) and os.path.isabs(value) and bool(file_kind(Path(value).suffix[1:].lower()))


def _without_empty(value: Any) -> Any:
    """A value without the fields that are null, not a number, binary, an empty list or an empty object."""
    if isinstance(value, Mapping):
        fields = {name: _without_empty(field) for name, field in value.items()}
        return {name: field for name, field in fields.items() if field not in (None, [], {})}
    if isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return [_without_empty(item) for item in value] if isinstance(value, list | tuple) else value


def _image_file(sample: Sample) -> tuple[str, bytes]:
    """Suffix and bytes of the image: unchanged where a tar shard may hold the format, else as png."""
    name = f"{sample.shard}/{sample.key}"
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            suffix = SUFFIXES.get(image.format or "")
    except OSError as error:
        raise ImageError(f"{name}: the image can no longer be read: {error}") from error
    if suffix:
        return suffix, sample.image
    png = io.BytesIO()
    with read_image(sample.image, name=name) as image:
        image.save(png, "PNG")
    return "png", png.getvalue()
