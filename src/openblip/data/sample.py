"""What a data source hands out: samples, the records that read them, and rejects that say what could not be
read.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from openblip.errors import SourceError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
VIDEO_SUFFIXES = frozenset({"mp4", "webm", "mkv", "avi", "mov", "m4v"})
TEXT_SUFFIXES = ("json", "txt")

_NO_INFO: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its texts, as the source has it.

    `key` is unique within `shard`, not across shards. `image` is the encoded file: a picture, or the clip of
    a source of clips. `captions` may be empty: CapFilt accepts images without web text, a training loader
    rejects them. `image_id` is equal exactly for pairs of the same image. `info` is the sample's json: other
    true captions live in `info["references"]` and are never trained on, and questions, statements, dialogs
    and labels under the names of docs/data.md. `second_image` is the right one of two pictures (NLVR2).
    """

    key: str
    shard: str
    image: bytes
    captions: tuple[str, ...]
    image_id: str
    info: Mapping[str, Any] = field(default_factory=lambda: _NO_INFO)
    second_image: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """A sample (or the unreadable rest of a shard: empty `key`) that was skipped, and why."""

    shard: str
    key: str
    reason: str


class Record(Protocol):
    """Where one sample lies: small and picklable, so that a worker process reads the payload itself."""

    @property
    def key(self) -> str: ...

    @property
    def shard(self) -> str: ...

    def read(self) -> Sample:
        """The sample; raises `SourceError` or `OSError` when it cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The records of one shard in file order, and what the shard holds that is no sample."""

    records: list[Record]
    rejects: list[Reject]


class Source(Protocol):
    """A set of shards in a stable order."""

    @property
    def name(self) -> str:
        """The spec it was opened with; two sources of a mixture have different names."""
        ...

    def shards(self) -> Sequence[str]:
        """Stable, unique shard names in order."""
        ...

    def index(self, shard: str) -> ShardIndex:
        """What the shard holds, without reading image payloads of local files; raises `SourceError`."""
        ...


@runtime_checkable
class Described(Protocol):
    """A source that can say more of itself than its shards show."""

    def describe(self) -> Mapping[str, object]:
        """What is worth printing, by name: `format`, files that it found beside its own, `missing` ones."""
        ...


def clean_text(text: str) -> str:
    """Without outer blanks, and with lone surrogates (json escapes can make them) replaced: they encode to
    nothing.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def safe_name(name: str) -> str:
    """A key or shard name that every file format can hold: bytes that are no UTF-8 as `\\udcxx`."""
    return name.encode("utf-8", "backslashreplace").decode()


def caption_texts(value: Any, where: str) -> tuple[str, ...]:
    """The captions in a field that may be a string, a list of strings or null; empty ones dropped.

    Raises `SourceError` for anything else.
    """
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise SourceError(f"{where}: the caption must be a string or a list of strings, not {value!r:.80}")
    return tuple(cleaned for text in texts if (cleaned := clean_text(text)))


def sample_image_id(source: str, shard: str, key: str, info: Mapping[str, Any]) -> str:
    """The json's own `image_id` where it has one, else the sample's place; never equal between two
    sources.
    """
    own = info.get("image_id")
    return f"{source}/{shard}/{key}" if own is None else f"{source}#{own}"


def parse_json_object(payload: bytes | str, where: str) -> dict[str, Any]:
    """The json object in `payload`; raises `SourceError` for broken json, bad UTF-8 or another json type."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise SourceError(f"{where}: broken json: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{where}: expected a json object, found {type(value).__name__}")
    return value


def parse_texts(payloads: Mapping[str, bytes], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The info and captions of a sample's `json` and `txt` files, by suffix.

    Captions are what the json states in `caption` or `captions`; where it states none, the txt. Raises
    `SourceError`.
    """
    info = parse_json_object(payloads["json"], f"{where}.json") if "json" in payloads else {}
    stated = (caption_texts(info.get(name), f"{where}.json") for name in ("caption", "captions"))
    captions = next(filter(None, stated), ())
    if not captions and "txt" in payloads:
        try:
            captions = caption_texts(payloads["txt"].decode("utf-8-sig"), where)
        except UnicodeDecodeError as error:
            raise SourceError(f"{where}.txt: not UTF-8 text: {error}") from error
    return info, captions


def is_weight(value: Any) -> bool:
    """Whether this is a finite number from 0 on."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= sys.float_info.max
