"""What `openblip caption`, `answer` and `match` share: which images are meant, and lines about them that resume.

F frames of a video, one of an image; S image size; R texts of all samples of a batch.
"""

import csv
import json
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TextIO

from openblip.cli.options import ModelOptions, check_output
from openblip.cluster import Died, EngineOptions, Job, LoadedJob, WorkerPool, connected
from openblip.data.config import DecodingAhead, SourceOptions
from openblip.data.reader import ReadBatch, in_batches, read_ahead, read_source
from openblip.data.sample import (
    TEXT_SUFFIXES,
    Located,
    Reject,
    Sample,
    Selection,
    Source,
    file_kind,
    safe_name,
    unused_line,
)  # fmt: skip
from openblip.data.sources import absolute_spec, storage
from openblip.data.sources.dialect import Dialect
from openblip.data.sources.folder import FolderFiles, FolderRow, option_names_of
from openblip.data.sources.opening import SOURCE_SUFFIXES, check_options_used, open_source, require_texts, shards_in
from openblip.errors import ConfigError, ImageError, MissingExtraError, NoSampleError, SourceError
from openblip.files import JsonLine, changed_settings, name_full_disk, read_json, write_json
from openblip.progress import Progress

if TYPE_CHECKING:
    import torch

    from openblip.data.images import FrameReader, Pixels
    from openblip.predictor import BasePredictor, EncodedImages

BATCHES_OF_UNIT = 8  # of files, which a worker of a cluster does at a time
UNITS_AHEAD = 64  # that workers may begin before the lines of an earlier one are written
DELIMITERS = {".jsonl": "", ".json": "", ".csv": ",", ".tsv": "\t"}  # of the columns of --out; JSON lines have none


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(DecodingAhead):
    """How images are read, and where the lines go."""

    out: Path | None = None
    """Write the lines to this file, .jsonl, .json, .csv or .tsv; JSON lines to standard output when not given."""
    batch_size: int = 32
    """Images, or frames of videos, in one step of the model."""
    num_frames: int | None = None
    """Frames of a video; 8, for questions 16 when not given (paper)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_frames", "num_workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
        if self.out is not None:
            check_output("--out", self.out)
            if self.out.suffix.lower() not in DELIMITERS:
                endings = ", ".join(DELIMITERS)
                raise ConfigError(f"--out {self.out} ends in none of {endings}, in which lines are written")


@dataclass
class FileSource(Source):
    """Image and video files as a source. It has one shard, whose name is empty; a key is a path or URL."""

    name: str
    paths: list[str]
    with_texts: bool = False
    """Whether samples have the texts that are beside the file, or in a metadata file of its folder."""
    is_alone: bool = False
    """Whether this is one file whose lines are printed: they have no key, and what cannot be read is an error."""
    rows: Mapping[str, FolderRow] = field(default_factory=dict, repr=False)
    """What folders say of their files."""
    caption_field: str | None = None
    """Of the json beside a file."""
    unused: Mapping[str, Counter[str]] = field(default_factory=dict, repr=False)

    def shards(self) -> Sequence[str]:
        return [""]

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        for number, path in enumerate(self.paths):
            if selection.has(number):
                row = self.row(path) if self.with_texts else FolderRow(path, (path,))
                if (item := row.read(self.name, shard, selection)) is not None:
                    yield Located(number, item)

    def row(self, path: str) -> FolderRow:
        """A file and the texts about it."""
        if path in self.rows:
            return replace(self.rows[path], key=path)
        beside = {} if "://" in path else {kind: Path(path).with_suffix(f".{kind}") for kind in TEXT_SUFFIXES}
        texts = {kind: str(file) for kind, file in beside.items() if file.is_file()}
        return FolderRow(path, (path,), text_paths=texts, caption_column=self.caption_field)

    @property
    def option_names(self) -> Set[str]:  # type: ignore[override]
        return option_names_of(self.rows.values()) if self.rows or self.with_texts else frozenset()

    @property
    def has_texts(self) -> bool:
        """Whether samples may have texts; files have none unless some lie beside them."""
        return self.with_texts and any(row.text_paths or row.stated for row in map(self.row, self.paths))


def is_media(path: str) -> bool:
    """Whether a file is an image or a video by its ending."""
    return file_kind(Path(path).suffix[1:].lower()) in ("image", "video")


def find_source(spec: str, options: ReadingOptions, *, without_texts: str | None = None) -> list[Source]:
    """As `find_sources`; but one file, which is an image if it has no other ending, is alone without --out.

    without_texts: given where the samples' own texts are needed; raises it as `ConfigError` where they can have none.
    """
    path, suffix = Path(spec), Path(spec).suffix[1:].lower()
    is_image = is_media(spec) or (suffix not in SOURCE_SUFFIXES and path.is_file())
    if options.out is None and is_image and not path.is_dir():
        sources: list[Source] = [FileSource(spec, [spec], is_alone=True)]
        check_options_used(sources, options)
    else:
        sources = find_sources([spec], options, with_texts=without_texts is not None)
    if without_texts is not None and all(isinstance(source, FileSource) and not source.has_texts for source in sources):
        raise ConfigError(without_texts)
    return sources


def find_sources(specs: Iterable[str], options: SourceOptions, *, with_texts: bool = False) -> list[Source]:
    """Open what `specs` name: image and video files, each once, folders (searched recursively) and data sources.

    with_texts: whether the samples' own texts are needed; image files come with those beside them. Raises `SourceError`
    when nothing is named, a name is no source, a table has no texts that are needed, or two sources have a shard of the
    same name; `ConfigError` for a column without a table.
    """
    sources: list[Source] = []
    seen: set[str] = set()
    spec_of_shard: dict[str, str] = {}
    for spec in dict.fromkeys(specs):
        path, paths, rows, unused = Path(spec), list[str](), dict[str, FolderRow](), Counter[str]()
        if path.is_dir() and not shards_in(spec, spec)[0]:
            files = FolderFiles.of(str(path), options, ("image", "video"))
            rows, unused = {row.image[0]: row for row in files.rows}, files.unused
            paths = list(rows)
        elif is_media(spec):
            paths = [spec if "://" in spec else str(path)]  # a Path would take a slash from a URL
        if paths:
            new = [path for path in paths if path not in seen]
            column = options.caption_column
            last = sources[-1] if sources else None
            if not rows and isinstance(last, FileSource) and not last.rows:
                last.paths += new  # read ahead together
            else:
                sources.append(FileSource(spec, new, with_texts, rows=rows, caption_field=column, unused={"": unused}))
            seen.update(paths)
            continue
        source = open_source(spec, **options.reading)
        for shard in source.shards():
            if (other := spec_of_shard.setdefault(shard, spec)) != spec:
                same = f"{other} and {spec} both have a shard {shard}"
                raise SourceError(f"{same}, so their keys cannot be told apart; name them in two commands")
        sources.append(source)
    if not sources:
        raise SourceError("there is no image to work on; name image files, folders of images or a data source")
    check_options_used(sources, options)
    if with_texts:
        require_texts(sources)
    return sources


def read_lines(path: Path) -> Iterator[JsonLine]:
    """The whole lines of a file that a process appends to, of a table by the names of its first line.

    A last one that was being written when the process was killed is left out. Raises `SourceError`.
    """
    with path.open("rb") as file:
        dialect, first = Dialect.of(file, str(path))
        for number, offset, data in dialect.lines(file, first):
            if not data.endswith(b"\n"):
                return
            try:
                value = dialect.parse(data)
            except SourceError as error:
                if "unexpected end of data" in str(error):  # the process was killed within quotes
                    return
                raise SourceError(f"{path}, line {number}: {error}") from error
            yield JsonLine(number, value, offset + len(data))


PreparedBatch = ReadBatch[tuple["Pixels", Sequence[str]]]  # frames, uint8 (F, 3, S, S), and texts of each sample
SampleLines = tuple[Sample, list[Mapping[str, Any]]]  # a sample and its lines


class EncodedBatch(NamedTuple):
    """Samples, their encoded images or videos, and the texts that are asked or scored of each."""

    samples: Sequence[Sample]
    images: "EncodedImages"
    texts: Sequence[Sequence[str]]

    @property
    def owners(self) -> "torch.Tensor":
        """The number of the sample that each text of the batch is about: int64 (R,)."""
        import torch

        return torch.tensor([number for number, of_sample in enumerate(self.texts) for _ in of_sample])

    @property
    def all_texts(self) -> list[str]:
        return [text for of_sample in self.texts for text in of_sample]


class LineTask(ABC):
    """What a command asks a model about samples, and the lines that it makes of that. It is pickled to workers."""

    default_frames: ClassVar[int] = 8
    """Frames of a video."""

    @property
    @abstractmethod
    def fields(self) -> Sequence[str]:
        """What lines hold beside shard and key."""

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What decides the lines besides the samples, the model, its precision and the number of frames."""

    @property
    @abstractmethod
    def num_lines(self) -> int | None:
        """The number of lines for each sample; None where samples have different numbers of lines."""

    @abstractmethod
    def resolved(self, predictor: "BasePredictor") -> Self:
        """The task with what the checkpoint decides; raises `OpenBlipError` for what it cannot do."""

    @abstractmethod
    def texts(self, sample: Sample) -> Sequence[str]:
        """The texts that are asked or scored of a sample. Raises `SourceError` where it has none that is needed."""

    @abstractmethod
    def rows(self, predictor: "BasePredictor", batch: EncodedBatch, batch_size: int) -> Iterable[Mapping[str, Any]]:
        """The lines of a batch: for each sample one for each of its texts, else `num_lines`."""


@dataclass(frozen=True)
class SampleReader:
    """Reads samples ahead of a model, which it does not hold, with the texts of a task."""

    task: LineTask
    options: ReadingOptions
    frames: "FrameReader"

    def batches(
        self, sources: Sequence[Source], shards: Sequence[str] | None, is_present: Callable[[str, str], bool]
    ) -> Generator[PreparedBatch]:
        """The samples of sources, or of these shards, in order: each with its image as the only frame, or the frames of
        its video, and its texts. What cannot be read, or lacks a text, is a reject; what `is_present` is passed over.
        """
        from openblip.data.images import is_video

        num_frames = self.options.num_frames or self.task.default_frames

        def prepare(sample: Sample) -> tuple["Pixels", Sequence[str]]:
            texts = self.task.texts(sample)
            if is_video(sample.image) or file_kind(Path(sample.key).suffix[1:].lower()) == "video":
                try:
                    return self.frames.read_video(sample.image, num_frames, sample.place), texts
                except MissingExtraError as error:
                    raise ImageError(str(error)) from error  # of this sample: images need no package for videos
            return self.frames.read_image(sample.image, sample.place)[None], texts

        def entries() -> Generator[tuple[Sample, tuple["Pixels", Sequence[str]]] | Reject]:
            num_workers, ahead = self.options.num_workers, 2 * self.options.batch_size
            for source in sources:
                yield from read_source(
                    source, prepare, shards=shards, skip=is_present, num_workers=num_workers, ahead=ahead,
                    keep_going=True,
                )  # fmt: skip

        return in_batches(entries(), self.options.batch_size, frames=lambda item: len(item[0]))


class LineFacts(NamedTuple):
    """What the workers of a command have in common: the task with what the checkpoint decides, and the model."""

    task: LineTask
    sha256: str
    dtype: str
    instructions: str
    """By which results in lower precision are rounded; empty in float32."""


class LineUnit(NamedTuple):
    """A part of the samples that a worker of a cluster makes the lines of: a shard, or some of many files."""

    files: "FileSource | int"
    """Some files, or the position of the source that has the shard."""
    shard: str
    present: frozenset[str]
    """Keys that have their lines."""


class LineResult(NamedTuple):
    """The lines of a unit, in order, and what could not be read."""

    lines: list[SampleLines]
    rejects: list[Reject]


class LineWorker(LoadedJob[LineUnit, PreparedBatch, LineResult]):
    """A model that makes the lines of a task, in this process or on a worker of a cluster."""

    def __init__(self, job: "LineJob") -> None:
        self.job, self.options = job, job.options
        self.predictor = job.model.load()
        self.predictor.scales_jpegs = self.options.jpeg == "scaled"
        self.task = job.task.resolved(self.predictor)

    def facts(self) -> LineFacts:
        from openblip.predictor import instruction_set

        dtype = self.predictor.precision
        instructions = "" if dtype == "float32" else instruction_set(self.predictor.device)
        return LineFacts(self.task, self.predictor.fingerprint(), dtype, instructions)

    def check(self) -> None:
        for name, ours, needed in zip(LineFacts._fields, self.facts(), self.job.facts or self.facts(), strict=True):
            if ours != needed:
                raise ConfigError(f"it would write other lines: its {name} is {ours}, not {needed}")

    def decoding(self, num_workers: int) -> Callable[[LineUnit], Generator[PreparedBatch]]:
        reader = replace(self.reader, options=replace(self.options, num_workers=num_workers))
        return _UnitReading(reader, self.job.sources)

    @property
    def reader(self) -> SampleReader:
        return SampleReader(self.task, self.options, self.predictor.frame_reader)

    def work(self, unit: LineUnit, batches: Generator[PreparedBatch], on_images: Callable[[int], None]) -> LineResult:
        result = LineResult([], [])
        for lines, rejects in self.lines(batches):
            result.lines.extend((replace(sample, image=b"", captions=(), info={}), rows) for sample, rows in lines)
            result.rejects.extend(rejects)
            on_images(len(lines) + len(rejects))
        return result

    def lines(self, batches: Generator[PreparedBatch]) -> Generator[tuple[list[SampleLines], list[Reject]]]:
        """The lines of batches, which are stacked one ahead of the model."""
        with closing(read_ahead(batches, self._stack, num_workers=1, ahead=1)) as stacked:
            for batch, pixels in stacked:
                lines: list[SampleLines] = []
                if pixels is not None:
                    images = self.predictor.encode(pixels, self.options.batch_size)
                    samples, prepared = zip(*batch.samples, strict=True)
                    encoded = EncodedBatch(samples, images, [texts for _, texts in prepared])
                    rows = iter(self.task.rows(self.predictor, encoded, self.options.batch_size))
                    for sample, texts in zip(samples, encoded.texts, strict=True):
                        lines.append((sample, list(islice(rows, len(texts) or self.task.num_lines))))
                yield lines, batch.rejects

    def _stack(self, batch: PreparedBatch) -> tuple[PreparedBatch, "torch.Tensor | None"]:
        """A batch, and the frames of all its samples, uint8 (B, F, 3, S, S)."""
        return batch, self.predictor.stack([frames for _, (frames, _) in batch.samples]) if batch.samples else None


@dataclass(frozen=True)
class LineJob(Job[LineUnit, PreparedBatch, LineResult]):
    """The lines of a task, by the workers of a cluster."""

    task: LineTask
    options: ReadingOptions
    model: ModelOptions
    sources: Sequence[Source]
    facts: LineFacts | None = None
    """Those of the first worker, which all others must share."""

    def load(self) -> LineWorker:
        return LineWorker(self)


@dataclass(frozen=True)
class _UnitReading:
    """What a decoder does. The files of the images stay with it."""

    reader: SampleReader

    sources: Sequence[Source]

    def __call__(self, unit: LineUnit) -> Generator[PreparedBatch]:
        source = self.sources[unit.files] if isinstance(unit.files, int) else unit.files
        with closing(self.reader.batches([source], [unit.shard], lambda _, key: key in unit.present)) as batches:
            for batch in batches:
                yield ReadBatch([(replace(sample, image=b""), of) for sample, of in batch.samples], batch.rejects)


@dataclass
class OutputLines:
    """The lines that a command writes, and the samples they are about.

    A file that a killed run left is continued, if `<out>.settings.json` beside it says that it was written with the
    same settings. What is half-written at its end, a line or a sample without all its lines, is cut off; where the
    number of lines is not known, the last sample is. Raises `ConfigError` when the file was written otherwise.
    """

    sources: Sequence[Source]
    options: ReadingOptions
    model: ModelOptions
    engine: EngineOptions
    task: LineTask
    printed: bool = True
    """False writes nothing where there is no file."""
    present: dict[tuple[str, str], list[dict[str, Any]]] = field(init=False, default_factory=dict)
    """What the file held before, by shard and key. The shard of image files is empty; only their lines are kept."""

    def __post_init__(self) -> None:
        self.file_sources = [source for source in self.sources if isinstance(source, FileSource)]
        self.is_alone = any(source.is_alone for source in self.file_sources)
        self.stream: TextIO | None = None
        self.num_done = self.num_skipped = self.num_passed = 0
        self.shards_seen: set[str] = set()
        self.num_shards = sum(len(source.shards()) for source in self.sources)
        self.resources = ExitStack()
        with ExitStack() as resources:
            job = LineJob(self.task, self.options, self.model, self.sources)
            if self.engine.engine == "ray":
                resources.enter_context(connected(self.engine))
                pool: WorkerPool[LineUnit, PreparedBatch, LineResult] = WorkerPool(
                    self.engine, num_workers=self.options.num_workers, device=self.model.device
                )
                self.pool = resources.enter_context(pool)
                self.facts: LineFacts = self.pool.first_facts(job)
            else:
                self.worker = job.load()
                self.facts = self.worker.facts()
            self.task = self.facts.task
            place = ("shard", "key") if len(self.file_sources) < len(self.sources) else ("key",)
            self.columns, self.delimiter = [*place, *self.task.fields], ""
            if (out := self.options.out) is not None:
                self.delimiter = DELIMITERS[out.suffix.lower()]
                out.parent.mkdir(parents=True, exist_ok=True)
                self._compare_settings(out)
                if out.exists():
                    os.truncate(out, self._read_present(out))
            self.resources = resources.pop_all()

    def write(self, *, label: str) -> Iterator[list[SampleLines]]:
        """Write the lines of all samples, in the order of the sources; yield the samples whose lines are written.

        Samples are read and decoded ahead; those whose lines are there already are passed over. Those that cannot be
        read, or that lack a text, are named on standard error and counted. A progress display runs along. Raises
        `NoSampleError` when there is no sample at all.
        """
        total, num_done, out = None, len(self.present), self.options.out
        if len(self.file_sources) == len(self.sources):
            names = [safe_name(path) for source in self.file_sources for path in source.paths]
            total, num_done = len(names), sum(("", name) in self.present for name in names)
        target = out.open("a", encoding="utf-8") if out else nullcontext(sys.stdout if self.printed else None)
        with self.resources, target as self.stream:
            # On a terminal lines show how far the work is, and a bar would break them.
            visible = not self.is_alone and (self.stream is None or not self.stream.isatty())
            with Progress(label, total=total, unit="images", done=num_done, visible=visible) as bar:
                on_cluster = self.engine.engine == "ray"
                made = self._lines_of_cluster(bar) if on_cluster else self.worker.lines(self._read_here())
                with closing(made):
                    for lines, rejects in made:
                        self._report([sample.shard for sample, _ in lines], rejects, bar)
                        self._write_lines(lines)
                        yield lines
                        self.num_done += len(lines)
                        if not on_cluster:
                            bar.advance(len(lines) + len(rejects))
        if not (self.file_sources or self.num_done or self.num_skipped or self.num_passed):
            unused = unused_line(source.count_unused() for source in self.sources)
            raise NoSampleError(f"{self.sources[0].name}: 0 images in it{unused and f'; {unused}'}")

    def _read_here(self) -> Generator[PreparedBatch]:
        """All samples of all sources, read in this process."""

        def is_present(shard: str, key: str) -> bool:
            self.num_passed += (shard, key) in self.present
            return (shard, key) in self.present

        return self.worker.reader.batches(self.sources, None, is_present)

    def _lines_of_cluster(self, bar: Progress) -> Generator[tuple[list[SampleLines], list[Reject]]]:
        """The lines that workers make, in order: those of later units wait for those of earlier ones, and units are
        begun when not too many of them wait.
        """
        units = list(self._units())
        job = LineJob(self.task, self.options, self.model, self.sources, self.facts)
        waiting: dict[int, LineResult] = {}
        first = 0
        done = self.pool.run(job, units, on_images=bar.advance, ahead=UNITS_AHEAD)
        with closing(done):
            for number, result in done:
                if isinstance(result, Died):
                    place = units[number].shard or "files"
                    result = LineResult([], [Reject(place, "", result.reason)])
                waiting[number] = result
                while first in waiting:
                    self.num_passed += len(units[first].present)
                    yield waiting.pop(first)
                    first += 1

    def _units(self) -> Iterator[LineUnit]:
        """The parts of the sources that workers do."""
        present: dict[str, set[str]] = defaultdict(set)
        for shard, key in self.present:
            present[shard].add(key)
        for position, source in enumerate(self.sources):
            if isinstance(source, FileSource):
                paths = [path for path in source.paths if safe_name(path) not in present[""]]
                size = BATCHES_OF_UNIT * self.options.batch_size
                for start in range(0, len(paths), size):
                    part = paths[start : start + size]
                    rows = {path: source.rows[path] for path in part if path in source.rows}
                    yield LineUnit(replace(source, paths=part, rows=rows, unused={}), "", frozenset())
            else:
                for shard in source.shards():
                    yield LineUnit(position, shard, frozenset(present[shard]))

    def _report(self, shards: Sequence[str], rejects: Sequence[Reject], bar: Progress) -> None:
        """Name rejects, and estimate by the shards that were begun how many samples there are."""
        for shard in dict.fromkeys([*(reject.shard for reject in rejects), *shards]):
            if shard and shard not in self.shards_seen:
                bar.estimate_total(len(self.shards_seen), self.num_shards)
                self.shards_seen.add(shard)
        for reject in rejects:
            if self.is_alone:
                raise ImageError(reject.reason)
            self.num_skipped += 1
            bar.note(f"skipped {reject}")

    def _write_lines(self, lines: Iterable[SampleLines]) -> None:
        if self.stream is not None:
            with name_full_disk(self.options.out or "standard output", self.stream):
                for sample, rows in lines:
                    self._write(self.stream, sample, rows)
                self.stream.flush()

    def _write(self, stream: TextIO, sample: Sample, rows: Iterable[Mapping[str, Any]]) -> None:
        table = csv.DictWriter(stream, self.columns, delimiter=self.delimiter or ",", lineterminator="\n")
        if self.delimiter and not stream.tell():
            table.writeheader()
        place = {"shard": sample.shard, "key": sample.key}
        place = {name: value for name, value in place.items() if value and not self.is_alone}
        for row in rows:
            if self.delimiter:
                lists = {name: json.dumps(value) for name, value in row.items() if isinstance(value, list)}
                table.writerow({**place, **row, **lists})
            else:
                stream.write(json.dumps({**place, **row}, ensure_ascii=False) + "\n")

    def finish(self, verb: str, more: str = "") -> int:
        """Say on standard error how many samples are done, and return the exit code."""
        if not self.is_alone:
            print(f"{verb} {self.num_done} images, skipped {self.num_skipped}{more}", file=sys.stderr)
            if unused := unused_line(source.count_unused() for source in self.sources):
                print(unused, file=sys.stderr)
        return 1 if self.num_skipped else 0

    def _compare_settings(self, out: Path) -> None:
        """Write the settings beside a new file; raises `ConfigError` when those of a file with lines are others. The
        sources, where a reader finds the images of the lines, may change.
        """
        file = out.with_name(f"{out.name}.settings.json")
        now = json.loads(json.dumps({
            **self.task.settings,
            "model": {"checkpoint": self.model.model, "sha256": self.facts.sha256},
            "dtype": self.facts.dtype,
            "num_frames": self.options.num_frames or self.task.default_frames,
            "jpeg": self.options.jpeg,
        }))  # fmt: skip
        specs = [absolute_spec(source.name) for source in self.sources if source not in self.file_sources]
        reading = {**self.options.reading, "images": self.options.images and storage.absolute(self.options.images)}
        if not out.exists() or out.stat().st_size == 0:
            write_json(file, {"openblip": version("openblip"), **now, "sources": specs, "reading": reading})
            return
        if not file.exists():
            reason = f"no {file.name} beside it says which model and settings wrote them"
            message = f"{out} has lines, but {reason}, so they cannot be continued; name another --out"
            raise ConfigError(message, page="caption.md#tables-and-going-on")
        settings = read_json(file)
        before = {"jpeg": "exact", **settings}  # as versions decoded that do not say it
        before = {name: value for name, value in before.items() if name not in ("openblip", "sources", "reading")}
        if before.get("model", {}).get("sha256") == now["model"]["sha256"]:
            before["model"] = now["model"]
        if changed := changed_settings(before, now):
            advice = "repeat the earlier settings to continue it, or name another --out"
            message = f"{out} was written with other settings: {'; '.join(changed.values())}; {advice}"
            raise ConfigError(message, page="caption.md#tables-and-going-on")
        specs = list(dict.fromkeys([*settings.get("sources", ()), *specs]))
        write_json(file, {**settings, "sources": specs, "reading": reading})

    def _read_present(self, out: Path) -> int:
        """Fill `present` and return the byte where the last whole sample ends."""
        num_lines = self.task.num_lines

        def identity(line: JsonLine) -> tuple[str, str]:
            if self.delimiter and list(line.value) != self.columns:
                raise error(line)
            return str(line.value.get("shard", "")), str(line.value.get("key", ""))

        def error(line: JsonLine) -> SourceError:
            count = "" if num_lines is None else f"{num_lines} "
            holds = f"{', '.join(self.columns)}, {count}for each image"
            return SourceError(f"{out}:{line.number} is no line of this command ({holds})")

        end = start_of_last = 0
        incomplete: JsonLine | None = None  # the first line of a sample without all its lines: only the last may be so
        try:
            for name, group in groupby(read_lines(out), identity):
                lines = list(group)
                if incomplete or name in self.present or (num_lines is not None and len(lines) > num_lines):
                    raise error(incomplete or lines[0])
                if num_lines is None or len(lines) == num_lines:
                    is_file = not name[0]  # of files the paths are in memory too; shards may have a billion lines
                    self.present[name] = [line.value for line in lines] if is_file else []
                    start_of_last, end = end, lines[-1].end
                else:
                    incomplete = lines[0]
        except SourceError as damage:
            raise ConfigError(f"{damage}; name another --out") from damage
        if num_lines is None and self.present:
            self.present.popitem()
            return start_of_last
        return end
