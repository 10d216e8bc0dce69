"""A folder of images, with captions in files of the same stem: `dog.jpg` + `dog.txt` (or `dog.json`)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from openblip.data.sample import (
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    Record,
    Reject,
    Sample,
    ShardIndex,
    parse_texts,
    safe_name,
    sample_image_id,
)
from openblip.data.sources import storage
from openblip.data.sources.files import chunk_names
from openblip.errors import SourceError


@dataclass(frozen=True, slots=True)
class FolderRecord:
    """An image file and the text files beside it."""

    source: str
    shard: str
    key: str
    image_path: str
    text_paths: tuple[tuple[str, str], ...]

    def read(self) -> Sample:
        payloads = {kind: storage.read_bytes(path) for kind, path in self.text_paths}
        info, captions = parse_texts(payloads, f"{self.shard}/{self.key}")
        image_id = sample_image_id(self.source, self.shard, self.key, info)
        return Sample(self.key, self.shard, storage.read_bytes(self.image_path), captions, image_id, info)


@dataclass(slots=True)
class FolderSource:
    """The images under a folder in the order of their paths; a key is the path in the folder without
    suffix.
    """

    name: str
    images: dict[str, dict[str, str]] = field(repr=False)
    repeated: dict[str, list[str]] = field(repr=False)
    chunks: dict[str, range] = field(repr=False)

    @classmethod
    def open(cls, spec: str, directory: str) -> "FolderSource":
        files: dict[str, dict[str, str]] = {}
        repeated: dict[str, list[str]] = {}
        root = storage.canonical(directory).rstrip("/")
        for path in storage.list_files(root, recursive=True):
            key, _, suffix = safe_name(path[len(root) + 1 :]).rpartition(".")
            slot = "image" if suffix.lower() in IMAGE_SUFFIXES else suffix.lower()
            if not key or os.path.basename(key).startswith(".") or slot not in {"image", *TEXT_SUFFIXES}:
                continue
            if files.setdefault(key, {}).setdefault(slot, path) != path and slot == "image":
                repeated.setdefault(key, []).append(path)
        images = {key: slots for key, slots in files.items() if "image" in slots}
        if not images:
            raise SourceError(
                f"{spec}: no image (jpg, jpeg, png or webp), tar or parquet file in this folder"
            )
        stem = safe_name(os.path.basename(root)) or "images"
        return cls(spec, images, repeated, dict(chunk_names(stem, len(images))))

    def shards(self) -> Sequence[str]:
        return list(self.chunks)

    def index(self, shard: str) -> ShardIndex:
        rows = self.chunks[shard]
        keys = list(self.images)[rows.start : rows.stop]
        records: list[Record] = []
        for key in keys:
            slots = self.images[key]
            texts = tuple((kind, slots[kind]) for kind in TEXT_SUFFIXES if kind in slots)
            records.append(FolderRecord(self.name, shard, key, slots["image"], texts))
        rejects = [
            Reject(shard, key, f"{safe_name(os.path.basename(path))}: duplicate key, the first image stays")
            for key in keys
            for path in self.repeated.get(key, ())
        ]
        return ShardIndex(records, rejects)
