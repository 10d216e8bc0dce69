"""Images are encoded at most of the speed of a large matrix product.

Ceiling: a product of two large bfloat16 matrices, measured in the same process before and after. Peer: transformers'
vision model of the same weights.
Method: 8 images at 384 pixels through BLIP-base's image encoder; the operations are those of its matrix products,
attention included (`openblip.models.flops`), divided by the time and by the ceiling. int8 is a share of the bfloat16
ceiling.

    python -m benchmarks.encoding [--dtypes bfloat16 int8]
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import openblip
from benchmarks import blip_base
from benchmarks.harness import Report, alternate, matmul_ceiling, parser
from openblip.models.flops import vision_flops

NUM_IMAGES = 8
TARGETS = {"bfloat16": 0.62, "int8": 0.7}
GPU_TARGETS = {"bfloat16": 0.6}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    options.add_argument("--images", type=int, default=NUM_IMAGES)
    run(options.parse_args())


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    report = Report("encoding", __doc__, options)
    sides: dict[str, Callable[[], Any]] = {}
    for dtype in options.dtypes:
        ours = openblip.load(blip_base.captioner_folder(), device=options.device, dtype=dtype)
        prepared, normalised = blip_base.pixels(ours, NUM_IMAGES)
        copies = -(-options.images // NUM_IMAGES)
        prepared, normalised = (x.repeat(copies, 1, 1, 1)[: options.images] for x in (prepared, normalised))
        sides[f"openblip {dtype}"] = partial(ours.encode, prepared, batch_size=options.images)
    inputs = normalised.to(options.device, torch.bfloat16)
    theirs = blip_base.transformers_captioner(torch.bfloat16).vision_model.to(options.device)
    sides["transformers bfloat16"] = lambda: theirs(inputs)
    before = matmul_ceiling(torch.bfloat16, options.device)
    seconds = alternate(sides, options.repeats)
    after = matmul_ceiling(torch.bfloat16, options.device)
    report.facts["ceiling, TFLOP/s"] = [before / 1e12, after / 1e12]
    report.timings(f"encoding {options.images} images", seconds)
    operations = options.images * vision_flops(ours.model.config.vision)
    targets = TARGETS if options.device == "cpu" else GPU_TARGETS
    for name, values in seconds.items():
        shares = [operations / own / max(before, after) for own in values]
        settings = {"unit": "of the ceiling", "target": targets.get(name.removeprefix("openblip "))}
        report.add(f"encoding, {name}", statistics.median(shares), min(shares), max(shares), **settings)
    report.save()


if __name__ == "__main__":
    main()
