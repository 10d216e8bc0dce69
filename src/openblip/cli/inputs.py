"""What the SOURCE arguments of `openblip caption` name: image files, folders of images, or data sources."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openblip.errors import SourceError

if TYPE_CHECKING:
    from PIL.Image import Image

    from openblip.data.sample import Record, Reject

Identity = tuple[str | None, str]

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image to work on: `key` is its path, or its key in the data source's `shard`."""

    key: str
    shard: str | None
    origin: "Path | Record"

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

        if isinstance(self.origin, Path):
            return read_image(self.origin)
        return read_image(self.origin.read().image, name=self.name)


@dataclass(frozen=True, slots=True)
class Inputs:
    """All images that were named, each once and in order, and what could not be found."""

    images: list[ImageInput]
    rejects: list["Reject"]


def find_inputs(specs: Iterable[str], *, images: str | None = None) -> Inputs:
    """Finds the images that `specs` name.

    Args:
        specs: image files, folders (searched recursively), or data source specs.
        images: the image folder of a COCO captions file.

    Raises:
        SourceError: nothing was named, a name is not a source, or two sources have a shard of the same name.
    """
    found: dict[Identity, ImageInput] = {}
    rejects: list[Reject] = []
    origin_of_shard: dict[str, str] = {}
    for spec in specs:
        paths = _image_paths(Path(spec))
        if paths:
            found.update(((None, str(path)), ImageInput(str(path), None, path)) for path in paths)
            continue
        for shard, records, shard_rejects in _source_records(spec, images):
            if origin_of_shard.setdefault(shard, spec) != spec:
                raise SourceError(
                    f"{origin_of_shard[shard]} and {spec} both have a shard {shard}, so their keys cannot be "
                    "told apart; caption them in two commands"
                )
            found.update(((shard, record.key), ImageInput(record.key, shard, record)) for record in records)
            rejects.extend(shard_rejects)
    if not found and not rejects:
        raise SourceError(
            "there is no image to caption; name image files, folders of images or a data source"
        )
    return Inputs(list(found.values()), rejects)


def _image_paths(path: Path) -> list[Path]:
    """The image file itself, or the images below a folder; empty for anything else."""
    if path.is_dir():
        return sorted(
            file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
        )
    return [path] if path.suffix.lower() in IMAGE_SUFFIXES else []


def _source_records(spec: str, images: str | None) -> Iterator[tuple[str, list["Record"], list["Reject"]]]:
    from openblip.data.sources import open_source

    source = open_source(spec, images=images)
    for shard in source.shards():
        index = source.index(shard)
        yield shard, index.records, index.rejects
