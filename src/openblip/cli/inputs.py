"""What SOURCE names in `openblip caption`, `answer` and `match`: files, folders or data sources."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openblip.data.sample import TEXT_SUFFIXES, VIDEO_SUFFIXES, Sample, parse_texts, safe_name
from openblip.errors import SourceError

if TYPE_CHECKING:
    from PIL.Image import Image

    from openblip.data.sample import Record, Reject

Identity = tuple[str | None, str]

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
CLIP_SUFFIXES = frozenset(f".{suffix}" for suffix in VIDEO_SUFFIXES)
SOURCE_SUFFIXES = frozenset((".tar", ".parquet", ".jsonl", ".csv", ".tsv", ".json"))


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image or clip to work on: `key` is its path or URL, or its key in the data source's `shard`."""

    key: str
    shard: str | None
    origin: "str | Record"

    @property
    def identity(self) -> Identity:
        """What tells it apart from every other image of the command."""
        return self.shard, self.key

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.key if self.shard is None else f"{self.shard}/{self.key}"

    def read(self) -> "Image":
        """The decoded RGB image; raises `ImageError`, `SourceError` or `OSError`."""
        from openblip.data.images import read_image

        if isinstance(self.origin, str):
            return read_image(self.origin, name=self.name)
        return read_image(self.origin.read().image, name=self.name)

    def read_sample(self) -> Sample:
        """The encoded image or clip with its texts: the source's, or those in the .txt or .json beside it.

        Raises `ImageError`, `SourceError` or `OSError`.
        """
        if not isinstance(self.origin, str):
            return self.origin.read()
        from openblip.data.sources import storage
        from openblip.errors import ImageError

        try:
            payload = storage.read_bytes(self.origin)
        except OSError as error:
            raise ImageError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        texts = {file.suffix[1:]: file.read_bytes() for file in self.files_of_texts()}
        info, captions = parse_texts(texts, self.name)
        return Sample(self.key, "", payload, captions, self.key, info)

    def files_of_texts(self) -> list[Path]:
        """The .txt and .json beside an image file."""
        if not isinstance(self.origin, str) or "://" in self.origin:
            return []
        beside = (Path(self.origin).with_suffix(f".{suffix}") for suffix in TEXT_SUFFIXES)
        return [file for file in beside if file.is_file()]


@dataclass(frozen=True, slots=True)
class Inputs:
    """All images that were named, each once and in order, and what could not be found."""

    images: list[ImageInput]
    rejects: list["Reject"]

    @property
    def may_have_texts(self) -> bool:
        """Whether any of them can bring texts of its own: image files without some beside them do not."""
        return bool(self.rejects) or any(
            not isinstance(image.origin, str) or image.files_of_texts() for image in self.images
        )


def names_one_file(spec: str) -> bool:
    """Whether this is a picture or a clip itself, and no folder or data source of them."""
    path = Path(spec)
    suffix = path.suffix.lower()
    if path.is_dir():
        return False
    return suffix in IMAGE_SUFFIXES | CLIP_SUFFIXES or (suffix not in SOURCE_SUFFIXES and path.is_file())


def is_clip_file(spec: str) -> bool:
    """Whether the file, which `names_one_file`, is called as a clip is."""
    return Path(spec).suffix.lower() in CLIP_SUFFIXES


def find_inputs(specs: Iterable[str], *, images: str | None = None, clips: bool = False) -> Inputs:
    """Finds the images that `specs` name.

    Args:
        specs: image files, folders (searched recursively), or data source specs.
        images: the folder of the pictures that an annotation file or table names.
        clips: clips are wanted as images are.

    Raises:
        SourceError: nothing was named, a name is not a source, or two sources have a shard of the same name.
    """
    wanted = IMAGE_SUFFIXES | CLIP_SUFFIXES if clips else IMAGE_SUFFIXES
    found: dict[Identity, ImageInput] = {}
    rejects: list[Reject] = []
    origin_of_shard: dict[str, str] = {}
    for spec in specs:
        files = [ImageInput(safe_name(path), None, path) for path in _files(spec, wanted)]
        if files:
            found.update((file.identity, file) for file in files)
            continue
        for shard, records, shard_rejects in _source_records(spec, images):
            if origin_of_shard.setdefault(shard, spec) != spec:
                raise SourceError(
                    f"{origin_of_shard[shard]} and {spec} both have a shard {shard}, so their keys cannot be "
                    "told apart; name them in two commands"
                )
            found.update(((shard, record.key), ImageInput(record.key, shard, record)) for record in records)
            rejects.extend(shard_rejects)
    if not found and not rejects:
        raise SourceError(
            "there is no image to work on; name image files, folders of images or a data source"
        )
    return Inputs(list(found.values()), rejects)


def _files(spec: str, wanted: frozenset[str]) -> list[str]:
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


def _source_records(spec: str, images: str | None) -> Iterator[tuple[str, list["Record"], list["Reject"]]]:
    from openblip.data.sources import open_source

    source = open_source(spec, images=images)
    for shard in source.shards():
        index = source.index(shard)
        yield shard, index.records, index.rejects
