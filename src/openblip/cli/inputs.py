"""What SOURCE names in `openblip caption`, `answer` and `match`: files, folders of files or data sources."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from openblip.data.sample import (
    TEXT_SUFFIXES,
    VIDEO_SUFFIXES,
    Located,
    Reject,
    Sample,
    Selection,
    Source,
    parse_texts,
    safe_name,
)
from openblip.errors import ImageError, SourceError

IMAGE_FILE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
VIDEO_FILE_SUFFIXES = frozenset(f".{suffix}" for suffix in VIDEO_SUFFIXES)
SOURCE_SUFFIXES = frozenset((".tar", ".parquet", ".jsonl", ".csv", ".tsv", ".json"))


@dataclass
class FileSource(Source):
    """Image and video files as a source. It has one shard, whose name is empty; a key is a path or URL."""

    name: str
    paths: list[str]
    with_texts: bool = False
    """Whether samples have the texts of the .txt or .json beside the file."""

    def shards(self) -> Sequence[str]:
        return [""]

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        for number, path in enumerate(self.paths):
            if not selection.has(number):
                continue
            key = safe_name(path)
            try:
                texts = {file.suffix[1:]: file.read_bytes() for file in text_files(path)} if self.with_texts else {}
                info, captions = parse_texts(texts, key)
                sample = Sample(key, shard, b"", captions, key, info)
                if not selection.skips(sample):
                    yield Located(number, read_file(path, sample) if selection.images else sample)
            except (SourceError, ImageError) as error:
                yield Located(number, Reject(shard, key, str(error)))


def read_file(path: str, sample: Sample | None = None) -> Sample:
    """Read an image or video file into its sample; raises `ImageError`."""
    from openblip.data.sources import storage

    key = safe_name(path)
    try:
        return replace(sample or Sample(key, "", b"", (), key), image=storage.read_bytes(path))
    except OSError as error:
        raise ImageError(f"{key}: cannot be read: {error.strerror or error}") from error


def text_files(path: str) -> list[Path]:
    """The .txt and .json beside a file."""
    if "://" in path:
        return []
    beside = (Path(path).with_suffix(f".{suffix}") for suffix in TEXT_SUFFIXES)
    return [file for file in beside if file.is_file()]


def is_one_file(spec: str) -> bool:
    """Whether this names one image or video, and neither a folder nor a data source."""
    path = Path(spec)
    suffix = path.suffix.lower()
    is_image = suffix in IMAGE_FILE_SUFFIXES | VIDEO_FILE_SUFFIXES
    return not path.is_dir() and (is_image or (suffix not in SOURCE_SUFFIXES and path.is_file()))


def find_sources(
    specs: Iterable[str], *, images: str | None = None, videos: bool = False, with_texts: bool = False
) -> list[Source]:
    """Open what `specs` name, each image file once.

    Args:
        specs: image files, folders (searched recursively), or data source specs.
        images: the folder of the images that an annotation file or table names.
        videos: whether files and folders may hold videos too.
        with_texts: whether image files come with the texts beside them.

    Raises:
        SourceError: nothing is named, a name is no source, or two sources have a shard of the same name.
    """
    wanted = IMAGE_FILE_SUFFIXES | VIDEO_FILE_SUFFIXES if videos else IMAGE_FILE_SUFFIXES
    sources: list[Source] = []
    seen: set[str] = set()
    spec_of_shard: dict[str, str] = {}
    for spec in dict.fromkeys(specs):
        if paths := _image_paths(spec, wanted):
            sources.append(FileSource(spec, [path for path in paths if path not in seen], with_texts))
            seen.update(paths)
            continue
        from openblip.data.sources import open_source

        source = open_source(spec, images=images)
        for shard in source.shards():
            if (other := spec_of_shard.setdefault(shard, spec)) != spec:
                raise SourceError(
                    f"{other} and {spec} both have a shard {shard}, so their keys cannot be told apart; name them in "
                    "two commands"
                )
        sources.append(source)
    if not sources:
        raise SourceError("there is no image to work on; name image files, folders of images or a data source")
    return sources


def _image_paths(spec: str, wanted: frozenset[str]) -> list[str]:
    """The image file itself, or the images below a folder, hidden ones left out; empty for anything else."""
    path = Path(spec)
    if path.is_dir():
        return [
            str(file)
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in wanted and not file.name.startswith(".") and file.is_file()
        ]
    if path.suffix.lower() not in wanted:
        return []
    return [spec if "://" in spec else str(path)]  # a Path would take a slash from a URL


def has_texts(sources: Iterable[Source]) -> bool:
    """Whether samples may have texts of their own; image files have none unless some lie beside them."""
    return any(not isinstance(source, FileSource) or any(map(text_files, source.paths)) for source in sources)
