"""The bootstrapped pairs as tar shards, for any trainer that reads webdataset's layout."""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from openblip.capfilt.folder import CapFiltFolder, read_json, write_atomically, write_json
from openblip.capfilt.manifest import config_hash
from openblip.data.captions import read_captions
from openblip.data.images import read_image
from openblip.data.sample import Record, Reject, Sample
from openblip.data.sources import open_source
from openblip.errors import ConfigError, ImageError, SourceError
from openblip.progress import Progress

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
MARKER = "export.json"
# A dot ends the key of a member's name, and no name may climb out of the folder it is unpacked in.
_UNSAFE = re.compile(r"[%.\\\x00-\x1f\x7f]|^/")


@dataclass(kw_only=True)
class ExportSummary:
    """What was written, and the kept pairs that were not because their original can no longer be read."""

    pairs: int = 0
    shards: int = 0
    rejects: list[Reject] = field(default_factory=list)


def export(directory: str | Path, out: str | Path) -> ExportSummary:
    """Writes what `capfilt:DIR` keeps to `out/<shard>.tar`, and returns what was written.

    A pair is `<key>.jpg` (or png, webp: the original bytes and suffix; other formats become png) and
    `<key>.json`: the sample's own json with `caption`, `source`, `itm`, `itc`, `logprob`, `image_id` and the
    origin's shard and key. Keys are those of `capfilt:DIR`, with dots and other characters that a tar key
    cannot hold percent-encoded. The same input gives the same bytes. A shard of which nothing is kept is not
    written.

    Raises:
        ConfigError: `directory` is no CapFilt run, or `out` holds something other than an export of it.
        SourceError: the original data is gone, or no shard of the run is finished.
    """
    folder, target = CapFiltFolder(Path(directory)), Path(out)
    manifest = folder.read_manifest()
    source = open_source(f"capfilt:{directory}")
    shards = source.shards()
    marker = {
        "run": config_hash(manifest),
        "threshold": manifest["threshold"],
        "openblip": manifest["openblip"],
    }
    _claim(target, marker)
    summary = ExportSummary()
    written: dict[str, int] = {}
    with Progress("exporting", total=len(shards), unit="shards") as bar:
        for shard in shards:
            index = source.index(shard)
            summary.rejects += index.rejects
            if index.records:
                scores = _scores_by_key(folder, shard)
                rejects: list[Reject] = []
                write = partial(_write_tar, records=index.records, scores=scores, rejects=rejects)
                write_atomically(target / f"{shard}.tar", write)
                summary.rejects += rejects
                written[shard] = len(index.records) - len(rejects)
            bar.advance()
    for stale in target.glob("*.tar"):
        if stale.stem not in written:
            stale.unlink()
    write_json(target / MARKER, {**marker, "complete": True, "pairs": written})
    summary.pairs, summary.shards = sum(written.values()), len(written)
    return summary


def _claim(target: Path, marker: Mapping[str, Any]) -> None:
    """Marks the folder as this run's export, or refuses one that is something else."""
    path = target / MARKER
    if path.is_file():
        if read_json(path).get("run") != marker["run"]:
            raise ConfigError(f"{target} holds the export of another CapFilt run; choose another --out")
    elif target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty and no export of a CapFilt run; choose another --out")
    target.mkdir(parents=True, exist_ok=True)
    write_json(path, {**marker, "complete": False})


def _scores_by_key(folder: CapFiltFolder, shard: str) -> dict[str, dict[str, Any]]:
    """The rows of a shard by the key that `capfilt:DIR` gives each text."""
    rows = read_captions(folder.root, shard).to_pylist()
    return {f"{row['key']}-{row['source']}-{row['index']}": row for row in rows}


def _write_tar(
    path: Path, records: list[Record], scores: Mapping[str, Mapping[str, Any]], rejects: list[Reject]
) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for record in records:
            try:
                members = list(_members(record.read(), scores[record.key]))
            except (SourceError, ImageError, OSError) as error:
                rejects.append(Reject(record.shard, record.key, str(error)))
                continue
            for name, payload in members:
                member = tarfile.TarInfo(name)  # time, owner and mode stay the constants of TarInfo
                member.size = len(payload)
                archive.addfile(member, io.BytesIO(payload))


def _members(sample: Sample, row: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    key = tar_key(sample.key)
    suffix, image = _image_file(sample)
    yield f"{key}.{suffix}", image
    own = {name: value for name, value in sample.info.items() if name not in ("caption", "captions")}
    info = {
        **own,
        "caption": row["caption"],
        "source": row["source"],
        "itm": row["itm"],
        "itc": row["itc"],
        "logprob": row["logprob"],
        "image_id": sample.image_id,
        "origin_shard": row["shard"],
        "origin_key": row["key"],
    }
    yield f"{key}.json", json.dumps(info).encode()


def tar_key(key: str) -> str:
    """`key` as the name of a tar member: unsafe characters percent-encoded, different keys stay different."""
    return _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", key)


def _image_file(sample: Sample) -> tuple[str, bytes]:
    """Suffix and bytes of the image: as they are where a tar shard may hold the format, else as png."""
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            suffix = SUFFIXES.get(image.format or "")
    except OSError as error:
        raise ImageError(f"{sample.shard}/{sample.key}: the image can no longer be read: {error}") from error
    if suffix:
        return suffix, sample.image
    encoded = io.BytesIO()
    read_image(sample.image, name=f"{sample.shard}/{sample.key}").save(encoded, "PNG")
    return "png", encoded.getvalue()
