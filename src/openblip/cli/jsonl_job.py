"""The frame of the commands that work through images: read ahead, batch, write lines, go on after a stop."""

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TextIO, TypeVar

from openblip.cli.inputs import Identity, ImageInput, Inputs
from openblip.cli.jsonl_file import LineFormat, Row, open_to_continue
from openblip.errors import ConfigError, ImageError, SourceError
from openblip.progress import Progress

Loaded = TypeVar("Loaded")


class Outcome(NamedTuple):
    """How many images this run has worked on, and how many it could not read."""

    done: int
    skipped: int

    @property
    def exit_code(self) -> int:
        return 1 if self.skipped else 0


@dataclass(frozen=True, kw_only=True)
class JsonlJob(Generic[Loaded]):
    """What a command does with each image."""

    label: str
    """What is being done, e.g. "captioning"."""
    layout: LineFormat
    load: Callable[[ImageInput], Loaded]
    """Reads and decodes, in threads; `ImageError`, `SourceError` and `OSError` skip the image."""
    process: Callable[[Sequence[Loaded]], Sequence[Sequence[Row]]]
    """The rows of each image of a batch."""
    batch_size: int
    num_workers: int
    finish: Callable[[ImageInput, Sequence[Row]], None] | None = None
    """What else happens to the rows of an image, once they are written."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.num_workers) < 1:
            raise ConfigError("--batch-size and --num-workers must be at least 1")

    def run(self, inputs: Inputs, stream: TextIO | None, present: set[Identity] | None = None) -> Outcome:
        """Works through the inputs that are not `present` yet; names those that cannot be read.

        Lines go to `stream`, to nowhere when None.
        """
        for reject in inputs.rejects:
            print(f"skipped {reject.shard}/{reject.key}: {reject.reason}", file=sys.stderr)
        waiting = [image for image in inputs.images if image.identity not in (present or ())]
        progress = Progress(
            self.label,
            total=len(inputs.images),
            unit="images",
            done=len(inputs.images) - len(waiting),
            # a bar would break lines on a terminal, which show progress themselves
            visible=stream is None or not stream.isatty(),
        )
        failed = 0
        batch: list[tuple[ImageInput, Loaded]] = []
        with progress:
            for image, result in self._prefetched(waiting):
                if isinstance(result, _Unreadable):
                    failed += 1
                    progress.note(f"skipped {image.name}: {result.error}")
                    progress.advance(1)
                else:
                    batch.append((image, result))
                if len(batch) == self.batch_size:
                    self._work(batch, stream, progress)
                    batch = []
            if batch:
                self._work(batch, stream, progress)
        return Outcome(len(waiting) - failed, failed + len(inputs.rejects))

    def _work(
        self, batch: Sequence[tuple[ImageInput, Loaded]], stream: TextIO | None, progress: Progress
    ) -> None:
        results = self.process([loaded for _, loaded in batch])
        done = [(image, rows) for (image, _), rows in zip(batch, results, strict=True)]
        if stream is not None:
            for image, rows in done:
                stream.write(self.layout.lines(image, rows))
            stream.flush()
        if self.finish is not None:
            for image, rows in done:
                self.finish(image, rows)
        progress.advance(len(batch))

    def _prefetched(
        self, images: Sequence[ImageInput]
    ) -> Iterator[tuple[ImageInput, "Loaded | _Unreadable"]]:
        """Every image as it was loaded, in order; two batches are read ahead."""
        with ThreadPoolExecutor(self.num_workers) as pool:
            under_way: deque[tuple[ImageInput, Future[Loaded | _Unreadable]]] = deque()
            try:
                for image in images:
                    under_way.append((image, pool.submit(self._try_load, image)))
                    if len(under_way) > 2 * self.batch_size:
                        first, future = under_way.popleft()
                        yield first, future.result()
                while under_way:
                    first, future = under_way.popleft()
                    yield first, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _try_load(self, image: ImageInput) -> "Loaded | _Unreadable":
        try:
            return self.load(image)
        except (ImageError, SourceError, OSError) as error:
            return _Unreadable(error)


@dataclass(frozen=True, slots=True)
class _Unreadable:
    error: Exception


@contextlib.contextmanager
def lines_to(out: Path | None, layout: LineFormat) -> Iterator[tuple[TextIO, set[Identity]]]:
    """Where lines go, and the inputs that are there already: the file `out`, or standard output when None."""
    if out is None:
        yield sys.stdout, set()
        return
    stream, present = open_to_continue(out, layout)
    with stream:
        yield stream, present
