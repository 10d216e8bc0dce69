"""A text file beside each image with its captions, as trainers of diffusion models read them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openblip.cli.inputs import IMAGE_FILE_SUFFIXES, FileSource
from openblip.data.sample import Source
from openblip.errors import ConfigError, SourceError
from openblip.files import write_text

_NO_SPACE_BEFORE = tuple(",.;:!?)")


@dataclass(frozen=True, kw_only=True)
class SidecarOptions:
    """Captions in text files beside the images."""

    sidecar: bool = False
    """Write the captions of a.jpg to a.txt beside it, one a line; images that have one are left alone."""
    prefix: str = ""
    """Sidecar: stands before every caption, with a space between."""
    suffix: str = ""
    """Sidecar: stands behind every caption, with a space between unless it begins with one or with punctuation."""
    extension: str = ".txt"
    """Sidecar: the ending of the text files, in place of the image's."""
    overwrite: bool = False
    """Sidecar: caption also images that have a text file, and write it anew."""

    def __post_init__(self) -> None:
        if not self.sidecar:
            for name in ("prefix", "suffix", "extension", "overwrite"):
                if getattr(self, name) != getattr(SidecarOptions, name):
                    raise ConfigError(f"--{name} is for the text files that --sidecar writes; add --sidecar")
        ending = self.extension
        if not ending.startswith(".") or len(ending) < 2 or "/" in ending or os.sep in ending:
            raise ConfigError(f"--extension {ending!r} is no ending of a file, as .txt and .caption are")
        if ending.lower() in IMAGE_FILE_SUFFIXES:
            raise ConfigError(f"--extension {ending} is that of images, which would be written over")
        if len((self.prefix + self.suffix).splitlines()) > 1:
            raise ConfigError("--prefix and --suffix must be one line: each line of a text file is a caption")

    def text_file(self, image: str) -> Path:
        """Return the path of an image's text file."""
        return Path(image).with_suffix(self.extension)

    def line(self, caption: str) -> str:
        """Put a caption between prefix and suffix."""
        text = caption
        if self.prefix:
            text = f"{self.prefix}{'' if self.prefix[-1].isspace() or not text else ' '}{text}"
        if self.suffix:
            joined = self.suffix[0].isspace() or self.suffix.startswith(_NO_SPACE_BEFORE) or not text
            text = f"{text}{'' if joined or text[-1].isspace() else ' '}{self.suffix}"
        return text

    def write(self, image: str, captions: Sequence[str]) -> None:
        """Write the text file of an image, whole or not at all."""
        write_text(self.text_file(image), "".join(f"{self.line(caption)}\n" for caption in captions))

    def choose(self, sources: Sequence[Source]) -> tuple[list[str], int]:
        """Return the images to write for, and how many are left alone because they have a text file.

        Raises:
            SourceError: a source has no image files of this machine, or two images share a text file.
            ConfigError: a folder cannot be written into.
        """
        paths: list[str] = []
        for source in sources:
            if not isinstance(source, FileSource) or any("://" in path for path in source.paths):
                raise SourceError(
                    f"{source.name} is no image file on this machine, so no text file can stand beside it; "
                    "for --sidecar name image files or folders of them, or leave it out and name --out"
                )
            paths += source.paths
        chosen = [path for path in paths if self.overwrite or not self.text_file(path).exists()]
        image_of_text: dict[str, str] = {}
        shared: list[tuple[str, str]] = []
        for path in chosen:
            first = image_of_text.setdefault(os.path.abspath(self.text_file(path)), path)
            if first is not path:
                shared.append((first, path))
        if shared:
            first, second = shared[0]
            more = f", and {len(shared) - 1} more such images" if len(shared) > 1 else ""
            raise SourceError(f"{first} and {second} would share {self.text_file(first)}{more}; rename or move one")
        # An image that is not there is reported where it is read.
        for folder in dict.fromkeys(Path(path).parent for path in chosen if Path(path).exists()):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise ConfigError(
                    f"{folder} cannot be written into, so its images can have no text files; change its "
                    "permissions, or leave --sidecar out and name --out"
                )
        return chosen, len(paths) - len(chosen)
