"""Loading a BLIP-base and captioning with it takes little memory: the process stays near the size of its weights.

Peer: transformers, which loads the same folder in the same precision.
Method: each side is a process of its own that imports, loads, and writes the captions of 8 images at 384 pixels,
greedily, 20 tokens; its largest resident memory, libraries included, is what the system says at its end. Wall time of
the whole process is printed beside it: that is what the first captions cost.

    python -m benchmarks.memory [--dtypes bfloat16 int8 float32]
"""

import argparse
import statistics

from benchmarks.captions import our_call, their_call
from benchmarks.harness import Child, Report, parser, run_child

TARGETS = {"bfloat16": 1.2}
PEERS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}


def caption_with_openblip(dtype: str) -> int:
    import openblip
    from benchmarks import blip_base

    model = openblip.load(blip_base.captioner_folder(), device="cpu", dtype=dtype)
    return len(our_call(model, model.prepare(blip_base.images(8)), "greedy")())


def caption_with_transformers(dtype: str) -> int:
    import torch

    from benchmarks import blip_base

    model = blip_base.transformers_captioner(getattr(torch, dtype))
    with torch.inference_mode():
        return len(their_call(model, torch.randn(8, 3, 384, 384).to(model.dtype), "greedy")())


def only_import() -> int:
    import torch

    return torch.get_num_threads()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dtypes", nargs="+", choices=list(PEERS), default=["bfloat16", "int8"])
    options.set_defaults(repeats=3)
    run(options.parse_args())


def run(options: argparse.Namespace) -> None:
    from benchmarks import blip_base

    blip_base.captioner_folder()  # written before the first child needs it
    report = Report("memory", __doc__, options)
    sides = {f"openblip {dtype}": (caption_with_openblip, dtype) for dtype in options.dtypes}
    sides |= {f"transformers {PEERS[dtype]}": (caption_with_transformers, PEERS[dtype]) for dtype in options.dtypes}
    children: dict[str, list[Child]] = {name: [] for name in sides}
    for number in range(options.repeats):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            function, dtype = sides[name]
            children[name].append(run_child(function, dtype))
    report.facts["import torch alone, GB"] = run_child(only_import).peak_bytes / 1e9
    report.timings("from the start of the process to its end", {n: [c.seconds for c in r] for n, r in children.items()})
    for name, runs in children.items():
        peaks = [child.peak_bytes / 1e9 for child in runs]
        target = TARGETS.get(name.removeprefix("openblip "))
        settings = {"unit": "GB", "target": target, "at_most": True}
        report.add(f"peak memory, {name}", statistics.median(peaks), min(peaks), max(peaks), **settings)
    report.save()


if __name__ == "__main__":
    main()
