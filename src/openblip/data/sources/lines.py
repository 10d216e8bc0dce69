"""What `openblip caption --out` or `match --out` wrote about samples of data sources: these texts as captions, with the
images from the sources, which the settings beside the file name.
"""

import contextlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from openblip.data.config import SourceOptions
from openblip.data.sample import Located, Reject, Sample, Selection, Source
from openblip.data.sources import rows, storage
from openblip.data.sources.dialect import Dialect, open_rows, open_text
from openblip.data.sources.rows import ImageRow, RowSource
from openblip.errors import SourceError


def read_line_settings(path: str) -> Mapping[str, Any]:
    """The settings beside a file of lines, where they name the data sources that the lines are about; else empty."""
    file = f"{path}.settings.json"
    if not storage.exists(file):
        return {}
    settings = storage.read_object(file)
    return settings if settings.get("sources") else {}


@dataclass
class LinesSource(RowSource):
    """Lines by the shard of the sample that they are about; those about image files have a shard of their own."""

    name: str
    path: str
    dialect: Dialect
    chunks: dict[str, "array[int]"] = field(repr=False)  # by shard, where its lines begin
    originals: dict[str, Source] = field(repr=False)  # by shard; lines about image files have none
    options: SourceOptions
    repeats_keys = True

    @classmethod
    def open(
        cls,
        spec: str,
        path: str,
        settings: Mapping[str, Any],
        options: SourceOptions,
        open_source: Callable[..., Source],
    ) -> "LinesSource":
        """Pass once over the lines; raises `SourceError`, also for a source that is gone."""
        stem = next(iter(storage.shard_names([path])))
        chunks: defaultdict[str, array[int]] = defaultdict(lambda: array("Q"))
        with open_rows(path) as (dialect, lines):
            for _, offset, data in lines:
                shard: Any = None
                with contextlib.suppress(SourceError):  # of a broken line, which becomes a reject
                    shard = dialect.parse(data).get("shard")
                chunks[str(shard or stem)].append(offset)
        opened = [open_source(name, **settings["reading"]) for name in settings["sources"]]
        of_shard = {shard: source for source in opened for shard in source.shards()}
        if missing := chunks.keys() - {stem} - of_shard.keys():
            raise SourceError(f"{spec}: {', '.join(settings['sources'])} has no shard {sorted(missing)[0]} any more")
        originals = {shard: of_shard[shard] for shard in chunks if shard in of_shard}
        return cls(spec, path, dialect, dict(chunks), originals, options)

    def file_name(self, shard: str) -> str:
        return self.originals[shard].file_name(shard) if shard in self.originals else ""

    def file_state(self, shard: str) -> Mapping[str, Any]:
        return self.originals[shard].file_state(shard) if shard in self.originals else storage.file_state(self.path)

    def image_id_prefix(self, shard: str) -> str:
        return self.originals[shard].image_id_prefix(shard) if shard in self.originals else self.name

    def _lines(self, shard: str) -> Iterator[bytes]:
        with storage.source_errors(self.path), open_text(self.path) as file:
            for offset in self.chunks[shard]:
                file.seek(offset)
                yield next(self.dialect.lines(file, 0))[2]

    def rows(self, shard: str) -> Iterator[tuple[str, ImageRow | Reject]]:
        folder = self.options.images or storage.parent(self.path)
        for number, data in enumerate(self._lines(shard)):
            place = f"{shard}[{number}]"
            try:
                yield place, rows.table_row(self.dialect.parse(data), number, folder, self.options)
            except SourceError as error:
                yield place, Reject(shard, place, f"{place}: {error}")

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        if shard not in self.originals:
            yield from super().read_selected(shard, selection)
            return
        captions: defaultdict[str, tuple[str, ...]] = defaultdict(tuple)
        for values in map(self.dialect.parse, self._lines(shard)):
            captions[str(values.get("key"))] += rows.row_captions(values)

        met: set[str] = set()

        def is_left_out(original: Sample) -> bool:
            met.add(original.key)
            texts = captions.get(original.key)
            return texts is None or selection.skips(replace(original, captions=texts))

        number = 0
        for number, item in self.originals[shard].read_selected(shard, selection._replace(skip=is_left_out)):
            if isinstance(item, Sample):
                yield Located(number, replace(item, captions=captions[item.key]))
            elif item.key in captions or not item.key:
                met.add(item.key)
                yield Located(number, item)
        for key in captions if selection.is_whole else ():
            if key not in met:
                yield Located(number, Reject(shard, key, f"the original shard has no sample {key} any more"))
