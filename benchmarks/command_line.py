"""`openblip caption`, `capfilt` and `index` over tar shards reach the rate of their models alone.

Peer: the same models in the same process, called with images that are decoded and resized already, in the same batches.
Claim: reading, decoding, resizing and writing cost at most a tenth of that rate, for photographs of 640 x 480 and of 12
megapixels, with the options that the commands have by default. Beside it: JPEG files decoded exactly.

Method: BLIP-base at 384 pixels with random weights (captioner and filter have equal image encoders), exactly 20 new
tokens, 8 images in a batch; four shards of JPEG files. An index is that of the filter, of the images and their texts.
The sides take turns. Loading the models, of which their hash for a manifest is a part, is on neither side.

    python -m benchmarks.command_line caption|capfilt|index 640x480|4032x3024 [--images 64]
"""

import contextlib
import io
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.blip_base import captioner_folder, filter_folder, images, texts
from benchmarks.harness import Report, alternate, parser

NUM_TOKENS, NUM_SHARDS, NUM_FILES = 20, 4, 16  # different files; shards repeat them
TARGET = 0.9


def write_shards(folder: Path, size: tuple[int, int], count: int) -> None:
    """`count` images with a caption each, in `NUM_SHARDS` shards, stored as cameras and web sites store them."""
    files = []
    for image in images(min(count, NUM_FILES), size):
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=87)
        files.append(encoded.getvalue())
    captions = texts(count)
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in range(shard, count, NUM_SHARDS):
                for suffix, content in (("jpg", files[number % len(files)]), ("txt", captions[number].encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("command", choices=["caption", "capfilt", "index"])
    options.add_argument("size", help="of the images, as WIDTHxHEIGHT")
    options.add_argument("--images", type=int, default=64, help="in all shards")
    options.set_defaults(repeats=3)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--jpeg", nargs="+", default=["scaled", "exact"])
    arguments = options.parse_args()
    report = Report(f"command_line-{arguments.command}-{arguments.size}", __doc__, arguments)
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "shards")
        shards.mkdir()
        width, height = map(int, arguments.size.split("x"))
        write_shards(shards, (width, height), arguments.images)
        sides_of = {"caption": caption_sides, "capfilt": capfilt_sides, "index": index_sides}
        sides = sides_of[arguments.command](shards, arguments)
        seconds = alternate(sides, arguments.repeats, warm_up=0)
    title = f"openblip {arguments.command}, {arguments.images} JPEG files of {arguments.size}"
    report.timings(title, seconds)
    for jpeg in arguments.jpeg:
        name, target = f"{title}, --jpeg {jpeg}, beside its models alone", TARGET if jpeg == "scaled" else None
        report.ratio(name, seconds["models alone"], seconds[jpeg], target=target)
    report.save()


def caption_sides(shards: Path, arguments: Any) -> dict[str, Callable[[], object]]:
    """The command with a model that is loaded already, and that model alone."""
    import openblip
    from openblip.cli import caption
    from openblip.cli.lines import ReadingOptions
    from openblip.cli.options import DecodingOptions, ModelOptions
    from openblip.cluster import EngineOptions
    from openblip.generation.decoding import Greedy

    predictor = openblip.load(captioner_folder(), arguments.device, "auto")

    class LoadedModel(ModelOptions):
        def load(self) -> Any:
            return predictor

    def command(jpeg: Any) -> None:
        reading = ReadingOptions(jpeg=jpeg, batch_size=batch_size)
        decoding = DecodingOptions(decoding="greedy", min_new_tokens=NUM_TOKENS, max_new_tokens=NUM_TOKENS)
        model, sidecar = LoadedModel(model=str(captioner_folder())), caption.SidecarOptions()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            caption.command(
                (str(shards),), model=model, reading=reading, sidecar=sidecar, decoding=decoding, engine=EngineOptions()
            )

    greedy, batch_size = Greedy(min_new_tokens=NUM_TOKENS, max_new_tokens=NUM_TOKENS), arguments.batch_size
    pixels = prepared(predictor, shards)
    predictor.caption(pixels[:batch_size], decoding=greedy)  # once without a clock

    def alone() -> None:
        for part in pixels.split(batch_size):
            predictor.caption(part, decoding=greedy, batch_size=batch_size, return_scores=True)

    return {"models alone": alone, **{jpeg: partial(command, jpeg) for jpeg in arguments.jpeg}}


def capfilt_sides(shards: Path, arguments: Any) -> dict[str, Callable[[], object]]:
    """The whole run with models that are loaded already, and their calls alone."""
    import openblip
    from openblip.capfilt.config import CapFiltConfig
    from openblip.capfilt.local import run_capfilt
    from openblip.data.sources import open_source
    from openblip.generation.decoding import Nucleus
    from openblip.predictor.values import chunks

    models = {
        str(folder): openblip.load(folder, arguments.device, "auto") for folder in (captioner_folder(), filter_folder())
    }
    captioner, judge = models.values()
    for model in models.values():
        hashed = model.fingerprint()
        vars(model)["fingerprint"] = lambda hashed=hashed: hashed
    decoding = Nucleus(min_new_tokens=NUM_TOKENS, max_new_tokens=NUM_TOKENS)
    config = CapFiltConfig(
        source=str(shards), captioner=str(captioner_folder()), filter=str(filter_folder()), decoding=decoding
    )
    config, batch_size = replace(config, batch_size=arguments.batch_size), arguments.batch_size

    def command(jpeg: Any) -> None:
        with (
            tempfile.TemporaryDirectory() as out,
            contextlib.redirect_stderr(io.StringIO()),
            patch("openblip.load", lambda source, **_: models[source]),
        ):
            summary = run_capfilt(replace(config, jpeg=jpeg), out)
        assert not summary.failed, summary.failed

    source = open_source(str(shards))
    web = [item.captions for shard in source.shards() for _, item in source.read(shard, images=False)]
    parts = [slice(start, start + batch_size) for start in range(0, arguments.images // NUM_SHARDS, batch_size)]
    pixels = prepared(captioner, shards)
    encodes_once = captioner.encodes_alike(judge)
    judge.score_texts(captioner.encode(pixels[:batch_size]), texts(2))  # once without a clock
    captioner.caption(pixels[:batch_size], decoding=decoding)

    def alone() -> None:
        for shard_pixels, shard_texts in zip(
            pixels.chunk(NUM_SHARDS), chunks(web, arguments.images // NUM_SHARDS), strict=True
        ):
            for part in parts:
                encoded = captioner.encode(shard_pixels[part], batch_size)
                written = captioner.caption(
                    encoded, decoding=decoding, batch_size=batch_size, return_scores=True, seeds=range(len(encoded))
                )
                given = [[*own, caption.text] for own, caption in zip(shard_texts[part], written, strict=True)]
                encoded = encoded if encodes_once else judge.encode(shard_pixels[part], batch_size)
                judge.score_texts(encoded, given, batch_size)

    return {"models alone": alone, **{jpeg: partial(command, jpeg) for jpeg in arguments.jpeg}}


def index_sides(shards: Path, arguments: Any) -> dict[str, Callable[[], object]]:
    """`build_index` with a model that is loaded already, and its embeddings of the same images and texts alone."""
    import openblip
    from openblip.data.config import DecodingAhead
    from openblip.search.index import build_index

    predictor = openblip.load(filter_folder(), arguments.device, "auto")
    hashed = predictor.fingerprint()
    vars(predictor)["fingerprint"] = lambda: hashed
    batch_size, pixels, captions = arguments.batch_size, prepared(predictor, shards), texts(arguments.images)

    def command(jpeg: Any) -> None:
        reading = DecodingAhead(jpeg=jpeg)
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):
            done = build_index(str(shards), predictor, out, checkpoint="base", reading=reading, batch_size=batch_size)
        assert done.added == len(pixels)

    def alone() -> None:
        predictor.embed_images(pixels, batch_size)
        predictor.embed_texts(captions, batch_size)

    predictor.embed_images(pixels[:batch_size])  # once without a clock
    return {"models alone": alone, **{jpeg: partial(command, jpeg) for jpeg in arguments.jpeg}}


def prepared(predictor: Any, shards: Path) -> Any:
    """All images as the model takes them, uint8 (B, 3, S, S)."""
    from openblip.data.reader import read_source
    from openblip.data.sources import open_source

    entries = read_source(open_source(str(shards)), lambda sample: predictor.read_image(sample.image))
    return predictor.stack([pixels for _, pixels in entries])


if __name__ == "__main__":
    main()
