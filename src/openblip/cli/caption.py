"""`openblip caption`: one JSON line per caption, and a text file beside each image on request."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openblip.cli.batches import Batches, OutputLines, decode_image
from openblip.cli.inputs import FileSource, find_sources
from openblip.cli.options import DecodingOptions, ModelOptions
from openblip.cli.sidecar import SidecarOptions
from openblip.errors import ConfigError

if TYPE_CHECKING:
    from openblip.predictor import ScoredText


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
    decoding: Annotated[DecodingOptions, tyro.conf.arg(name="")] = DecodingOptions(),  # noqa: B008
    seed: int = 0,
    batch_size: int = 32,
    num_workers: int = 2,
    options: Annotated[ModelOptions, tyro.conf.arg(name="")] = ModelOptions(),  # noqa: B008
) -> int:
    """Captions images: one JSON line {"key", "caption", "logprob"} per caption.

    Images that cannot be read are named on standard error and skipped; the exit code is then 1. With --out,
    the same command again continues where it was stopped. So it does with --sidecar, which prints no lines;
    together with --overwrite it needs --out to know what is done.

    Args:
        sources: image files, folders of images (searched recursively), or data sources ("shards/*.tar").
        model: a checkpoint folder, file or hub name, or the name of a shipped model.
        out: write the lines to this file; to standard output when not given.
        images: the folder of the images that an annotation file or table names.
        sidecars: text files beside the images.
        prompt: the first words of every caption; the checkpoint's own when not given.
        num_captions: captions per image.
        confidences: add "tokens", the word pieces, and "token_logprobs" to each line.
        decoding: how captions are written.
        seed: nucleus: with the image it decides the sampled captions, whatever the order or batch.
        batch_size: images in one step of the model.
        num_workers: threads that read and decode images.
        options: where and how the model runs.
    """
    if min(num_captions, batch_size, num_workers) < 1:
        raise ConfigError("--num-captions, --batch-size and --num-workers must be at least 1")
    strategy = decoding.build(seed)
    inputs, num_left_alone = find_sources(sources, images=images), 0
    path_of_key: dict[str, str] = {}
    if sidecars.sidecar:
        files, num_left_alone = sidecars.choose(inputs)
        inputs = [FileSource("images", files)]
        path_of_key = {file.key: file.path for file in files}
    predictor = options.load(model)
    predictor.caption([], prompt=prompt, decoding=strategy)  # refuses what it cannot do, before a file is made
    import torch

    lines = OutputLines(
        out,
        fields=("caption", "logprob", *(("tokens", "token_logprobs") if confidences else ())),
        num_lines=num_captions,
        printed=not sidecars.sidecar,
    )
    with lines:
        # A run that was stopped has written these lines, and maybe not their text files.
        for (_, key), rows in lines.present.items():
            if key in path_of_key:
                sidecars.write(path_of_key[key], [row["caption"] for row in rows])
        batches = Batches(
            inputs,
            lambda sample: torch.from_numpy(predictor.preprocessing(decode_image(sample))),
            lines,
            label="captioning",
            batch_size=batch_size,
            num_workers=num_workers,
        )
        for batch in batches:
            captions = predictor.caption(
                torch.stack([pixels for _, pixels in batch]),  # (B, 3, S, S) uint8
                prompt=prompt,
                decoding=strategy,
                num_captions=num_captions,
                batch_size=batch_size,
                return_scores=True,
            )
            samples = [sample for sample, _ in batch]
            if num_captions == 1:
                captions = [[caption] for caption in captions]
            lines.write(samples, [[_row(caption, confidences) for caption in each] for each in captions])
            if sidecars.sidecar:
                for sample, each in zip(samples, captions, strict=True):
                    sidecars.write(path_of_key[sample.key], [caption.text for caption in each])
    left_alone = f", left {num_left_alone} alone that have a {sidecars.extension} file"
    return batches.finish("captioned", left_alone if num_left_alone else "")


def _row(caption: "ScoredText", confidences: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"caption": caption.text, "logprob": round(caption.logprob, 6)}
    if confidences:
        row["tokens"] = list(caption.tokens)
        row["token_logprobs"] = [round(logprob, 6) for logprob in caption.token_logprobs]
    return row
