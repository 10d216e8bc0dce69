"""Samples, rejects, and sources: lists of shards, each read front to back, without an index."""

import errno
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from openblip.errors import SourceError

IMAGE_SUFFIXES = frozenset({  # of what `data.images` decodes
    "jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "bmp", "dib", "gif", "tif", "tiff", "avif", "avifs",
    "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "ico", "tga", "qoi", "ppm", "pgm", "pbm", "pnm", "pfm",
})  # fmt: skip
UNREAD_SUFFIXES = frozenset({  # of images that are not decoded
    "heic", "heif", "jxl", "svg", "psd", "eps", "ps", "pdf", "ai", "exr", "hdr", "dng",
    "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2", "raw", "dds", "pcx", "xcf",
})  # fmt: skip
VIDEO_SUFFIXES = frozenset({"mp4", "webm", "mkv", "avi", "mov", "m4v"})
TEXT_SUFFIXES = ("json", "txt", "caption")

MOST_TEXT_BYTES = 16 << 20  # of the texts of one sample, in a file or a row
MOST_CAPTIONS, LONGEST_CAPTION = 1000, 100_000  # of one sample, and its characters
_MOST_LEVELS = 64  # of lists and objects within each other
_LONGEST_REASON = 1000  # characters
_NUM_SHOWN = 10  # kinds of files that are not used
_TRANSIENT = {  # errors of the machine or the network, not of one file
    errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One image or video with its texts, as the source has it."""

    key: str  # unique within `shard`, not across shards
    shard: str
    image: bytes  # the encoded file: an image, or the video of a source of videos; empty where only texts were wanted
    captions: tuple[str, ...]  # may be empty: CapFilt accepts images without web text, a training loader rejects them
    image_id: str  # equal exactly for samples of the same image
    info: Mapping[str, Any] = field(default_factory=dict)
    """The sample's json, with the names of docs/data.md. Captions in `info["references"]` are never trained on."""
    second_image: bytes | None = None  # the right one of two images (NLVR2)
    weight: float = 1.0
    """The chance that training draws it while it passes over its shard, above 0 and at most 1."""

    @property
    def place(self) -> str:
        """What messages call the sample; the shard of image files is empty."""
        return "/".join(filter(None, (self.shard, self.key)))


@dataclass(frozen=True, slots=True)
class Reject:
    """A sample that was skipped, and why; an empty `key` stands for the unreadable rest of a shard."""

    shard: str
    key: str
    reason: str

    def __post_init__(self) -> None:
        if len(self.reason) > _LONGEST_REASON:  # it may repeat what is wrong with a file of any length
            object.__setattr__(self, "reason", f"{self.reason[:_LONGEST_REASON]}...")

    @property
    def place(self) -> str:
        """What messages call the sample or the shard."""
        return "/".join(filter(None, (self.shard, self.key)))

    @property
    def why(self) -> str:
        """The reason without the place that some begin with."""
        return self.reason.removeprefix(f"{self.place}: ").removeprefix(f"{self.key}: ")

    def __str__(self) -> str:
        """In a line for a terminal, which what data says must not control."""
        line = f"{self.place:.{_LONGEST_REASON}}: {self.why}"
        return line if line.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)


@dataclass(frozen=True, slots=True)
class MissingFile(Reject):
    """A sample whose image file does not exist."""

    path: str


class Located(NamedTuple):
    """A sample or reject, and the number in its shard of the sample that it belongs to."""

    number: int
    item: Sample | Reject


class Selection(NamedTuple):
    """The arguments of `Source.read`."""

    start: int = 0
    pieces: tuple[int, int] = (0, 1)
    skip: Callable[[Sample], bool] | None = None
    images: bool = True

    def has(self, number: int) -> bool:
        """Whether a sample of this number is wanted, where piece j has every m-th one."""
        return number >= self.start and number % self.pieces[1] == self.pieces[0]

    @property
    def is_whole(self) -> bool:
        """Whether all of a shard is read, so that what was not met is not there."""
        return self.start == 0 and self.pieces == (0, 1)

    def skips(self, sample: Sample) -> bool:
        return self.skip is not None and self.skip(sample)


class Source(ABC):
    """A set of shards in a stable order. A source is pickled to worker processes, so it holds no open files. Folders
    are listed and annotation files read once, when it is opened.
    """

    name: str  # the spec it was opened with; two sources of a mixture have different names
    unused: Mapping[str, Counter[str]] = MappingProxyType({})
    """Of the shards that were read, and of a folder, how many files are no part of a sample, by their endings."""
    option_names: Set[str] = frozenset()  # which of `SourceOptions` it looks at
    lacks: str = ""  # what a table of images alone says where captions or other texts are needed

    @abstractmethod
    def shards(self) -> Sequence[str]:
        """The shard names: stable, unique and in order."""

    def read(
        self,
        shard: str,
        *,
        start: int = 0,
        pieces: tuple[int, int] = (0, 1),
        skip: Callable[[Sample], bool] | None = None,
        images: bool = True,
    ) -> Iterator[Located]:
        """Read a shard front to back, yielding samples, and rejects where they are met.

        The numbers of a shard's samples begin at 0, never decrease, and depend on the shard alone. Several items may
        have one number: the reject of a repeated file beside its sample, or the kept texts of one image. They come
        together.

        Args:
            shard: one of `shards()`.
            start: the number of the first sample wanted. From there on the items are those of a read from 0, so a
                number is all that is needed to resume. The images of earlier samples are not read.
            pieces: (j, m) reads piece j of m. The pieces of a shard do not overlap and together are the shard; the
                images of the other pieces are not read where the format allows it.
            skip: is given a sample with its texts and an empty `image`; where it returns True, the sample is passed
                over and its image is not read.
            images: False gives samples with their texts and an empty `image`; no image is read.

        Raises:
            SourceError: the shard cannot be opened, or nothing of it can be read.
            OSError: the machine or the network failed (`is_transient`). What only concerns one sample is a `Reject`.
        """
        return self.read_selected(shard, Selection(start, pieces, skip, images))

    @abstractmethod
    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        """`read`, as each format implements it."""

    def has_shard(self, shard: str) -> bool:
        """Whether `read` takes this name: one of `shards()`, or one that they had in an earlier version."""
        return shard in self.shards()

    def file_name(self, shard: str) -> str:
        """The name of the shard's file without its folder: the same wherever a copy of it lies."""
        return shard

    def file_state(self, shard: str) -> Mapping[str, Any]:
        """The `path` of the file that a shard is read from, its `size`, and the time of its last change, its ETag or
        both; empty where nobody knows. Raises OSError for a file that is gone.
        """
        return {}

    def is_self_contained(self, shard: str) -> bool:
        """Whether the images and texts of a shard are all in its file, so that `file_state` tells of every change."""
        return False

    def image_id_prefix(self, shard: str) -> str:
        """What the `image_id` of a shard's samples begins with: the name of the source that has the images."""
        return self.name

    def num_samples(self, shard: str) -> int | None:
        """The number of samples, rejects included, where it is known without reading the shard."""
        return None

    def count_unused(self) -> Counter[str]:
        return sum(self.unused.values(), Counter[str]())

    def describe(self) -> Mapping[str, object]:
        """What is worth printing of the source, by name: its `format`, companion files, `missing` ones."""
        return {}


def is_transient(error: BaseException) -> bool:
    """Whether an error is the machine's or the network's; it is raised then, since no sample is to blame."""
    is_outage = isinstance(error, ConnectionError | TimeoutError)
    return is_outage or (isinstance(error, OSError) and error.errno in _TRANSIENT)


def file_kind(suffix: str) -> str:
    """What a file of a sample is by its suffix in lower case: "image", "video" or that of a text; else empty."""
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else suffix if suffix in TEXT_SUFFIXES else ""


def is_hidden(path: str) -> bool:
    """Whether a file is the system's, not the user's: `.DS_Store`, and `._a.jpg` or `__MACOSX` of macOS."""
    *folders, name = path.split("/")
    return name.startswith(".") or "__MACOSX" in folders


def ending_of(path: str) -> str:
    """What a file that is not used counts as."""
    stem, _, suffix = path.rpartition("/")[2].rpartition(".")
    return "hidden" if is_hidden(path) else f".{suffix.lower()}" if stem else "without an ending"


def unused_line(unused: Iterable[Counter[str]]) -> str:
    """How many files were not used, of each kind, in a line; empty where there are none."""
    counts = sum(unused, Counter[str]())
    if not counts:
        return ""
    in_order = sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))
    kinds = [f"{count} {ending}" for ending, count in in_order[:_NUM_SHOWN]]
    kinds += [f"{len(counts) - _NUM_SHOWN} more kinds"] if len(counts) > _NUM_SHOWN else []
    unread = ", ".join(ending for ending in sorted(counts) if ending[1:] in UNREAD_SUFFIXES)
    advice = f" ({unread} cannot be read: convert to .jpg or .png)" if unread else ""
    return f"not used: {', '.join(kinds)}{advice}"


def clean_text(text: str) -> str:
    """Strip outer spaces, and replace lone surrogates (json escapes can make them), which no encoding can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def safe_name(name: str) -> str:
    """A key or shard name that every file format can hold: bytes that are no UTF-8 as `\\udcxx`."""
    return name.encode("utf-8", "backslashreplace").decode()


def caption_texts(value: Any, where: str) -> tuple[str, ...]:
    """The captions in a string, a list of strings or null, empty ones dropped. `SourceError` for anything else."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise SourceError(f"{where}: the caption must be a string or a list of strings, not {value!r:.80}")
    return tuple(cleaned for text in texts if (cleaned := clean_text(text)))


def parse_json_object(payload: bytes | str, where: str = "") -> dict[str, Any]:
    """Raises `SourceError`, which begins with `where`, for broken json, bad UTF-8 or another json type."""
    prefix = where and f"{where}: "
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise SourceError(f"{prefix}broken json: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{prefix}expected a json object, found {type(value).__name__}")
    if _num_opened(payload) > _MOST_LEVELS and _is_deep(value):
        raise SourceError(f"{prefix}json of more than {_MOST_LEVELS} levels")
    return value


def _num_opened(payload: bytes | str) -> int:
    """How many lists and objects json may hold."""
    if isinstance(payload, str):
        return payload.count("[") + payload.count("{")
    return payload.count(b"[") + payload.count(b"{")


def _is_deep(value: Any) -> bool:
    """Whether lists and objects lie within each other more deeply than what reads or writes them may follow."""
    level = [value]
    for _ in range(_MOST_LEVELS):
        nested = (item for item in level if isinstance(item, dict | list))
        level = [each for item in nested for each in (item.values() if isinstance(item, dict) else item)]
    return bool(level)


def check_captions(sample: Sample) -> None:
    """Raise `SourceError` for so many captions, or ones so long, that a model would be busy with this sample alone."""
    if len(sample.captions) > MOST_CAPTIONS:
        raise SourceError(f"{len(sample.captions)} captions, more than the limit of {MOST_CAPTIONS}")
    if (longest := max(map(len, sample.captions), default=0)) > LONGEST_CAPTION:
        raise SourceError(f"a caption of {longest} characters, more than the limit of {LONGEST_CAPTION}")


def sample_of_texts(
    source: str,
    shard: str,
    key: str,
    payloads: Mapping[str, bytes],
    caption_field: str | None = None,
    by_line: bool = False,
) -> Sample:
    """A sample without its image, of its texts by kind. Captions are what the json states in `caption_field`, else in
    `caption` or `captions`; where it states none, those of the txt or caption file, one, or one in each line. Raises
    `SourceError`.
    """
    where = f"{shard}/{key}"
    info = parse_json_object(payloads["json"], f"{where}.json") if "json" in payloads else {}
    if caption_field is not None and info and caption_field not in info:
        raise SourceError(f"{where}.json: no field {caption_field}; found: {', '.join(info)}")
    names = ("caption", "captions") if caption_field is None else (caption_field,)
    stated = (caption_texts(info.get(name), f"{where}.json") for name in names)
    captions = next(filter(None, stated), ())
    for kind in (kind for kind in ("txt", "caption") if kind in payloads and not captions):
        try:
            text = payloads[kind].decode("utf-8-sig")
            captions = caption_texts(text.split("\n") if by_line else text, where)
        except UnicodeDecodeError as error:
            raise SourceError(f"{where}.{kind}: not UTF-8 text: {error}") from error
    return Sample(key, shard, b"", captions, image_id_of(source, shard, key, info), info)


def image_id_of(source: str, shard: str, key: str, info: Mapping[str, Any]) -> str:
    """The data set's own `image_id` where the info states one, else shard and key; no two sources share one."""
    stated = info.get("image_id")
    return f"{source}/{shard}/{key}" if stated is None else f"{source}#{stated}"
