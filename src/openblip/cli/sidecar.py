"""A text file beside each picture with its caption, as trainers of diffusion models read them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from openblip.cli.inputs import IMAGE_SUFFIXES, ImageInput, Inputs
from openblip.cli.jsonl_file import Row
from openblip.errors import ConfigError, SourceError

_LEANS_LEFT = tuple(",.;:!?)")  # no blank stands before these


@dataclass(frozen=True, kw_only=True)
class SidecarOptions:
    """Captions in text files beside the pictures."""

    sidecar: bool = False
    """Write the captions of a.jpg to a.txt beside it, one a line; pictures that have one are left alone."""
    prefix: str = ""
    """Sidecar: stands before every caption, with a blank between."""
    suffix: str = ""
    """Sidecar: stands behind every caption, with a blank between unless it begins with one or with a comma or
    other punctuation."""
    extension: str = ".txt"
    """Sidecar: the ending of the text files, in place of the picture's."""
    overwrite: bool = False
    """Sidecar: caption also pictures that have a text file, and write it anew."""

    def __post_init__(self) -> None:
        if not self.sidecar:
            for name in ("prefix", "suffix", "extension", "overwrite"):
                if getattr(self, name) != getattr(SidecarOptions, name):
                    raise ConfigError(f"--{name} is for the text files that --sidecar writes; add --sidecar")
        ending = self.extension
        if not ending.startswith(".") or len(ending) < 2 or "/" in ending or os.sep in ending:
            raise ConfigError(f"--extension {ending!r} is no ending of a file, as .txt and .caption are")
        if ending.lower() in IMAGE_SUFFIXES:
            raise ConfigError(f"--extension {ending} is that of pictures, which would be written over")
        if len((self.prefix + self.suffix).splitlines()) > 1:
            raise ConfigError("--prefix and --suffix must be one line: each line of a text file is a caption")

    def file_of(self, image: ImageInput) -> Path:
        """The text file of a picture file."""
        return Path(str(image.origin)).with_suffix(self.extension)

    def line(self, caption: str) -> str:
        """The caption between prefix and suffix."""
        found = caption
        if self.prefix:
            found = f"{self.prefix}{'' if self.prefix[-1].isspace() or not found else ' '}{found}"
        if self.suffix:
            closed = self.suffix[0].isspace() or self.suffix.startswith(_LEANS_LEFT) or not found
            found = f"{found}{'' if closed or found[-1].isspace() else ' '}{self.suffix}"
        return found

    def write(self, image: ImageInput, rows: Sequence[Row]) -> None:
        """The text file of a picture, whole or not at all, from the rows of its captions."""
        from openblip.files import write_text

        write_text(self.file_of(image), "".join(f"{self.line(row['caption'])}\n" for row in rows))

    def choose(self, inputs: Inputs) -> tuple[Inputs, int]:
        """The pictures to write for, and how many are left alone since they have a text file.

        Raises:
            SourceError: some are no picture files, or two of them share a text file.
            ConfigError: a folder cannot be written into.
        """
        outside = [image.name for image in inputs.images if not _is_local(image)]
        outside += [f"{reject.shard}/{reject.key}" for reject in inputs.rejects]
        if outside:
            raise SourceError(
                f"{outside[0]} is no picture file on this machine, so no text file can stand beside it; for "
                "--sidecar name picture files or folders of them, or leave it out and name --out"
            )
        chosen = [image for image in inputs.images if self.overwrite or not self.file_of(image).exists()]
        self._check_shared(chosen)
        _check_writable(Path(str(image.origin)) for image in chosen)
        return Inputs(chosen, []), len(inputs.images) - len(chosen)

    def _check_shared(self, images: Iterable[ImageInput]) -> None:
        owner: dict[str, ImageInput] = {}
        shared: list[tuple[ImageInput, ImageInput]] = []
        for image in images:
            first = owner.setdefault(os.path.abspath(self.file_of(image)), image)
            if first is not image:
                shared.append((first, image))
        if shared:
            first, second = shared[0]
            more = f", and {len(shared) - 1} more such pictures" if len(shared) > 1 else ""
            raise SourceError(
                f"{first.name} and {second.name} would share {self.file_of(first)}{more}; rename or move one"
            )


def _is_local(image: ImageInput) -> bool:
    return isinstance(image.origin, str) and "://" not in image.origin


def _check_writable(pictures: Iterable[Path]) -> None:
    """ConfigError that names a folder; a picture that is not there is reported where it is read."""
    for folder in dict.fromkeys(picture.parent for picture in pictures if picture.exists()):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"{folder} cannot be written into, so its pictures can have no text files; change its "
                "permissions, or leave --sidecar out and name --out"
            )
