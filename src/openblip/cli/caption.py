"""`openblip caption`: one JSON line per caption, and a text file beside each picture on request."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from openblip.cli.decoding_options import DecodingOptions
from openblip.cli.inputs import ImageInput, Inputs, find_inputs
from openblip.cli.jsonl_file import LineFormat, Row, read_lines
from openblip.cli.jsonl_job import JsonlJob, Outcome, lines_to
from openblip.cli.sidecar import SidecarOptions
from openblip.errors import ConfigError
from openblip.generation.decoding import Decoding

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from openblip.predictor import BasePredictor, ScoredText

    Pixels = npt.NDArray[np.uint8]  # (3, S, S)


def command(
    sources: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...", help_behavior_hint="")
    ],
    /,
    *,
    model: str,
    out: Path | None = None,
    images: str | None = None,
    sidecars: Annotated[SidecarOptions, tyro.conf.arg(name="")] = SidecarOptions(),  # noqa: B008
    prompt: str | None = None,
    num_captions: int = 1,
    confidences: bool = False,
    options: Annotated[DecodingOptions, tyro.conf.arg(name="")] = DecodingOptions(),  # noqa: B008
    seed: int = 0,
    batch_size: int = 32,
    num_workers: int = 2,
    device: str | None = None,
    tokenizer: str | None = None,
) -> int:
    """Captions images: one JSON line {"key", "caption", "logprob"} per caption.

    Images that cannot be read are named on standard error and skipped; the exit code is then 1. With --out,
    the same command again continues where it was stopped. So it does with --sidecar, which prints no lines;
    together with --overwrite it needs --out to know what is done.

    Args:
        sources: image files, folders of images (searched recursively), or data sources ("shards/*.tar").
        model: a checkpoint folder, file or hub name, or the name of a shipped model.
        out: write the lines to this file; to standard output when not given.
        images: the folder of the pictures that an annotation file or table names.
        sidecars: text files beside the pictures.
        prompt: the first words of every caption; the checkpoint's own when not given.
        num_captions: captions per image.
        confidences: add "tokens", the word pieces, and "token_logprobs" to each line.
        options: how captions are written.
        seed: nucleus: with the picture it decides the sampled captions, whatever the order or batch.
        batch_size: images in one step of the model.
        num_workers: threads that read and decode images.
        device: "cpu", "cuda", "cuda:1" …; the best there is when not given.
        tokenizer: folder or hub name of the vocabulary, for a checkpoint that has none.
    """
    import openblip

    if num_captions < 1:
        raise ConfigError("--num-captions must be at least 1")
    decoding = options.build(seed)
    inputs, left = find_inputs(sources, images=images), 0
    if sidecars.sidecar:
        inputs, left = sidecars.choose(inputs)
    captioner = _Captioner(
        predictor=openblip.load(model, device=device, tokenizer=tokenizer),
        decoding=decoding,
        prompt=prompt,
        num_captions=num_captions,
        confidences=confidences,
        batch_size=batch_size,
    )
    captioner.check()
    outcome = _run(captioner.job(sidecars, num_workers), inputs, out, sidecars)
    alone = f", left {left} alone that have a {sidecars.extension} file" if left else ""
    print(f"captioned {outcome.done} images, skipped {outcome.skipped}{alone}", file=sys.stderr)
    return outcome.exit_code


def _run(job: JsonlJob["Pixels"], inputs: Inputs, out: Path | None, sidecars: SidecarOptions) -> Outcome:
    if sidecars.sidecar and out is None:
        return job.run(inputs, None)
    with lines_to(out, job.layout) as (stream, present):
        if sidecars.sidecar and out is not None:
            # A run that was stopped has written these lines, and maybe not their text files.
            waiting = {image.identity: image for image in inputs.images if image.identity in present}
            for identity, rows, _, _ in read_lines(out):
                if identity in waiting:
                    sidecars.write(waiting[identity], rows)
        return job.run(inputs, stream, present)


@dataclass(frozen=True, kw_only=True)
class _Captioner:
    """The model and how it is to write."""

    predictor: "BasePredictor"
    decoding: Decoding
    prompt: str | None
    num_captions: int
    confidences: bool
    batch_size: int

    def check(self) -> None:
        """Lets the model refuse what it cannot do before anything is written."""
        self.predictor.caption([], prompt=self.prompt, decoding=self.decoding)

    def job(self, sidecars: SidecarOptions, num_workers: int) -> JsonlJob["Pixels"]:
        scores = ("tokens", "token_logprobs") if self.confidences else ()
        return JsonlJob(
            label="captioning",
            layout=LineFormat(fields=("caption", "logprob", *scores), num_lines=self.num_captions),
            load=self._load,
            process=self._process,
            batch_size=self.batch_size,
            num_workers=num_workers,
            finish=sidecars.write if sidecars.sidecar else None,
        )

    def _load(self, image: ImageInput) -> "Pixels":
        return self.predictor.preprocessing(image.read())

    def _process(self, batch: Sequence["Pixels"]) -> list[list[Row]]:
        import numpy as np
        import torch

        results = self.predictor.caption(
            torch.from_numpy(np.stack(batch)),  # (B, 3, S, S) uint8
            prompt=self.prompt,
            decoding=self.decoding,
            num_captions=self.num_captions,
            batch_size=self.batch_size,
            return_scores=True,
        )
        return [
            [self._row(caption) for caption in (result if self.num_captions > 1 else [result])]
            for result in results
        ]

    def _row(self, caption: "ScoredText") -> Row:
        row = {"caption": caption.text, "logprob": round(caption.logprob, 6)}
        if not self.confidences:
            return row
        logprobs = [round(logprob, 6) for logprob in caption.token_logprobs]
        return {**row, "tokens": list(caption.tokens), "token_logprobs": logprobs}
