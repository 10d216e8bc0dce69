"""The bootstrapped set of a CapFilt run: every text that is kept, with its image from the original shards."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from openblip.data.captions import finished_shards, read_kept_pairs
from openblip.data.config import SourceOptions
from openblip.data.decision import Decision
from openblip.data.sample import Located, Reject, Sample, Selection, Source, parse_json_object
from openblip.data.sources import storage
from openblip.errors import SourceError
from openblip.files import locate, read_json


@dataclass
class CapFiltSource(Source):
    """The finished shards of a CapFilt run. A kept text is a sample, whose key has the text's source and index."""

    name: str
    directory: Path
    original: Source = field(repr=False)
    decision: Decision

    @classmethod
    def open(cls, spec: str, directory: str, open_source: Callable[..., Source]) -> "CapFiltSource":
        """Read the manifest, and open the source that it names with its folder of images."""
        path = locate(directory) / "manifest.json"
        try:
            manifest = parse_json_object(path.read_bytes(), str(path))
        except OSError as error:
            reason = "no manifest.json there, so no CapFilt run; make one with openblip capfilt"
            raise SourceError(f"{spec}: {reason}") from error
        missing = {"source", "threshold"} - manifest.keys()
        if missing:
            raise SourceError(f"{path}: lacks {', '.join(sorted(missing))}; not a manifest of openblip capfilt")
        original = open_source(manifest["source"], **SourceOptions.stated(manifest).reading)
        return cls(spec, path.parent, original, Decision.of_manifest(manifest))

    def shards(self) -> Sequence[str]:
        """The shards with a report; or row groups of a parquet file, each of which was a shard in earlier versions."""
        done = finished_shards(self.directory)
        whole = set(self.original.shards()).intersection(done)
        files = {self.file_name(shard) for shard in whole}
        shards = [shard for shard in self.original.shards() if shard in whole]
        parts = (shard for shard in done if shard not in whole and self.original.has_shard(shard))
        shards += [shard for shard in parts if self.file_name(shard) not in files]
        if not shards:
            raise SourceError(f"{self.name}: no shard is finished; run the same openblip capfilt command again")
        return shards

    def file_name(self, shard: str) -> str:
        return self.original.file_name(shard)

    def image_id_prefix(self, shard: str) -> str:
        return self.original.image_id_prefix(shard)

    @property
    def unused(self) -> Mapping[str, Counter[str]]:  # type: ignore[override]
        return self.original.unused

    def num_samples(self, shard: str) -> int:
        return len(read_kept_pairs(self.directory, shard, self.decision, ()))

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        """As every source does; the numbers are those of the original samples. Raises SourceError, too, for a shard
        whose file has changed since it was captioned.
        """
        report = read_json(self.directory / "captions" / f"{shard}.report.json")
        with storage.source_errors(self.name, keep_transient=True):
            changes = storage.changes_of_file(report.get("source_file", {}), self.original.file_state(shard))
        if changes:
            raise SourceError(
                f"{self.name}: shard {shard} has changed since its texts were scored ({changes}); bring the earlier "
                "file back, or score the source as it is now with openblip capfilt in another folder"
            )
        kept: dict[str, list[dict[str, Any]]] = {}  # of each original sample what is its own in its pairs
        for row in read_kept_pairs(self.directory, shard, self.decision, ()):
            weight = row["weight"] / self.decision.largest_weight
            pair = {"key": pair_key(row), "captions": (row["caption"],), "weight": weight}
            kept.setdefault(row["key"], []).append(pair)
        wanted: dict[str, list[dict[str, Any]]] = {}  # of the original samples that were met

        def has_no_pair(original: Sample) -> bool:
            pairs = kept.get(original.key, ())
            wanted[original.key] = [pair for pair in pairs if not selection.skips(replace(original, **pair))]
            return not wanted[original.key]

        number = selection.start
        for number, item in self.original.read_selected(shard, selection._replace(skip=has_no_pair)):
            if isinstance(item, Sample):
                for pair in wanted[item.key]:
                    yield Located(number, replace(item, **pair))
            elif item.key in kept or not item.key:
                wanted.setdefault(item.key, [])
                yield Located(number, item)
        if selection.is_whole:
            for original, pairs in kept.items():
                for pair in pairs if original not in wanted else ():
                    reason = f"the original shard has no sample {original} any more"
                    yield Located(number, Reject(shard, pair["key"], reason))


def pair_key(row: Mapping[str, Any]) -> str:
    """The key of one of `read_kept_pairs`."""
    return f"{row['key']}-{row['source']}-{row['index']}"
