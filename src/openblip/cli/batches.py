"""What `openblip caption`, `answer` and `match` share: batches of samples read ahead, and lines that resume.

with OutputLines(out, fields=("caption", "logprob")) as lines:
    for samples, images in lines.batches(sources, prepare, reading, label="captioning"):
        lines.write(samples, rows)
return lines.finish("captioned")
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from openblip.cli.inputs import FileSource
from openblip.cli.options import ReadingOptions
from openblip.data.reader import Prepared, read_source
from openblip.data.sample import Reject, Sample, Source, safe_name
from openblip.errors import ConfigError, SourceError
from openblip.files import JsonLine, read_jsonl
from openblip.progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image

OutputRow = Mapping[str, Any]
Identity = tuple[str, str]
"""Shard and key; the shard of image files is empty and stands in no line."""


def sample_name(shard: str, key: str) -> str:
    """What messages call a sample."""
    return f"{shard}/{key}" if shard else key


def decode_image(sample: Sample) -> "Image":
    """Decode the image of a sample; raises `ImageError`, which names the sample."""
    from openblip.data.images import read_image

    return read_image(sample.image, name=sample_name(sample.shard, sample.key))


class OutputLines:
    """The lines that a command writes, and the samples they are about; a context manager.

    A file that a killed run left is continued. What is half-written at its end, a line or a sample without
    all its lines, is cut off; where the number of lines is not known, the last sample is.

    Args:
        out: the file; standard output when None.
        fields: what lines hold beside shard and key.
        num_lines: the number of lines for each sample; None where samples have different numbers of lines.
        given: texts of the options, which stand in the first field, one for each line of a sample.
        printed: False writes nothing where there is no file.

    Raises:
        ConfigError: on entering, when the file holds something else than such lines.
    """

    def __init__(
        self,
        out: Path | None,
        *,
        fields: Sequence[str],
        num_lines: int | None = 1,
        given: Sequence[str] | None = None,
        printed: bool = True,
    ) -> None:
        self.out, self.fields, self.num_lines, self.given = out, fields, num_lines, given
        self.present: dict[Identity, list[OutputRow]] = {}
        """The lines of the samples that the file held before."""
        self.stream: TextIO | None = sys.stdout if printed else None
        self.num_done = self.num_skipped = self.num_present = 0

    def __enter__(self) -> Self:
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            end = self._read_present(self.out)
            if self.out.exists() and end < self.out.stat().st_size:
                os.truncate(self.out, end)
            self.stream = self.out.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self.out is not None and self.stream is not None:
            self.stream.close()

    def batches(
        self, sources: Sequence[Source], prepare: Callable[[Sample], Prepared], reading: ReadingOptions, *, label: str
    ) -> Iterator[tuple[list[Sample], list[Prepared]]]:
        """Yield samples with what `prepare` made of them in threads, in the order of the sources.

        Samples whose lines are there already are passed over. Those that cannot be read are named on standard
        error and counted. A progress display runs along. Raises `SourceError` when there is no sample at all.
        """
        paths = [path for source in sources if isinstance(source, FileSource) for path in source.paths]
        is_known = all(isinstance(source, FileSource) for source in sources)
        with Progress(
            label,
            total=len(paths) if is_known else None,
            unit="images",
            done=sum(("", safe_name(path)) in self.present for path in paths) if is_known else len(self.present),
            # on a terminal lines show how far the work is, and a bar would break them
            visible=self.stream is None or not self.stream.isatty(),
        ) as bar:
            readable = self._readable(sources, prepare, reading, bar)
            while batch := list(islice(readable, reading.batch_size)):
                yield [sample for sample, _ in batch], [prepared for _, prepared in batch]
                self.num_done += len(batch)
                bar.advance(len(batch))
        has_files = any(isinstance(source, FileSource) for source in sources)
        if not (has_files or self.num_done or self.num_skipped or self.num_present):
            raise SourceError(f"{sources[0].name}: there is no image to work on")

    def write(self, samples: Sequence[Sample], rows: Sequence[Sequence[OutputRow]]) -> None:
        """Write the lines of a batch, a list of rows for each sample."""
        if self.stream is None:
            return
        for sample, rows_of_sample in zip(samples, rows, strict=True):
            place = {"shard": sample.shard, "key": sample.key} if sample.shard else {"key": sample.key}
            for row in rows_of_sample:
                self.stream.write(json.dumps({**place, **row}, ensure_ascii=False) + "\n")
        self.stream.flush()

    def finish(self, verb: str, more: str = "") -> int:
        """Say on standard error how many samples are done, and return the exit code."""
        print(f"{verb} {self.num_done} images, skipped {self.num_skipped}{more}", file=sys.stderr)
        return 1 if self.num_skipped else 0

    def _readable(
        self, sources: Sequence[Source], prepare: Callable[[Sample], Prepared], reading: ReadingOptions, bar: Progress
    ) -> Iterator[tuple[Sample, Prepared]]:
        num_shards = sum(len(source.shards()) for source in sources)
        seen: set[str] = set()
        num_workers, ahead = reading.num_workers, 2 * reading.batch_size
        for source in sources:
            entries = read_source(source, prepare, skip=self._is_present, num_workers=num_workers, ahead=ahead)
            for entry in entries:
                shard = (entry if isinstance(entry, Reject) else entry[0]).shard
                if shard and shard not in seen:
                    bar.estimate_total(len(seen), num_shards)
                    seen.add(shard)
                if isinstance(entry, Reject):
                    self.num_skipped += 1
                    name = sample_name(entry.shard, entry.key)
                    bar.note(f"skipped {name}: {entry.reason.removeprefix(f'{name}: ')}")
                    bar.advance(1)
                else:
                    yield entry

    def _is_present(self, shard: str, key: str) -> bool:
        is_present = (shard, key) in self.present
        self.num_present += is_present
        return is_present

    def _read_present(self, path: Path) -> int:
        """Fill `present` and return the byte where the last whole sample ends."""
        end = start_of_last = 0
        incomplete = ""  # where a sample without all its lines begins: only the last one may be so
        for identity, group in groupby(_read_lines(path), lambda line: self._identity(path, line)):
            lines = list(group)
            place = f"{path}:{lines[0].number}"
            if incomplete or identity in self.present:
                raise self._error(incomplete or place)
            rows = [line.value for line in lines]
            wrong = any(row.keys() - {"shard", "key"} != set(self.fields) for row in rows)
            if self.given is not None and not wrong:
                wrong = [row[self.fields[0]] for row in rows] != list(self.given[: len(rows)])
            if wrong or (self.num_lines is not None and len(rows) > self.num_lines):
                raise self._error(place)
            if self.num_lines is None or len(rows) == self.num_lines:
                self.present[identity] = rows
                start_of_last, end = end, lines[-1].end
            else:
                incomplete = place
        if self.num_lines is None and self.present:
            self.present.popitem()
            return start_of_last
        return end

    def _identity(self, path: Path, line: JsonLine) -> Identity:
        if not isinstance(line.value, dict) or "key" not in line.value:
            raise self._error(f"{path}:{line.number}")
        return str(line.value.get("shard", "")), str(line.value["key"])

    def _error(self, place: str) -> ConfigError:
        number = "" if self.num_lines is None else f"{self.num_lines} for each image, "
        texts = "" if self.given is None else f", for the same {self.fields[0]}s"
        return ConfigError(
            f"{place} was not written by this command with these options, which give lines ({number}"
            f"{', '.join(('key', *self.fields))}{texts}); name another --out"
        )


def _read_lines(path: Path) -> Iterator[JsonLine]:
    try:
        yield from read_jsonl(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; name another --out") from error
