"""A folder of images or of videos, with texts in files of the same stem: `dog.jpg` and `dog.txt` (or `dog.json`).

Texts may also be the rows of a `metadata.csv` or `metadata.jsonl` in any of its folders, as in Hugging Face's
imagefolder: `file_name` says which image a row is about, and the other columns are those of tables. Of several rows
about an image, all captions count. Files whose names begin with a dot, and what lies in such folders, are not used.

The sub-folder that an image without such a row lies in is its label, as in ImageNet. `classes.json` in the folder
itself says what the classes are called, by sub-folder: `{"n02084071": "dog"}`, or a list of names: the first one is the
label, all of them are `label_names`. Sub-folders of the same name are one class.
"""

import contextlib
import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from openblip.data import sample as samples
from openblip.data.config import SourceOptions
from openblip.data.sample import TEXT_SUFFIXES, Sample, ending_of, safe_name
from openblip.data.sources import rows, storage
from openblip.data.sources.dialect import Dialect, Fields, open_rows
from openblip.data.sources.rows import ImageRow, RowSource, chunk_names, cut_rows
from openblip.errors import SourceError

_CLASSES = "classes.json"  # beside an image of the same stem it holds its captions
_METADATA = frozenset({"metadata.csv", "metadata.jsonl"})
_IMAGE_COLUMNS = ("file_name", *rows.IMAGE_COLUMNS)  # of these files


class _MetadataRow(NamedTuple):
    """A row of a metadata file as it is written there."""

    place: str
    dialect: Dialect
    data: bytes
    options: SourceOptions

    def parse(self) -> tuple[str, Fields]:
        """The name of the image that the row is about, and the row; raises `SourceError`."""
        try:
            fields = self.dialect.parse(self.data)
            columns = rows.named_columns(self.options.image_column, _IMAGE_COLUMNS)
            return rows.file_name_of(fields, rows.find_column(fields, columns, "image")), fields
        except SourceError as error:
            raise SourceError(f"{self.place}: {error}") from error


@dataclass(frozen=True, slots=True)
class FolderRow(ImageRow):
    """An image file, and where its texts are; `info` has what its folder says of it."""

    text_paths: Mapping[str, str] = field(default_factory=dict)
    stated: Sequence[_MetadataRow] = ()
    caption_column: str | None = None  # of metadata files, and the field of json files

    def texts(self, source: str, shard: str) -> Sample:
        payloads = {kind: storage.read_bytes(path, samples.MOST_TEXT_BYTES) for kind, path in self.text_paths.items()}
        sample = samples.sample_of_texts(source, shard, self.sample_key, payloads, self.caption_column, by_line=True)
        info, captions = {**self.info}, [*sample.captions]
        for _, fields in (row.parse() for row in self.stated):
            columns = rows.named_columns(self.caption_column, rows.CAPTION_COLUMNS)
            captions += (text for text in rows.row_captions(fields, columns) if text not in captions)
            info = {**rows.task_fields(fields), **info}
        info.update(sample.info)
        image_id = samples.image_id_of(source, shard, self.sample_key, info)
        return replace(sample, info=info, captions=tuple(captions), image_id=image_id)


class FolderFiles(NamedTuple):
    """What is in a folder and all below it."""

    rows: list[FolderRow]
    unused: Counter[str]  # files of no sample, by ending
    classes: str | None  # the path of `classes.json`

    @classmethod
    def of(cls, root: str, options: SourceOptions, kinds: Sequence[str] = ()) -> "FolderFiles":
        """List a folder: the files of these kinds ("image", "video"), or without them its images, or its videos where
        it has no image. A key is the path in the folder without suffix, or with it where images differ in it alone.
        Raises `SourceError` for a metadata file that cannot be read.
        """
        media: defaultdict[str, list[str]] = defaultdict(list)  # by kind, paths within the folder
        texts: defaultdict[str, dict[str, str]] = defaultdict(dict)  # by path without suffix, and kind
        metadata: list[str] = []
        unused: Counter[str] = Counter()
        for name in (path[len(root) + 1 :] for path in storage.list_files(root, recursive=True)):
            stem, _, suffix = name.rpartition(".")
            kind = samples.file_kind(suffix.lower()) if os.path.basename(stem) else ""
            if samples.is_hidden(name) or any(part.startswith(".") for part in name.split("/")):
                unused["hidden"] += 1
            elif os.path.basename(name) in _METADATA:
                metadata.append(name)
            elif not os.path.basename(name):
                unused["folder that cannot be opened"] += 1
            elif kind in TEXT_SUFFIXES and texts[stem].setdefault(kind, name) == name:
                continue
            elif kind in ("image", "video"):
                media[kind].append(name)
            else:
                unused[ending_of(name)] += 1
        kinds = kinds or (("image",) if media["image"] else ("video",))
        names = sorted(name for kind in kinds for name in media[kind])
        stated, column = _read_metadata(root, metadata, options, unused), options.caption_column
        keys = _keys(names)
        listed: list[FolderRow] = []
        for name in [*names, *sorted(stated.keys() - {*names})]:  # a row may be about a file that is not there
            beside = {kind: path for kind, path in texts.get(name, {}).items() if kind != "json"}  # dog.jpg.txt
            beside |= texts.get(name.rpartition(".")[0], {})
            in_order = {kind: storage.join(root, beside[kind]) for kind in TEXT_SUFFIXES if kind in beside}
            path = storage.join(root, name)
            about, key = stated.get(name, ()), keys.get(name, name)
            listed.append(FolderRow(key, (path,), text_paths=in_order, stated=about, caption_column=column))
        used = {path for row in listed for path in row.text_paths.values()}
        unread = [name for kind in media.keys() - {*kinds} for name in media[kind]]
        unread += (name for paths in texts.values() for name in paths.values() if storage.join(root, name) not in used)
        has_classes = _CLASSES in unread
        unused.update(ending_of(name) for name in unread if name != _CLASSES)
        return cls(listed, unused, storage.join(root, _CLASSES) if has_classes else None)


def _keys(names: Iterable[str]) -> dict[str, str]:
    """The key of each file: its name without suffix, or the whole name where another file has that key."""
    keys = {name: name.rpartition(".")[0] for name in names}
    while True:
        count = Counter(keys.values())
        shared = [name for name, key in keys.items() if count[key] > 1 and key != name]
        if not shared:
            return keys
        keys.update((name, name) for name in shared)


def _read_metadata(
    root: str, names: Iterable[str], options: SourceOptions, unused: Counter[str]
) -> dict[str, list[_MetadataRow]]:
    """The rows of metadata files by the file that they are about; raises `SourceError`. A row that names none is listed
    by its place. A file in which no row names one is not used.
    """
    stated: defaultdict[str, list[_MetadataRow]] = defaultdict(list)
    for name in names:
        path = storage.join(root, name)
        with open_rows(path) as (dialect, found):
            listed = list(found)
        if options.image_column or options.caption_column:
            rows.check_rows(dialect, listed, options, path)
        lines = [_MetadataRow(f"{name} line {n}", dialect, data, options) for n, _, data in listed]
        images: list[str | None] = []
        for row in lines:
            image = None
            with contextlib.suppress(SourceError):
                image = posixpath.normpath(posixpath.join(posixpath.dirname(name), row.parse()[0]))
            images.append(image)
        if any(images):
            for image, row in zip(images, lines, strict=True):
                stated[image or row.place].append(row)
        else:
            unused[ending_of(name)] += 1
    return stated


@dataclass
class FolderSource(RowSource):
    """The images under a folder, or its videos where it has none."""

    name: str
    files: list[FolderRow] = field(repr=False)
    classes: Mapping[str, list[str]] = field(repr=False)  # name of a sub-folder -> names of its class
    chunks: dict[str, range] = field(repr=False)
    unused: Mapping[str, Counter[str]] = field(repr=False)
    option_names: Set[str] = frozenset()

    @classmethod
    def open(cls, spec: str, directory: str, options: SourceOptions) -> "FolderSource":
        """List the folder, once; raises `SourceError`."""
        root = storage.canonical(directory).rstrip("/")
        files = FolderFiles.of(root, options)
        stem = safe_name(os.path.basename(root)) or "images"
        classes = {name: [name] for row in files.rows if not row.stated and (name := _sub_folder(row))}
        if classes and files.classes is not None:
            classes = _read_classes(files.classes, classes)
        chunks = chunk_names(stem, cut_rows(len(files.rows)))
        source = cls(spec, files.rows, classes, chunks, {stem: files.unused}, option_names_of(files.rows))
        if not files.rows:
            unused = samples.unused_line([files.unused])
            what = "no image (jpg, png, ...), video (mp4, ...), tar or parquet file in this folder"
            raise SourceError(f"{spec}: {what}{unused and f'; {unused}'}")
        return source

    def num_samples(self, shard: str) -> int:
        return len(self.chunks[shard])

    def file_name(self, shard: str) -> str:
        return ""  # keys are unique in the whole folder, and its name is a part of the source's path

    def file_state(self, shard: str) -> Mapping[str, Any]:
        """Of all images of the shard together: their number and size, and the latest change of one."""
        chunk = self.chunks[shard]
        return storage.files_state([row.image[0] for row in self.files[chunk.start : chunk.stop]])

    def rows(self, shard: str) -> Iterator[tuple[str, ImageRow]]:
        for row in self.files[self.chunks[shard].start : self.chunks[shard].stop]:
            names = [] if row.stated else self.classes.get(_sub_folder(row), [])
            info: dict[str, object] = {"label": names[0]} if names else {}
            if len(names) > 1:
                info["label_names"] = names
            yield safe_name(os.path.basename(row.image[0])), replace(row, info=info)


def option_names_of(files: Iterable[FolderRow]) -> Set[str]:
    """The options that matter for files: columns are those of metadata files, and a caption's that of json files."""
    named = {"image_column", "caption_column"}
    return named if any(row.stated for row in files) else {"caption_column"}


def _sub_folder(row: FolderRow) -> str:
    """The name of the sub-folder that a sample lies in; empty at the top."""
    return os.path.basename(os.path.dirname(row.sample_key))


def _read_classes(path: str, folders: Iterable[str]) -> dict[str, list[str]]:
    """The names of the class of each folder; raises `SourceError` when one has none."""
    stated = storage.read_object(path)
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
