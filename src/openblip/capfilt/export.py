"""The pairs that a CapFilt run keeps, written out with their images."""

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from openblip.capfilt.folder import CapFiltFolder, config_hash
from openblip.data.captions import read_captions
from openblip.data.images import read_image
from openblip.data.reader import read_source
from openblip.data.sample import Reject, Sample, Source, file_kind
from openblip.data.sources import open_source
from openblip.errors import ConfigError, ImageError
from openblip.files import atomic_file, hash_bytes, read_json, write_json, write_text
from openblip.progress import Progress

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
MARKER = "export.json"
# What Hugging Face's datasets reads first in a folder. Without it, it would take export.json for data, the types of all
# samples from the first five, and only images with the first one's ending.
CARD = """---
configs:
- config_name: default
  data_files: "*.tar"
dataset_info:
  features:
{}---
Image-text pairs that CapFilt of OpenBLIP kept, as tar shards of webdataset.
"""
# A dot ends the key of a member's name, and no name may leave the folder that it is unpacked in.
_UNSAFE = re.compile(r"[%.\\\x00-\x1f\x7f]|^/")


class ExportSummary(NamedTuple):
    """What was written, and the kept pairs that were not because their original can no longer be read."""

    pairs: int
    shards: int
    rejects: list[Reject]


def export(directory: str | Path, out: str | Path) -> ExportSummary:
    """Write what `capfilt:DIR` keeps to `out/<shard>.tar`.

    A pair is `<key>.jpg` (or png, webp: the original bytes and suffix; other formats become png) and `<key>.json`: the
    sample's own json with `caption`, `source`, `itm`, `itc`, `logprob`, `image_id` and the origin's shard and key.
    Fields without a value are left out, `logprob` of web texts among them, since readers that infer types from the
    first samples fail on them. Keys are those of `capfilt:DIR`, with dots and other characters that a tar key cannot
    hold percent-encoded. The same data gives the same bytes, in any folder. A shard of which nothing is kept is not
    written.

    Raises:
        ConfigError: `directory` is not a CapFilt run, or `out` holds something other than an export of it.
        SourceError: the original data is gone, or no shard of the run is finished.
    """
    folder, target = CapFiltFolder(directory), Path(out)
    manifest = folder.read_manifest()
    source = open_source(f"capfilt:{directory}")
    shards = source.shards()
    path = target / MARKER
    first = shards[0]
    if path.is_file():
        earlier = read_json(path)
        first = earlier.get("shard", first)
        # Earlier versions stated the hash of the settings, and no shard.
        run = _texts_hash(folder, first) if "shard" in earlier else config_hash(manifest)
        if run is None or earlier.get("run") != run:
            raise ConfigError(f"{target} holds the export of another CapFilt run; choose another --out")
    elif target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty and no export of a CapFilt run; choose another --out")
    marker = {"run": _texts_hash(folder, first), "shard": first}
    marker |= {"threshold": manifest["threshold"], "openblip": manifest["openblip"]}
    write_json(path, {**marker, "complete": False})
    pairs: dict[str, int] = {}
    types = {"__key__": "string", "json": "json"}  # by column of the card
    rejects: list[Reject] = []
    with Progress("exporting", total=len(shards), unit="shards") as bar:
        for shard in shards:
            pairs[shard] = _write_tar(target / f"{shard}.tar", source, shard, folder, rejects, types)
            bar.advance()
    pairs = {shard: count for shard, count in pairs.items() if count}
    for tar in target.glob("*.tar"):
        if tar.stem not in pairs:  # nothing of it is kept now
            tar.unlink()
    columns = (f"  - name: {name}\n    dtype: {kind}\n" for name, kind in sorted(types.items()))
    write_text(target / "README.md", CARD.format("".join(columns)))
    write_json(path, {**marker, "complete": True, "pairs": pairs})
    return ExportSummary(sum(pairs.values()), len(pairs), rejects)


def _texts_hash(folder: CapFiltFolder, shard: str) -> str | None:
    """A hash of the texts of a shard, which tells runs apart wherever they lie; None where the run lacks the shard."""
    if not folder.is_done(shard):
        return None
    texts = read_captions(folder.root, shard).select(["key", "source", "index", "caption"])
    return hash_bytes(json.dumps(texts.to_pydict())).hex()


def _write_tar(
    path: Path, source: Source, shard: str, folder: CapFiltFolder, rejects: list[Reject], types: dict[str, str]
) -> int:
    """Write the kept pairs of a shard, and return their number.

    Pairs that cannot be read join `rejects`, and endings of images join `types`.
    """
    rows = read_captions(folder.root, shard).to_pylist()
    by_key = {f"{row['key']}-{row['source']}-{row['index']}": row for row in rows}  # keys of `capfilt:DIR`
    num_pairs = 0
    with atomic_file(path) as partial, tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
        for entry in read_source(source, _image_file, shards=[shard]):
            if isinstance(entry, Reject):
                rejects.append(entry)
                continue
            sample, (suffix, image) = entry
            key, row = tar_key(sample.key), by_key[sample.key]
            info = {name: value for name, value in sample.info.items() if name not in ("caption", "captions")}
            info |= {name: os.path.basename(path) for name, path in info.items() if _is_local_file(path)}
            info |= {name: row[name] for name in ("caption", "source", "itm", "itc", "logprob")}
            info |= {"image_id": _image_id(sample, source), "origin_shard": row["shard"], "origin_key": row["key"]}
            for name, payload in (
                (f"{key}.{suffix}", image),
                (f"{key}.json", json.dumps(_without_empty(info), default=str).encode()),
            ):
                member = tarfile.TarInfo(name)  # time, owner and mode stay the constants of TarInfo
                member.size = len(payload)
                archive.addfile(member, io.BytesIO(payload))
            types[suffix] = "image"
            num_pairs += 1
    return num_pairs


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
