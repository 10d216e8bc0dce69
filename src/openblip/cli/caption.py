"""`openblip caption`: one JSON line per caption, for any number of images."""

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO, TypeVar

import tyro

from openblip.cli.caption_file import caption_lines, open_to_continue
from openblip.cli.decoding_options import DecodingOptions
from openblip.cli.inputs import Identity, ImageInput, find_inputs
from openblip.errors import ConfigError, ImageError, SourceError
from openblip.generation.decoding import Decoding
from openblip.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from openblip.predictor import Predictor

    Pixels = npt.NDArray[np.uint8]  # (3, S, S)

Loaded = TypeVar("Loaded")


def command(
    sources: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...", help_behavior_hint="")
    ],
    /,
    *,
    model: str,
    out: Path | None = None,
    images: str | None = None,
    prompt: str | None = None,
    num_captions: int = 1,
    options: Annotated[DecodingOptions, tyro.conf.arg(name="")] = DecodingOptions(),  # noqa: B008
    seed: int = 0,
    batch_size: int = 32,
    num_workers: int = 2,
    device: str | None = None,
) -> int:
    """Captions images: one JSON line {"key", "caption", "logprob"} per caption.

    Images that cannot be read are named on standard error and skipped; the exit code is then 1. With --out,
    the same command again continues where it was stopped.

    Args:
        sources: image files, folders of images (searched recursively), or data sources ("shards/*.tar").
        model: a checkpoint folder, or the name of a shipped model.
        out: write the lines to this file; to standard output when not given.
        images: the image folder of a COCO captions file.
        prompt: the first words of every caption; the checkpoint's own when not given.
        num_captions: captions per image.
        options: how captions are written.
        seed: nucleus: with the picture it decides the sampled captions, whatever the order or batch.
        batch_size: images in one step of the model.
        num_workers: threads that read and decode images.
        device: "cpu", "cuda", "cuda:1" …; the best there is when not given.
    """
    import openblip

    if min(num_captions, batch_size, num_workers) < 1:
        raise ConfigError("--num-captions, --batch-size and --num-workers must be at least 1")
    decoding = options.build(seed)
    inputs = find_inputs(sources, images=images)
    captioner = _Captioner(
        predictor=openblip.load(model, device=device),
        decoding=decoding,
        prompt=prompt,
        num_captions=num_captions,
        batch_size=batch_size,
    )
    for reject in inputs.rejects:
        print(f"skipped {reject.shard}/{reject.key}: {reject.reason}", file=sys.stderr)
    stream, present = (sys.stdout, set[Identity]()) if out is None else open_to_continue(out, num_captions)
    with contextlib.nullcontext() if out is None else stream:
        waiting = [image for image in inputs.images if image.identity not in present]
        progress = Progress(
            "captioning",
            total=len(inputs.images),
            unit="images",
            done=len(inputs.images) - len(waiting),
            visible=not stream.isatty(),  # a bar would break the lines, which show progress themselves
        )
        with progress:
            failed = captioner.run(waiting, stream, progress, num_workers=num_workers)
    skipped = failed + len(inputs.rejects)
    print(f"captioned {len(waiting) - failed} images, skipped {skipped}", file=sys.stderr)
    return 1 if skipped else 0


@dataclass(frozen=True, kw_only=True)
class _Captioner:
    """The model and how it is to write; `run` works through images in order."""

    predictor: "Predictor"
    decoding: Decoding
    prompt: str | None
    num_captions: int
    batch_size: int

    def run(
        self, images: Sequence[ImageInput], stream: TextIO, progress: Progress, *, num_workers: int
    ) -> int:
        """Writes the lines of `images` to `stream`, batch by batch; returns how many images failed."""
        failed = 0
        batch: list[tuple[ImageInput, Pixels]] = []
        for image, result in prefetch(images, self._load, num_workers=num_workers, ahead=2 * self.batch_size):
            if isinstance(result, Exception):
                failed += 1
                progress.note(f"skipped {image.name}: {result}")
                progress.advance(1)
            else:
                batch.append((image, result))
            if len(batch) == self.batch_size:
                self._write(batch, stream, progress)
                batch = []
        if batch:
            self._write(batch, stream, progress)
        return failed

    def _load(self, image: ImageInput) -> "Pixels | Exception":
        try:
            return self.predictor.preprocessing(image.read())
        except (ImageError, SourceError, OSError) as error:
            return error

    def _write(
        self, batch: Sequence[tuple[ImageInput, "Pixels"]], stream: TextIO, progress: Progress
    ) -> None:
        import numpy as np
        import torch

        results = self.predictor.caption(
            torch.from_numpy(np.stack([pixels for _, pixels in batch])),  # (B, 3, S, S) uint8
            prompt=self.prompt,
            decoding=self.decoding,
            num_captions=self.num_captions,
            batch_size=self.batch_size,
            return_scores=True,
        )
        for (image, _), result in zip(batch, results, strict=True):
            stream.write(caption_lines(image, result if self.num_captions > 1 else [result]))
        stream.flush()
        progress.advance(len(batch))


def prefetch(
    items: Sequence[ImageInput],
    load: Callable[[ImageInput], Loaded],
    *,
    num_workers: int,
    ahead: int,
) -> Iterator[tuple[ImageInput, Loaded]]:
    """Yields every item with what `load` made of it, in order; up to `ahead` loads run ahead in threads."""
    with ThreadPoolExecutor(num_workers) as pool:
        under_way: deque[tuple[ImageInput, Future[Loaded]]] = deque()
        try:
            for item in items:
                under_way.append((item, pool.submit(load, item)))
                if len(under_way) > ahead:
                    first, future = under_way.popleft()
                    yield first, future.result()
            while under_way:
                first, future = under_way.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
