"""`openblip capfilt`: captions and filters noisy image-text pairs."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from openblip.cli.options import DecodingOptions


def command(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="")],
    /,
    *,
    captioner: str,
    filter: str,
    out: Path,
    threshold: float = 0.5,
    num_captions: int = 1,
    options: Annotated[DecodingOptions, tyro.conf.arg(name="")] = DecodingOptions(decoding="nucleus"),  # noqa: B008
    prompt: str | None = None,
    seed: int = 0,
    images: str | None = None,
    batch_size: int = 64,
    num_workers: int = 4,
    device: str | None = None,
    dtype: str = "float32",
) -> int:
    """Writes a caption for every image, scores it and the web text, and keeps what matches.

    The same command again resumes. Every text and its scores stay in the output; read what is kept as the
    data source capfilt:OUT, or write it out with `openblip capfilt-export`.

    Args:
        source: the noisy pairs: tar shards ("{0000..0127}.tar"), parquet, jsonl, csv, COCO json or a folder.
        captioner: checkpoint that writes captions: a folder, or the name of a shipped model.
        filter: checkpoint that scores texts against images: a folder, or the name of a shipped model.
        out: the folder of the output.
        threshold: keep texts with an ITM probability above this; `openblip capfilt-select` changes it later.
        num_captions: captions written per image.
        options: how captions are written.
        prompt: the first words of every caption; the checkpoint's own when not given.
        seed: with shard and key of an image it decides its sampled captions.
        images: the folder of the images that an annotation file or table names.
        batch_size: images in one step of the models.
        num_workers: threads that read and decode images.
        device: "cpu", "cuda", "cuda:1" …; the best there is when not given.
        dtype: precision of the models: float32, bfloat16, float16, or auto for the fastest at no loss that shows.
    """
    from openblip.capfilt.config import CapFiltConfig

    config = CapFiltConfig(
        source=source,
        images=images,
        captioner=captioner,
        filter=filter,
        threshold=threshold,
        num_captions=num_captions,
        decoding=options.build(),
        prompt=prompt,
        seed=seed,
        batch_size=batch_size,
        num_workers=num_workers,
        dtype=dtype,
    )
    from openblip.capfilt.local import run_capfilt

    summary = run_capfilt(config, out, device=device)
    for name, counts in summary.scores.sources.items():
        print(f"{name}: kept {counts.kept:,} of {counts.texts:,} texts")
    print(f"report: {summary.report}")
    for shard, error in summary.failed:
        print(f"failed: {shard}: {error}", file=sys.stderr)
    if summary.failed:
        print(f"{len(summary.failed)} shards could not be finished; the same command again tries them", file=sys.stderr)
    return summary.exit_code
