"""The bootstrapped set of a CapFilt run: every text that the filter kept, with its image from the original
shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from openblip.data.captions import finished_shards, is_kept, read_captions
from openblip.data.sample import Record, Reject, Sample, ShardIndex, Source, parse_json_object
from openblip.errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class CapFiltRecord:
    """One kept text; the image is read through the original record."""

    original: Record
    key: str
    caption: str

    @property
    def shard(self) -> str:
        return self.original.shard

    def read(self) -> Sample:
        """The pair. Pairs of one image have the original sample's `image_id`, so they are each other's
        positives.
        """
        sample = self.original.read()
        return Sample(self.key, sample.shard, sample.image, (self.caption,), sample.image_id, sample.info)


@dataclass(slots=True)
class CapFiltSource:
    """The finished shards of a CapFilt run, selected by the manifest's threshold at reading."""

    name: str
    directory: Path
    original: Source = field(repr=False)
    threshold: float

    @classmethod
    def open(cls, spec: str, directory: str) -> "CapFiltSource":
        from openblip.data.sources.opening import open_source

        path = Path(directory).expanduser() / "manifest.json"
        try:
            manifest = parse_json_object(path.read_bytes(), str(path))
        except OSError as error:
            raise SourceError(
                f"{spec}: no manifest.json there, so no CapFilt run; make one with openblip capfilt"
            ) from error
        missing = {"source", "threshold"} - manifest.keys()
        if missing:
            raise SourceError(
                f"{path}: lacks {', '.join(sorted(missing))}; not a manifest of openblip capfilt"
            )
        original = open_source(manifest["source"], images=manifest.get("images"))
        return cls(spec, path.parent, original, float(manifest["threshold"]))

    def shards(self) -> Sequence[str]:
        """The shards that have a report; a run that was stopped has fewer than its source."""
        done = set(finished_shards(self.directory))
        names = [shard for shard in self.original.shards() if shard in done]
        if not names:
            raise SourceError(
                f"{self.name}: no shard is finished; run the same openblip capfilt command again"
            )
        return names

    def index(self, shard: str) -> ShardIndex:
        originals = {record.key: record for record in self.original.index(shard).records}
        records: list[Record] = []
        rejects: list[Reject] = []
        for row in self._kept(shard).to_pylist():
            key = f"{row['key']}-{row['source']}-{row['index']}"
            original = originals.get(row["key"])
            if original is None:
                rejects.append(Reject(shard, key, f"the original shard has no sample {row['key']} any more"))
            else:
                records.append(CapFiltRecord(original, key, row["caption"]))
        return ShardIndex(records, rejects)

    def _kept(self, shard: str) -> "pa.Table":
        table = read_captions(self.directory, shard)
        return table.filter(is_kept(table["itm"].to_numpy(), self.threshold))
