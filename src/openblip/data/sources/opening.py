"""From what the user typed to sources: formats, mixtures with weights, and parts of a source."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from openblip.data.sample import Located, Sample, Selection, Source, ending_of, is_hidden
from openblip.data.sources import storage
from openblip.data.sources.annotations import open_annotated
from openblip.data.sources.folder import FolderSource
from openblip.data.sources.joined import JoinedSource
from openblip.data.sources.rows import TableSource
from openblip.data.sources.tar import TarSource
from openblip.errors import SourceError
from openblip.files import hash_int

_FORMATS = (
    "tar shards (a.tar, dir/{0000..0127}.tar, a glob or a folder of them), .parquet, .jsonl, .csv, "
    "the annotation file of a public data set (.json) with --images DIR, a folder of images, or capfilt:DIR; "
    "any of them may end in a part, [:95%]"
)
_ABOUT_DATA = frozenset({"json", "txt", "md", "html", "yaml", "yml"})  # endings of files that may lie beside shards
_SLICE = re.compile(r"^(?P<spec>.+)\[(?:(?P<start>\d+)%)?:(?:(?P<stop>\d+)%)?\]$")
_SPLIT = re.compile(r"(?P<path>.+\.json)#(?P<split>[\w-]*)")


@dataclass(frozen=True, slots=True)
class Mixture:
    """Several sources. Without weights every sample of all sources is as likely as every other."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None = None  # the probability that a drawn sample comes from each source


def open_source(spec: str, *, images: str | None = None) -> Source:
    """Open a source, or several one after the other: `a.tar,b.parquet`; docs/data.md lists the formats.

    images: the folder of the images of annotation files and tables. Raises `SourceError` when there is nothing there,
    the format is unknown, a source is named twice or has a weight.
    """
    mixture = open_mixture(spec, images=images)
    if mixture.weights is not None:
        reason = "a weight says how often a training draws from a source, and here every sample is read once"
        raise SourceError(f"{spec}: {reason}; leave out the weights after @")
    return mixture.sources[0] if len(mixture.sources) == 1 else JoinedSource(spec, mixture.sources)


def open_mixture(spec: str, *, images: str | None = None) -> Mixture:
    """Open `a.tar@0.7,b.parquet@0.3`, or one source alone. Weights are scaled to sum 1, and nothing is counted.

    Raises `SourceError` when only some members have a weight, one is not a positive number, or a source is named twice.
    """
    members = _split_mixture(spec)
    weights = [weight for _, weight in members if weight is not None]
    if weights and len(weights) != len(members):
        raise SourceError(f"{spec}: give every source of the mixture a weight (SOURCE@0.5), or none")
    if len({name for name, _ in members}) != len(members):
        raise SourceError(f"{spec}: the same source twice; give it a larger weight instead")
    sources = tuple(_open_one(name, images) for name, _ in members)
    return Mixture(sources, tuple(weight / sum(weights) for weight in weights) or None)


def absolute_spec(spec: str) -> str:
    """The same source, or sources, from any working directory."""
    prefixed = (name.rpartition("capfilt:") for name, _ in _split_mixture(spec))
    return ",".join(f"{before}{prefix}{storage.absolute(path)}" for before, prefix, path in prefixed)


def _split_mixture(spec: str) -> list[tuple[str, float | None]]:
    """Commas separate sources, except inside braces and in the name of a file that exists."""
    if not storage.is_remote(spec) and storage.exists(spec):
        return [(spec, None)]
    parts, depth = [""], 0
    for character in spec:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    members: list[tuple[str, float | None]] = []
    for part in map(str.strip, parts):
        if not part:
            raise SourceError("an empty source name; between the commas of a mixture each part names a source")
        name, at, tail = part.rpartition("@")
        weight = None
        if at and (storage.is_remote(part) or not storage.exists(part)):
            with contextlib.suppress(ValueError):  # an @ of the name itself, s3://user@host/...
                weight = float(tail)
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise SourceError(f"{part}: the weight after @ must be a positive number")
        members.append((part if weight is None else name, weight))
    return members


def _open_one(spec: str, images: str | None) -> Source:
    """The modules that need pyarrow are imported when a spec names their format."""
    if part := _SLICE.match(spec):
        start, stop = int(part["start"] or 0), int(part["stop"] or 100)
        if not 0 <= start < stop <= 100:
            raise SourceError(f"{spec}: a part goes from a smaller to a larger percentage, as in [:95%] or [95%:]")
        return PercentSlice.open(spec, _open_one(part["spec"], images), start, stop)
    if spec.startswith("capfilt:"):
        from openblip.data.sources.capfilt import CapFiltSource

        return CapFiltSource.open(spec, spec.removeprefix("capfilt:"), open_source)
    match = _SPLIT.fullmatch(spec)  # dataset_coco.json#test
    if match is not None and not storage.is_remote(spec) and storage.exists(spec):
        match = None
    paths = storage.expand_paths(spec if match is None else match["path"])
    unused: dict[str, Counter[str]] = {}
    if len(paths) == 1 and storage.is_directory(folder := paths[0]):
        paths, other_files = shards_in(folder)
        if not paths:
            return FolderSource.open(spec, folder)
        unused = {"": other_files}
    suffixes = {_suffix(path) for path in paths}
    if len(suffixes) > 1:
        raise SourceError(f"{spec}: files of several formats ({', '.join(sorted(suffixes))}); name one format")
    suffix = suffixes.pop()
    if suffix == "tar":
        return TarSource(spec, storage.shard_names(paths), unused)
    if suffix == "parquet":
        from openblip.data.sources.parquet import ParquetSource

        return replace(ParquetSource.open(spec, paths), unused=unused)
    if suffix in {"json", "jsonl", "csv", "tsv"} and len(paths) == 1:
        return open_annotated(spec, paths[0], images, match and match["split"])
    if suffix in {"jsonl", "csv", "tsv"}:
        return TableSource.open(spec, paths, images)
    if suffix in {"gz", "tgz", "bz2", "xz", "zst", "zip"}:
        raise SourceError(f"{spec}: compressed; decompress it first, shards are read at byte offsets")
    raise SourceError(f"{spec}: not a format that can be read; expected {_FORMATS}")


def shards_in(folder: str) -> tuple[list[str], Counter[str]]:
    """The tar files of a folder, or else its parquet files, and what else there is of data, by ending. There are none
    in a folder of images, nor in one where img2dataset wrote images to `00000` and their table to `00000.parquet`.
    """
    files = [path for path in storage.list_files(folder) if not is_hidden(path)]
    for suffix in ("tar", "parquet"):
        shards = [path for path in files if _suffix(path) == suffix]
        stems = {path.removesuffix(f".{suffix}") for path in shards}
        if shards and not (suffix == "parquet" and all(map(storage.is_directory, stems))):
            tables = {f"{stem}.parquet" for stem in stems}  # of img2dataset, beside its shards
            others = [path for path in files if path not in shards and path not in tables]
            return shards, Counter(ending_of(path) for path in others if _suffix(path) not in _ABOUT_DATA)
    return [], Counter()


def _suffix(path: str) -> str:
    return path.rsplit(".", 1)[-1].lower()


@dataclass
class PercentSlice(Source):
    """The samples whose image falls between `start` and `stop` percent, as docs/data.md says; and all rejects."""

    name: str
    whole: Source = field(repr=False)
    start: int
    stop: int

    @classmethod
    def open(cls, spec: str, whole: Source, start: int, stop: int) -> "PercentSlice":
        """Read texts until a sample of the slice is met; raises `SourceError` when there is none."""
        source = cls(spec, whole, start, stop)
        failure: SourceError | None = None
        for shard in whole.shards():
            try:
                if any(isinstance(item, Sample) for _, item in source.read(shard, images=False)):
                    return source
            except SourceError as error:  # of this shard; others may be whole
                failure = failure or error
        raise failure or SourceError(f"{spec}: no sample falls into this part; the source is too small")

    def shards(self) -> Sequence[str]:
        return self.whole.shards()

    def has_shard(self, shard: str) -> bool:
        return self.whole.has_shard(shard)

    def file_name(self, shard: str) -> str:
        return self.whole.file_name(shard)

    def image_id_prefix(self, shard: str) -> str:
        return self.whole.image_id_prefix(shard)

    @property
    def unused(self) -> Mapping[str, Counter[str]]:  # type: ignore[override]
        return self.whole.unused

    def describe(self) -> Mapping[str, object]:
        return self.whole.describe()

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        def is_outside(sample: Sample) -> bool:
            image_id = sample.image_id.removeprefix(self.image_id_prefix(sample.shard))
            if not image_id.startswith("#"):  # then it is shard and key
                image_id = f"{self.file_name(sample.shard)}/{image_id.removeprefix(f'/{sample.shard}/')}"
            return not self.start <= hash_int(image_id) % 100 < self.stop or selection.skips(sample)

        return self.whole.read_selected(shard, selection._replace(skip=is_outside))
