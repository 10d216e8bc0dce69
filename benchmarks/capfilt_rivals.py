"""`openblip capfilt` beside the same two checkpoints driven as data-juicer's operators drive transformers.

Peer: `image_captioning_mapper` and `image_text_matching_filter` of data-juicer 1.x: one image in a forward pass, a call
of `generate` through the whole model for each caption, and for each text a forward pass of the whole matching model, in
float32, which is how both load their models. Ours is the whole run: tar shards in, caption files and report out.
Claim: at least five times as many images a second.

Method: BLIP-base at 384 pixels with random weights (captioner and filter have equal image encoders), exactly 20 new
tokens by nucleus sampling, JPEG files of 640 x 480 with a web text each. Both sides read and decode the files; loading
the models is on neither side. `--captions 1` is the paper's setting; three captions make four texts for each image.

    python -m benchmarks.capfilt_rivals [--captions 1 3] [--images 32] [--rival-dtype float32] [--device cuda]
"""

import contextlib
import io
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import blip_base
from benchmarks.command_line import NUM_TOKENS, write_shards
from benchmarks.harness import Report, alternate, parser

TARGET = 5.0


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--captions", type=int, nargs="+", default=[1, 3], help="captions written for an image")
    options.add_argument("--images", type=int, default=32)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--rival-dtype", choices=("float32", "bfloat16"), default="float32")
    options.set_defaults(repeats=3)
    arguments = options.parse_args()
    report = Report("capfilt_rivals", __doc__, arguments)
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "shards")
        shards.mkdir()
        write_shards(shards, (640, 480), arguments.images)
        stages: dict[str, float] = {}
        theirs, ours = rival(shards, arguments), openblip_run(shards, arguments, stages)
        for count in arguments.captions:
            sides = {
                f"as data-juicer, {arguments.rival_dtype}": partial(theirs, count),
                "openblip capfilt": partial(ours, count),
            }
            stages.clear()
            seconds = alternate(sides, arguments.repeats, warm_up=1)
            title = f"CapFilt of {arguments.images} images, {count} captions each"
            report.timings(title, seconds)
            peer, own = seconds.values()
            report.ratio(f"{title}: images a second beside data-juicer's operators", peer, own, target=TARGET)
            report.facts[f"images per second, {count} captions"] = arguments.images / min(own)
            total = stages.pop("total")
            shares = {stage: round(spent / total, 3) for stage, spent in stages.items()}
            report.facts[f"stages, {count} captions"] = shares
            print(f"\nshares of the time of a shard: {shares}")
            missed += [title] if min(peer) / min(own) < TARGET else []
    report.save()
    if missed:
        raise SystemExit(f"below {TARGET} times: {'; '.join(missed)}")


def rival(shards: Path, arguments: Any) -> Callable[[int], None]:
    """Both operators of data-juicer over the samples of the shards, one after the other."""
    import torch
    from PIL import Image
    from transformers import BlipProcessor

    dtype = getattr(torch, arguments.rival_dtype)
    captioner = blip_base.transformers_captioner(dtype).to(arguments.device)
    matcher = blip_base.transformers_filter(dtype).to(arguments.device)
    writing, reading = (
        BlipProcessor.from_pretrained(folder) for folder in (blip_base.captioner_folder(), blip_base.filter_folder())
    )

    def inputs(processor: Any, **given: Any) -> Any:
        return processor(**given, return_tensors="pt").to(arguments.device, dtype)

    @torch.no_grad()
    def run(num_captions: int) -> None:
        for path in sorted(shards.glob("*.tar")):
            with tarfile.open(path) as archive:
                members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
            for name in (name for name in members if name.endswith(".jpg")):
                texts = [members[name.replace(".jpg", ".txt")].decode()]
                image = Image.open(io.BytesIO(members[name])).convert("RGB")
                pixels = inputs(writing, images=image)
                for _ in range(num_captions):
                    ids = captioner.generate(
                        **pixels, do_sample=True, top_p=0.9, min_new_tokens=NUM_TOKENS, max_new_tokens=NUM_TOKENS
                    )
                    texts += writing.batch_decode(ids, skip_special_tokens=True)
                for text in texts:  # a sample of its own each, whose image is loaded anew
                    image = Image.open(io.BytesIO(members[name])).convert("RGB")
                    given = inputs(reading, images=image, text=text, truncation=True, max_length=512, padding=True)
                    matcher(**given).itm_score.float().cpu().softmax(dim=-1)[:, 1].tolist()

    return run


def openblip_run(shards: Path, arguments: Any, stages: dict[str, float]) -> Callable[[int], None]:
    """The whole run with models that are loaded already; adds the seconds of its stages to `stages`."""
    import openblip
    from openblip.capfilt.config import CapFiltConfig
    from openblip.capfilt.local import run_capfilt
    from openblip.files import read_json
    from openblip.generation.decoding import Nucleus

    folders = (blip_base.captioner_folder(), blip_base.filter_folder())
    models = {str(folder): openblip.load(folder, arguments.device, "auto") for folder in folders}
    for model in models.values():
        hashed = model.fingerprint()
        vars(model)["fingerprint"] = lambda hashed=hashed: hashed

    def run(num_captions: int) -> None:
        config = CapFiltConfig(
            source=str(shards),
            captioner=str(folders[0]),
            filter=str(folders[1]),
            decoding=Nucleus(min_new_tokens=NUM_TOKENS, max_new_tokens=NUM_TOKENS),
            num_captions=num_captions,
            batch_size=arguments.batch_size,
            no_check=True,
        )
        with (
            tempfile.TemporaryDirectory() as out,
            contextlib.redirect_stderr(io.StringIO()),
            patch("openblip.load", lambda source, **_: models[source]),
            patch("openblip.capfilt.process.load_captioner", lambda source, **_: models[source]),
        ):
            summary = run_capfilt(config, out)
            for path in Path(out).glob("captions/*.report.json"):
                for stage, spent in read_json(path)["seconds"].items():
                    stages[stage] = stages.get(stage, 0.0) + spent
        assert not summary.failed, summary.failed

    return run


if __name__ == "__main__":
    main()
