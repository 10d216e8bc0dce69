"""`openblip caption`: one JSON line per caption, and a text file beside each image on request."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from openblip.cli.batches import OutputLines, decode_image
from openblip.cli.inputs import FileSource, find_sources
from openblip.cli.options import DecodingOptions, ModelOptions, ReadingOptions
from openblip.cli.sidecar import SidecarOptions
from openblip.data.sample import safe_name
from openblip.errors import ConfigError


def command(
    sources: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE...", help_behavior_hint="")],
    /,
    *,
    model: ModelOptions,
    out: Path | None = None,
    sidecar: SidecarOptions,
    prompt: str | None = None,
    num_captions: int = 1,
    confidences: bool = False,
    decoding: DecodingOptions,
    seed: int = 0,
    reading: ReadingOptions,
) -> int:
    """Captions images: one JSON line {"key", "caption", "logprob"} per caption.

    Images that cannot be read are named on standard error and skipped; the exit code is then 1. With --out,
    the same command again continues where it was stopped. So it does with --sidecar, which prints no lines;
    together with --overwrite it needs --out to know what is done.

    Args:
        sources: image files, folders of images (searched recursively), or data sources ("shards/*.tar").
        model: which model runs, where and how.
        out: write the lines to this file; to standard output when not given.
        sidecar: text files beside the images.
        prompt: the first words of every caption; the checkpoint's own when not given.
        num_captions: captions per image.
        confidences: add "tokens", the word pieces, and "token_logprobs" to each line.
        decoding: how captions are written.
        seed: nucleus: with the image it decides the sampled captions, whatever the order or batch.
        reading: how images are read.
    """
    if num_captions < 1:
        raise ConfigError("--num-captions must be at least 1")
    strategy = decoding.build(seed)
    inputs, num_left_alone = find_sources(sources, images=reading.images), 0
    path_of_key: dict[str, str] = {}
    if sidecar.sidecar:
        paths, num_left_alone = sidecar.choose(inputs)
        inputs = [FileSource("images", paths)]
        path_of_key = {safe_name(path): path for path in paths}
    predictor = model.load()
    predictor.caption([], prompt=prompt, decoding=strategy)  # raises what it cannot do, before a file is made
    import torch

    names = ("tokens", "token_logprobs") if confidences else ()
    with OutputLines(
        out, fields=("caption", "logprob", *names), num_lines=num_captions, printed=not sidecar.sidecar
    ) as lines:
        # A run that was stopped has written these lines, and maybe not their text files.
        for (_, key), present in lines.present.items():
            if key in path_of_key:
                sidecar.write(path_of_key[key], [row["caption"] for row in present])
        for samples, images in lines.batches(
            inputs,
            lambda sample: torch.from_numpy(predictor.preprocessing(decode_image(sample))),
            reading,
            label="captioning",
        ):
            captions = predictor.caption(
                torch.stack(images),  # (B, 3, S, S) uint8
                prompt=prompt,
                decoding=strategy,
                num_captions=num_captions,
                batch_size=reading.batch_size,
                return_scores=True,
            )
            rows: list[list[dict[str, Any]]] = [[] for _ in samples]
            for row, of_image in zip(rows, captions, strict=True):
                for caption in [of_image] if num_captions == 1 else of_image:
                    row.append({"caption": caption.text, "logprob": round(caption.logprob, 6)})
                    if confidences:
                        row[-1]["tokens"] = list(caption.tokens)
                        row[-1]["token_logprobs"] = [round(logprob, 6) for logprob in caption.token_logprobs]
            lines.write(samples, rows)
            if sidecar.sidecar:
                for sample, row in zip(samples, rows, strict=True):
                    sidecar.write(path_of_key[sample.key], [caption["caption"] for caption in row])
    left_alone = f", left {num_left_alone} alone that have a {sidecar.extension} file"
    return lines.finish("captioned", left_alone if num_left_alone else "")
