"""Pictures for the report: for each fate of an image's web and synthetic text a few images, chosen by
hash."""

import base64
import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from openblip.capfilt.folder import CapFiltFolder
from openblip.capfilt.scores import COMBINATIONS, read_scores
from openblip.data.captions import is_kept
from openblip.data.images import read_image
from openblip.data.sources import open_source
from openblip.errors import OpenBlipError

IMAGES_PER_COMBINATION = 8
MAX_SHARDS = 16
"""Shards that pictures are drawn from: a page of a thousand shards must not open a thousand archives."""
THUMBNAIL_SIZE = 360


@dataclass(frozen=True, kw_only=True)
class ShownText:
    source: str
    caption: str
    itm: float
    itc: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image of the gallery; `picture` is a data URI, or None when the original is no longer there."""

    shard: str
    key: str
    texts: tuple[ShownText, ...]
    picture: str | None


Gallery = dict[tuple[bool, bool], list[ShownImage]]


def build_gallery(folder: CapFiltFolder, manifest: Mapping[str, Any]) -> Gallery:
    """Images by (web kept, synthetic kept), the same for the same rows and threshold.

    Reads the pictures from the original shards; where those are gone, the texts are shown without.
    """
    threshold = manifest["threshold"]
    shards = sorted(folder.done_shards(), key=_hash)[:MAX_SHARDS]
    chosen: dict[tuple[bool, bool], list[tuple[int, str, int]]] = {name: [] for name in COMBINATIONS}
    for shard in shards:
        scores = read_scores(folder.captions(shard), threshold)
        for combination, rows in scores.combinations.items():
            order = np.random.default_rng(_hash(shard)).permutation(rows)[:IMAGES_PER_COMBINATION]
            # rank first, so that every shard gives its first picture before one gives its second
            chosen[combination] += [(rank, shard, int(row)) for rank, row in enumerate(order)]
    picked = {name: sorted(found)[:IMAGES_PER_COMBINATION] for name, found in chosen.items()}
    shown: dict[tuple[str, int], ShownImage] = {}
    for shard in sorted({shard for found in picked.values() for _, shard, _ in found}):
        rows_of_shard = [row for found in picked.values() for _, name, row in found if name == shard]
        for row, image in _show(folder, manifest, shard, rows_of_shard):
            shown[shard, row] = image
    return {name: [shown[shard, row] for _, shard, row in found] for name, found in picked.items()}


def _show(
    folder: CapFiltFolder, manifest: Mapping[str, Any], shard: str, rows: list[int]
) -> Iterator[tuple[int, ShownImage]]:
    """The images whose texts start at `rows` of the shard's caption file."""
    table = pq.read_table(folder.captions(shard))
    keys = table["key"]
    texts_of: dict[int, list[ShownText]] = {}
    for first in rows:
        key = keys[first].as_py()
        texts_of[first] = []
        for row in table.slice(first).to_batches(max_chunksize=64)[0].to_pylist():
            if row["key"] != key:
                break
            kept = bool(is_kept(np.float32(row["itm"]), manifest["threshold"]))
            texts_of[first].append(
                ShownText(
                    source=row["source"], caption=row["caption"], itm=row["itm"], itc=row["itc"], kept=kept
                )
            )
    pictures = _pictures(manifest, shard, {keys[first].as_py() for first in rows})
    for first, texts in texts_of.items():
        key = keys[first].as_py()
        yield first, ShownImage(shard=shard, key=key, texts=tuple(texts), picture=pictures.get(key))


def _pictures(manifest: Mapping[str, Any], shard: str, keys: set[str]) -> dict[str, str]:
    """Thumbnails, as data URIs, of the wanted samples that can still be read."""
    pictures = {}
    try:
        source = open_source(manifest["source"], images=manifest["images"])
        records = [record for record in source.index(shard).records if record.key in keys]
    except (OpenBlipError, OSError):
        return {}  # the originals moved: the page says so at each picture
    for record in records:
        try:
            picture = read_image(record.read().image, name=record.key)
        except (OpenBlipError, OSError):
            continue
        picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=82)
        pictures[record.key] = "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
    return pictures


def _hash(text: str) -> int:
    """Stable across processes, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
