"""From what the user typed to sources: which format a spec names, and mixtures of several with weights."""

import math
import re
from dataclasses import dataclass

from openblip.data.sample import Source
from openblip.data.sources import storage
from openblip.data.sources.part import PartSource, split_part
from openblip.errors import SourceError

_FORMATS = (
    "tar shards (a.tar, dir/{0000..0127}.tar, a glob or a folder of them), .parquet, .jsonl, .csv, "
    "the annotation file of a public data set (.json) with --images DIR, a folder of images, or capfilt:DIR; "
    "any of them may end in a part, [:95%]"
)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Several sources; `weights[i]` is the probability that a drawn sample comes from `sources[i]`."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]


def open_source(spec: str, *, images: str | None = None) -> Source:
    """The source that `spec` names; `_FORMATS` lists the formats. `images`: the folder of the
    pictures that an annotation file or table names.

    Raises `SourceError` when there is nothing there, the format is unknown or `spec` is a mixture.
    """
    members = _split_mixture(spec)
    if len(members) != 1 or members[0][1] is not None:
        raise SourceError(f"{spec}: several sources or a weight; this place takes one plain source")
    return _open_one(members[0][0], images)


def open_mixture(spec: str, *, images: str | None = None) -> Mixture:
    """`a.tar@0.7,b.parquet@0.3`, or one source alone.

    A weight is the probability that a draw comes from the source (they are scaled to sum 1). Without any
    weights every sample is as likely as every other: proportional to the number of samples, which indexes
    every shard. Raises `SourceError` when only some members have a weight, or one is not a positive number.
    """
    members = _split_mixture(spec)
    weighted = [weight for _, weight in members if weight is not None]
    if weighted and len(weighted) != len(members):
        raise SourceError(f"{spec}: give every source of the mixture a weight (SOURCE@0.5), or none")
    names = [name for name, _ in members]
    if len(set(names)) != len(names):
        raise SourceError(f"{spec}: the same source twice; give it a larger weight instead")
    sources = tuple(_open_one(name, images) for name in names)
    weights = weighted or (
        [1.0] if len(sources) == 1 else [float(count_samples(source)) for source in sources]
    )
    total = sum(weights)
    if total <= 0:
        raise SourceError(f"{spec}: no sample in any of the sources")
    return Mixture(sources, tuple(weight / total for weight in weights))


def count_samples(source: Source) -> int:
    """The number of records, by indexing every shard."""
    return sum(len(source.index(shard).records) for shard in source.shards())


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
    return [_split_weight(part.strip()) for part in parts]


def _split_weight(part: str) -> tuple[str, float | None]:
    if not part:
        raise SourceError("an empty source name; between the commas of a mixture each part names a source")
    name, at, tail = part.rpartition("@")
    if not at or (not storage.is_remote(part) and storage.exists(part)):
        return part, None
    try:
        weight = float(tail)
    except ValueError:
        return part, None  # an @ of the name itself, s3://user@host/...
    if not (math.isfinite(weight) and weight > 0):
        raise SourceError(f"{part}: the weight after @ must be a positive number")
    return name, weight


def _open_one(spec: str, images: str | None) -> Source:
    """Each format's module is imported when a spec names it."""
    plain, part = split_part(spec)
    if part is not None:
        return PartSource(spec, _open_one(plain, images), *part)
    if spec.startswith("capfilt:"):
        from openblip.data.sources.capfilt import CapFiltSource

        return CapFiltSource.open(spec, spec.removeprefix("capfilt:"))
    named, split = _split_of(spec)
    paths = storage.expand_paths(named)
    if len(paths) == 1 and storage.is_directory(paths[0]):
        return _open_directory(spec, paths[0])
    suffixes = {_suffix(path) for path in paths}
    if len(suffixes) > 1:
        raise SourceError(
            f"{spec}: files of several formats ({', '.join(sorted(suffixes))}); name one format"
        )
    if suffixes == {"json"} and len(paths) == 1:
        from openblip.data.sources.recognition import open_annotations

        return open_annotations(spec, paths[0], split, images)
    return _open_files(spec, paths, suffixes.pop(), images)


def _open_directory(spec: str, directory: str) -> Source:
    """Of shards where it holds any, else of images."""
    files = storage.list_files(directory)
    for suffix in ("tar", "parquet"):
        shards = [path for path in files if _suffix(path) == suffix]
        if shards:
            return _open_files(spec, shards, suffix, None)
    from openblip.data.sources.folder import FolderSource

    return FolderSource.open(spec, directory)


def _open_files(spec: str, paths: list[str], suffix: str, images: str | None) -> Source:
    if suffix == "tar":
        from openblip.data.sources.tar import TarSource

        return TarSource.open(spec, paths)
    if suffix == "parquet":
        from openblip.data.sources.parquet import ParquetSource

        return ParquetSource.open(spec, paths)
    if suffix in {"csv", "tsv", "jsonl"} and len(paths) == 1:
        from openblip.data.sources.video_lists import is_clip_list, open_clip_list

        if is_clip_list(paths[0]):
            return open_clip_list(spec, paths[0], images)
    if suffix in {"csv", "tsv"}:
        from openblip.data.sources.tables import TableSource

        return TableSource.open(spec, paths, images)
    if suffix == "jsonl":
        from openblip.data.sources.recognition import open_lines

        return open_lines(spec, paths, images)
    if suffix in {"gz", "tgz", "bz2", "xz", "zst", "zip"}:
        raise SourceError(f"{spec}: compressed; decompress it first, shards are read at byte offsets")
    raise SourceError(f"{spec}: not a format that can be read; expected {_FORMATS}")


_SPLIT = re.compile(r"(?P<path>.+\.json)#(?P<split>[\w-]*)")


def _split_of(spec: str) -> tuple[str, str | None]:
    """`dataset_coco.json#test` -> `dataset_coco.json`, `test`; a spec without a split -> itself, None."""
    found = _SPLIT.fullmatch(spec)
    if found is None or (not storage.is_remote(spec) and storage.exists(spec)):
        return spec, None
    return found["path"], found["split"]


def _suffix(path: str) -> str:
    return path.rsplit(".", 1)[-1].lower()
