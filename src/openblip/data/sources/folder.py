"""A folder of images or of clips, with captions in files of the same stem: `dog.jpg` + `dog.txt` (or
`dog.json`).

The sub-folder that an image lies in is its label, as in ImageNet. `classes.json` in the folder itself says
what the classes are called, by sub-folder: `{"n02084071": "dog"}`, or a list of names: the first one is the
label, all of them are `label_names`. Sub-folders of the same name are one class.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openblip.data.sample import (
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    VIDEO_SUFFIXES,
    Record,
    Reject,
    Sample,
    ShardIndex,
    clean_text,
    parse_json_object,
    parse_texts,
    safe_name,
    sample_image_id,
)
from openblip.data.sources import storage
from openblip.data.sources.files import chunk_names
from openblip.errors import SourceError

_CLASSES = "classes"  # of a .json; beside an image of the same stem it holds its captions

Slots = dict[str, list[str]]  # what of a sample ("image", "clip", "txt", "json") -> its files


@dataclass(frozen=True, slots=True)
class FolderRecord:
    """An image file, the text files beside it, and what its class is called; its json says otherwise."""

    source: str
    shard: str
    key: str
    image_path: str
    text_paths: tuple[tuple[str, str], ...]
    class_names: tuple[str, ...] = ()

    def read(self) -> Sample:
        payloads = {kind: storage.read_bytes(path) for kind, path in self.text_paths}
        info, captions = parse_texts(payloads, f"{self.shard}/{self.key}")
        if self.class_names:
            info.setdefault("label", self.class_names[0])
        if len(self.class_names) > 1:
            info.setdefault("label_names", list(self.class_names))
        image_id = sample_image_id(self.source, self.shard, self.key, info)
        return Sample(self.key, self.shard, storage.read_bytes(self.image_path), captions, image_id, info)


@dataclass(slots=True)
class FolderSource:
    """The images under a folder, or its clips where it has no image, in the order of their paths; a key is
    the path in the folder without suffix.
    """

    name: str
    kind: str
    files: dict[str, Slots] = field(repr=False)
    class_names: Mapping[str, tuple[str, ...]] = field(repr=False)
    chunks: dict[str, range] = field(repr=False)

    @classmethod
    def open(cls, spec: str, directory: str) -> "FolderSource":
        root = storage.canonical(directory).rstrip("/")
        files = _samples(root)
        kind = "image" if any("image" in slots for slots in files.values()) else "clip"
        listed = {key: slots for key, slots in files.items() if kind in slots}
        if not listed:
            raise SourceError(
                f"{spec}: no image (jpg, jpeg, png or webp), clip (mp4, webm, mkv, avi, mov or m4v), tar or "
                "parquet file in this folder"
            )
        names: dict[str, tuple[str, ...]] = {folder: (folder,) for key in listed if (folder := _folder(key))}
        if names and _CLASSES not in listed and (paths := files.get(_CLASSES, {}).get("json")):
            names = _read_class_names(paths[0], names)
        stem = safe_name(os.path.basename(root)) or "images"
        return cls(spec, kind, listed, names, dict(chunk_names(stem, len(listed))))

    def shards(self) -> Sequence[str]:
        return list(self.chunks)

    def index(self, shard: str) -> ShardIndex:
        rows = self.chunks[shard]
        records: list[Record] = []
        rejects: list[Reject] = []
        for key in list(self.files)[rows.start : rows.stop]:
            slots = self.files[key]
            image, *repeated = slots[self.kind]
            texts = tuple((kind, slots[kind][0]) for kind in TEXT_SUFFIXES if kind in slots)
            names = self.class_names.get(_folder(key), ())
            records.append(FolderRecord(self.name, shard, key, image, texts, names))
            rejects += [
                Reject(shard, key, f"{safe_name(os.path.basename(path))}: duplicate key, the first one stays")
                for path in repeated
            ]
        return ShardIndex(records, rejects)


def _samples(root: str) -> dict[str, Slots]:
    """The files under a folder by key, in the order of their paths."""
    files: dict[str, Slots] = {}
    for path in storage.list_files(root, recursive=True):
        key, _, suffix = safe_name(path[len(root) + 1 :]).rpartition(".")
        if key and not os.path.basename(key).startswith(".") and (slot := _slot(suffix.lower())):
            files.setdefault(key, {}).setdefault(slot, []).append(path)
    return files


def _slot(suffix: str) -> str:
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "clip"
    return suffix if suffix in TEXT_SUFFIXES else ""


def _folder(key: str) -> str:
    """The name of the sub-folder that a sample lies in; empty at the top."""
    return os.path.basename(os.path.dirname(key))


def _read_class_names(path: str, folders: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The names of the class of each folder; raises `SourceError` when one has none."""
    try:
        stated = parse_json_object(storage.read_bytes(path), path)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error
    found: dict[str, tuple[str, ...]] = {}
    for folder in folders:
        value = stated.get(folder)
        names: list[Any] = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            what = f"{folder}: {value!r:.80}" if folder in stated else f"nothing for {folder}"
            raise SourceError(
                f"{path}: must map the name of every sub-folder with images to the name of its class, or to "
                f"a list of names; it has {what}"
            )
        found[folder] = tuple(clean_text(name) for name in names)
    return found
