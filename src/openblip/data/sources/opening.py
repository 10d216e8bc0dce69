"""From what the user typed to sources: formats, mixtures with weights, several sources joined, and parts of one."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from openblip.data.config import SourceOptions
from openblip.data.sample import Located, Sample, Selection, Source, ending_of, is_hidden
from openblip.data.sources import storage
from openblip.data.sources.annotations import open_annotated
from openblip.data.sources.folder import FolderSource
from openblip.data.sources.huggingface import (
    SHARD_SUFFIXES,
    choose_split,
    find_hub_folder,
    is_dataset_name,
    repository_files,
    splits_of_names,
)
from openblip.data.sources.lines import LinesSource, read_line_settings
from openblip.data.sources.rows import TableSource
from openblip.data.sources.tar import TarSource
from openblip.errors import ConfigError, SourceError
from openblip.files import hash_int

_FORMATS = (
    "tar shards (a.tar, dir/{0000..0127}.tar, a glob or a folder of them), .parquet, .arrow, .jsonl, .csv, "
    "the annotation file of a public data set (.json) with --images DIR, a folder of images, a data set of "
    "Hugging Face, or capfilt:DIR; any of them may end in a part, [:95%]"
)
_ABOUT_DATA = frozenset({"json", "txt", "md", "html", "yaml", "yml"})  # endings of files that may lie beside shards
SOURCE_SUFFIXES = {*SHARD_SUFFIXES, "json", "jsonl", "csv", "tsv", "txt", "token"}
_SLICE = re.compile(r"^(?P<spec>.+)\[(?:(?P<start>\d+)%)?:(?:(?P<stop>\d+)%)?\]$")
_SPLIT = re.compile(r"(?P<path>.+)#(?P<split>[\w./-]*)")


@dataclass(frozen=True, slots=True)
class Mixture:
    """Several sources. Without weights every sample of all sources is as likely as every other."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None = None  # the probability that a drawn sample comes from each source


def open_source(
    spec: str, *, images: str | None = None, image_column: str | None = None, caption_column: str | None = None
) -> Source:
    """Open a source, or several one after the other: `a.tar,b.parquet`; docs/data.md lists the formats.

    `SourceOptions` says what the options are. Raises `SourceError` when there is nothing there, the format is unknown,
    a table has no such column, a source is named twice or has a weight.
    """
    mixture = open_mixture(spec, images=images, image_column=image_column, caption_column=caption_column)
    if mixture.weights is not None:
        reason = "a weight says how often a training draws from a source, and here every sample is read once"
        raise SourceError(f"{spec}: {reason}; leave out the weights after @")
    return mixture.sources[0] if len(mixture.sources) == 1 else JoinedSource(spec, mixture.sources)


def check_options_used(sources: Iterable[Source], options: SourceOptions) -> None:
    """Raise `ConfigError` for a folder of images or a column that is named while none of the sources looks at it."""
    opened = list(sources)
    for name, needs in ("images", "names no files"), ("image_column", "has no columns"), ("caption_column", "has none"):
        if getattr(options, name) is not None and not any(name in source.option_names for source in opened):
            names = ", ".join(source.name for source in opened)
            raise ConfigError(f"--{name.replace('_', '-')} has no effect: {names} {needs}; leave it out")


def require_texts(sources: Iterable[Source]) -> None:
    """Raise `SourceError` for a table of images alone, where captions or other texts are needed."""
    for source in sources:
        if source.lacks:
            raise SourceError(source.lacks)


def open_mixture(
    spec: str, *, images: str | None = None, image_column: str | None = None, caption_column: str | None = None
) -> Mixture:
    """Open `a.tar@0.7,b.parquet@0.3`, or one source alone. Weights are scaled to sum 1, and nothing is counted.

    Raises `SourceError` when only some members have a weight, one is not a positive number, or a source is named twice.
    """
    options = SourceOptions(images=images, image_column=image_column, caption_column=caption_column)
    members = _split_mixture(spec)
    weights = [weight for _, weight in members if weight is not None]
    if weights and len(weights) != len(members):
        raise SourceError(f"{spec}: give every source of the mixture a weight (SOURCE@0.5), or none")
    if len({name for name, _ in members}) != len(members):
        raise SourceError(f"{spec}: the same source twice; give it a larger weight instead")
    sources = tuple(_open_one(name, options) for name, _ in members)
    return Mixture(sources, tuple(weight / sum(weights) for weight in weights) or None)


def absolute_spec(spec: str) -> str:
    """The same source, or sources, from any working directory."""
    prefixed = (name.rpartition("capfilt:") for name, _ in _split_mixture(spec))
    return ",".join(
        f"{before}{prefix}{path if is_dataset_name(path.partition('#')[0]) else storage.absolute(path)}"
        for before, prefix, path in prefixed
    )


def split_spec(spec: str, *percents: int) -> tuple[str, ...]:
    """Every source cut at these percentages: (spec, 90, 95) gives [:90%], [90%:95%] and [95%:]. Weights stay in the
    first part alone, from which trainings draw.
    """
    members = _split_mixture(spec)
    weights = ["" if weight is None else f"@{weight}" for _, weight in members]
    first = ",".join(f"{name}[:{percents[0]}%]{weight}" for (name, _), weight in zip(members, weights, strict=True))
    bounds = [*(f"{percent}%" for percent in percents), ""]
    parts = [f"[{start}:{stop}]" for start, stop in pairwise(bounds)]
    return first, *(",".join(f"{name}{part}" for name, _ in members) for part in parts)


def reading_of(spec: str, options: SourceOptions) -> dict[str, Any]:
    """The options, as arguments of `open_source`, that matter for these sources: some may be tables, others shards."""
    used = {name for source in open_mixture(spec, **options.reading).sources for name in source.option_names}
    return {name: value for name, value in options.reading.items() if name == "images" or name in used}


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


def _open_one(spec: str, options: SourceOptions) -> Source:
    """The modules that need pyarrow are imported when a spec names their format."""
    if part := _SLICE.match(spec):
        start, stop = int(part["start"] or 0), int(part["stop"] or 100)
        if not 0 <= start < stop <= 100:
            raise SourceError(f"{spec}: a part goes from a smaller to a larger percentage, as in [:95%] or [95%:]")
        return PercentSlice.open(spec, _open_one(part["spec"], options), start, stop)
    if spec.startswith("capfilt:"):
        from openblip.data.sources.capfilt import CapFiltSource

        return CapFiltSource.open(spec, spec.removeprefix("capfilt:"), open_source)
    path, split = spec, None
    if storage.is_remote(spec) or not storage.exists(spec):
        if match := _SPLIT.fullmatch(spec):  # dataset_coco.json#test
            path, split = match["path"], match["split"]
        if is_dataset_name(path) and storage.suffix(path) not in SOURCE_SUFFIXES:
            path = find_hub_folder(path)
    paths = storage.expand_paths(path)
    unused: dict[str, Counter[str]] = {}
    if len(paths) == 1 and storage.is_directory(folder := paths[0]):
        paths, other_files = shards_in(spec, folder, split)
        if not paths:
            choose_split(spec, {}, split)
            return FolderSource.open(spec, folder, options)
        unused = {"": other_files}
    elif split is not None and {storage.suffix(path) for path in paths} != {"json"}:
        raise SourceError(f"{spec}: this file has no splits to choose from; leave out #{split}")
    suffixes = {storage.suffix(path) for path in paths}
    if len(suffixes) > 1:
        raise SourceError(f"{spec}: files of several formats ({', '.join(sorted(suffixes))}); name one format")
    suffix = suffixes.pop()
    if suffix == "tar":
        return TarSource(spec, storage.shard_names(paths), unused, options.caption_column)
    if suffix in SHARD_SUFFIXES:
        from openblip.data.sources.parquet import ParquetSource

        return replace(ParquetSource.open(spec, paths, options), unused=unused)
    if len(paths) == 1 and (settings := read_line_settings(paths[0])):
        return LinesSource.open(spec, paths[0], settings, options, open_source)
    if suffix in {"json", "jsonl", "csv", "tsv", "txt", "token"} and len(paths) == 1:
        return open_annotated(spec, paths[0], options, split)
    if suffix in {"jsonl", "csv", "tsv"}:
        return TableSource.open(spec, paths, options)
    if suffix in {"gz", "tgz", "bz2", "xz", "zst", "zip"}:
        raise SourceError(f"{spec}: compressed; decompress it first, shards are read at byte offsets")
    raise SourceError(f"{spec}: not a format that can be read; expected {_FORMATS}")


def shards_in(spec: str, folder: str, split: str | None = None) -> tuple[list[str], Counter[str]]:
    """The shards of a folder, all of one split, and what else there is of data, by ending: those of a Hugging Face data
    set, else the tar files, or else parquet or Arrow files. There are none in a folder of images, nor in one where
    img2dataset wrote images to `00000` and their table to `00000.parquet`. Raises as `choose_split`.
    """
    folder = storage.canonical(folder).rstrip("/")
    files = [path for path in storage.list_files(folder) if not is_hidden(path)]
    splits, others = repository_files(folder, files)
    for suffix in SHARD_SUFFIXES if not splits else ():
        shards = [path for path in files if storage.suffix(path) == suffix]
        stems = {path.removesuffix(f".{suffix}") for path in shards}
        if shards and not (suffix == "parquet" and all(map(storage.is_directory, stems))):
            known = {*shards, *(f"{stem}.parquet" for stem in stems)}  # with img2dataset's tables, beside its shards
            splits, others = splits_of_names(folder, shards), [path for path in files if path not in known]
            break
    if not splits:
        return [], Counter()
    unused = Counter(ending_of(path) for path in others if storage.suffix(path) not in _ABOUT_DATA)
    return choose_split(spec, splits, split), unused


@dataclass
class JoinedSource(Source):
    """Several sources one after the other, for what reads every sample once. Before a shard's name stands the number of
    its source, from 1 on, so that two sources may have shards of the same name.
    """

    name: str
    sources: tuple[Source, ...] = field(repr=False)

    def __post_init__(self) -> None:
        self.option_names = {name for source in self.sources for name in source.option_names}
        self.lacks = next((source.lacks for source in self.sources if source.lacks), "")

    def shards(self) -> Sequence[str]:
        return [f"{number}-{shard}" for number, source in enumerate(self.sources, 1) for shard in source.shards()]

    def has_shard(self, shard: str) -> bool:
        number, _, own_name = shard.partition("-")
        is_number = number.isdecimal() and 1 <= int(number) <= len(self.sources)
        return is_number and self.sources[int(number) - 1].has_shard(own_name)

    def file_name(self, shard: str) -> str:
        source, own_name = self._find(shard)
        return source.file_name(own_name)

    def file_state(self, shard: str) -> Mapping[str, Any]:
        source, own_name = self._find(shard)
        return source.file_state(own_name)

    def is_self_contained(self, shard: str) -> bool:
        source, own_name = self._find(shard)
        return source.is_self_contained(own_name)

    def image_id_prefix(self, shard: str) -> str:
        source, own_name = self._find(shard)
        return source.image_id_prefix(own_name)

    def num_samples(self, shard: str) -> int | None:
        source, own_name = self._find(shard)
        return source.num_samples(own_name)

    @property
    def unused(self) -> Mapping[str, Counter[str]]:  # type: ignore[override]
        """Of every source, by its number before the name of the shard."""
        numbered = enumerate(self.sources, 1)
        return {f"{number}-{shard}": count for number, source in numbered for shard, count in source.unused.items()}

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        source, own_name = self._find(shard)

        def is_skipped(sample: Sample) -> bool:
            return selection.skips(replace(sample, shard=shard))

        for number, item in source.read_selected(own_name, selection._replace(skip=is_skipped)):
            yield Located(number, replace(item, shard=shard))

    def _find(self, shard: str) -> tuple[Source, str]:
        number, _, own_name = shard.partition("-")
        return self.sources[int(number) - 1], own_name


@dataclass
class PercentSlice(Source):
    """The samples whose image falls between `start` and `stop` percent, as docs/data.md says; and all rejects."""

    name: str
    whole: Source = field(repr=False)
    start: int
    stop: int

    def __post_init__(self) -> None:
        self.option_names, self.lacks = self.whole.option_names, self.whole.lacks

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

    def file_state(self, shard: str) -> Mapping[str, Any]:
        return self.whole.file_state(shard)

    def is_self_contained(self, shard: str) -> bool:
        return self.whole.is_self_contained(shard)

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
