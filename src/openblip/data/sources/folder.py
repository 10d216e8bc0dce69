"""A folder of images or of videos, with texts in files of the same stem: `dog.jpg` and `dog.txt` (or `dog.json`).

The sub-folder that an image lies in is its label, as in ImageNet. `classes.json` in the folder itself says what the
classes are called, by sub-folder: `{"n02084071": "dog"}`, or a list of names: the first one is the label, all of them
are `label_names`. Sub-folders of the same name are one class.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from openblip.data import sample as samples
from openblip.data.sample import TEXT_SUFFIXES, Sample, safe_name
from openblip.data.sources import storage
from openblip.data.sources.rows import ImageRow, RowSource, chunk_names, cut_rows
from openblip.errors import SourceError

_CLASSES = "classes"  # of a .json; beside an image of the same stem it holds its captions


@dataclass(frozen=True, slots=True)
class FolderRow(ImageRow):
    """An image file with the text files beside it; `info` has what its folder says of it."""

    text_paths: Mapping[str, str] = field(default_factory=dict)

    def texts(self, source: str, shard: str) -> Sample:
        payloads = {kind: storage.read_bytes(path) for kind, path in self.text_paths.items()}
        sample = samples.sample_of_texts(source, shard, self.sample_key, payloads)
        missing = {name: value for name, value in self.info.items() if name not in sample.info}
        return replace(sample, info={**sample.info, **missing})


@dataclass
class FolderSource(RowSource):
    """The images under a folder, or its videos where it has none. A key is the path in the folder without suffix."""

    name: str
    kind: str
    files: dict[str, dict[str, list[str]]] = field(repr=False)  # key -> kind ("image", "txt", ...) -> paths
    classes: Mapping[str, list[str]] = field(repr=False)  # name of a sub-folder -> names of its class
    chunks: dict[str, range] = field(repr=False)

    @classmethod
    def open(cls, spec: str, directory: str) -> "FolderSource":
        """List the folder, once; raises `SourceError`."""
        root = storage.canonical(directory).rstrip("/")
        listed: dict[str, dict[str, list[str]]] = {}
        for path in storage.list_files(root, recursive=True):
            key, _, suffix = safe_name(path[len(root) + 1 :]).rpartition(".")
            if key and not os.path.basename(key).startswith(".") and (kind := samples.file_kind(suffix.lower())):
                listed.setdefault(key, {}).setdefault(kind, []).append(path)
        kind = "image" if any("image" in kinds for kinds in listed.values()) else "video"
        files = {key: kinds for key, kinds in listed.items() if kind in kinds}
        if not files:
            what = "image (jpg, jpeg, png or webp), video (mp4, webm, mkv, avi, mov or m4v), tar or parquet file"
            raise SourceError(f"{spec}: no {what} in this folder")
        classes = {name: [name] for key in files if (name := _sub_folder(key))}
        if classes and _CLASSES not in files and (paths := listed.get(_CLASSES, {}).get("json")):
            classes = _read_classes(paths[0], classes)
        stem = safe_name(os.path.basename(root)) or "images"
        return cls(spec, kind, files, classes, chunk_names(stem, cut_rows(len(files))))

    def num_samples(self, shard: str) -> int:
        return sum(1 for _ in self.rows(shard))

    def file_name(self, shard: str) -> str:
        return ""  # keys are unique in the whole folder, and its name is a part of the source's path

    def rows(self, shard: str) -> Iterator[tuple[str, ImageRow]]:
        chunk = self.chunks[shard]
        for key in itertools.islice(self.files, chunk.start, chunk.stop):
            kinds, names = self.files[key], self.classes.get(_sub_folder(key), [])
            texts = {kind: kinds[kind][0] for kind in TEXT_SUFFIXES if kind in kinds}
            info: dict[str, object] = {"label": names[0]} if names else {}
            if len(names) > 1:
                info["label_names"] = names
            for path in kinds[self.kind]:
                yield safe_name(os.path.basename(path)), FolderRow(key, (path,), info=info, text_paths=texts)


def _sub_folder(key: str) -> str:
    """The name of the sub-folder that a sample lies in; empty at the top."""
    return os.path.basename(os.path.dirname(key))


def _read_classes(path: str, folders: Iterable[str]) -> dict[str, list[str]]:
    """The names of the class of each folder; raises `SourceError` when one has none."""
    with storage.source_errors(path):
        stated = samples.parse_json_object(storage.read_bytes(path), path)
    classes: dict[str, list[str]] = {}
    for folder in folders:
        value = stated.get(folder)
        names: list[Any] = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            what = f"{folder}: {value!r:.80}" if folder in stated else f"nothing for {folder}"
            wanted = "the name of every sub-folder with images to the name of its class, or to a list of names"
            raise SourceError(f"{path}: must map {wanted}; it has {what}")
        classes[folder] = [samples.clean_text(name) for name in names]
    return classes
