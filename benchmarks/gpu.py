"""On a GPU, decoding has no launch gaps and the image encoder and training steps come near the matmul ceiling.

The parts of `benchmarks/gpu.sh`, the most important first. Each is a benchmark of this folder in the sizes of a GPU, or
is written here: where the encoder's time goes and what its choices are worth, the share of a decoding's time in which
the GPU works, and training steps of the largest batch that fits. Each part has its own time limit and its own files.

    python -m benchmarks.gpu [PART ...] [--device cuda] [--results DIR]
    python -m benchmarks.gpu --table --results DIR

With `--small` the sizes are such that a CPU tries all parts in a few minutes (--device cpu).
"""

import argparse
import copy
import json
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import openblip
from benchmarks import blip_base, captions, encoding, matching
from benchmarks.harness import Figure, Report, alternate, figure_text, machine_text, matmul_ceiling, parser, timed
from openblip.models.flops import vision_flops
from openblip.nn import linear, vit

BFLOAT16 = ["bfloat16"]
LARGEST_BATCHES = {100e9: 640, 0: 448}  # of pre-training, by the least bytes of a GPU's memory


def main() -> None:
    options = parser(__doc__)
    options.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=", ".join(PARTS))
    options.add_argument("--small", action="store_true", help="sizes for a CPU")
    options.add_argument("--table", action="store_true", help="only print the figures of earlier parts")
    options.set_defaults(device="cuda")
    arguments = options.parse_args()
    if arguments.table:
        print_table(arguments.results)
        return
    for name in arguments.parts or PARTS:
        limit, run = PARTS[name]
        print(f"\n=== {name}", flush=True)
        own = copy.copy(arguments)
        own.parts = name
        try:
            with at_most(20 * limit if arguments.small else limit):
                print(f"=== {name} took {timed(lambda run=run, own=own: run(own)):.1f} s", flush=True)
        except ImportError as error:
            print(f"SKIPPED {name}: {error}", flush=True)
        except Exception:
            print(f"FAILED {name}\n{traceback.format_exc()[-2500:]}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"It took more than {seconds:.0f} s.")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def sized(options: argparse.Namespace, **settings: Any) -> argparse.Namespace:
    """The options of another benchmark: those given, and `settings`."""
    return argparse.Namespace(**{**vars(options), "dtypes": BFLOAT16, **settings})


# --- Captions and matching


def caption(options: argparse.Namespace, strategy: str, repeats: int, **settings: Any) -> None:
    settings = {"compiled": False, "static_cache": False, "captions": None, "alone": False, "images": 64, **settings}
    if options.small:
        settings |= {"images": 2, "captions": settings["captions"] and 3}
        repeats = 1
    captions.run(sized(options, strategy=strategy, repeats=repeats, **settings))


def encode(options: argparse.Namespace) -> None:
    encoding.run(sized(options, images=2 if options.small else 64, repeats=1 if options.small else 9))


def match(options: argparse.Namespace) -> None:
    matching.run(sized(options, repeats=1 if options.small else 5))


def captioner(options: argparse.Namespace) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The captioner in bfloat16, and prepared and normalised images."""
    ours = openblip.load(blip_base.captioner_folder(), device=options.device, dtype="bfloat16")
    count = 2 if options.small else 64
    prepared, normalised = captions.repeated(blip_base.pixels(ours, min(8, count)), count)
    return ours, prepared, normalised.to(options.device, torch.bfloat16)


@torch.inference_mode()
def find_gaps(options: argparse.Namespace) -> None:
    """The share of the time between the first and the last kernel of a decoding in which a kernel runs."""
    report = Report("launch_gaps", __doc__, options)
    ours, prepared, _ = captioner(options)
    encoded = ours.encode(prepared, batch_size=len(prepared))
    first = ours.caption(encoded, prompt="", batch_size=len(prepared), **captions.OURS["greedy"])
    assert len(first) == len(prepared)
    activity = ProfilerActivity.CUDA if options.device == "cuda" else ProfilerActivity.CPU
    for name in ("greedy", "beam", "nucleus"):
        settings = captions.OURS[name]

        def call(settings: dict[str, Any] = settings) -> object:
            return ours.caption(encoded, prompt="", batch_size=len(prepared), **settings)

        report.facts[f"{name}: first calls, s"] = [timed(call) for _ in range(3)]
        seconds = [timed(call) for _ in range(3)]
        report.timings(f"{name} after encoding, {len(prepared)} images", {"openblip bfloat16": seconds})
        with profile(activities=[activity]) as profiler:
            timed(call)
        kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        if kernels:
            busy = covered([(event.time_range.start, event.time_range.end) for event in kernels])
            note = f"{len(kernels)} kernels"
            report.add(f"{name}: share of the time in which the GPU works", busy, unit="", target=0.9, note=note)
            print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=8, max_name_column_width=70))
    report.save()


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that some span covers."""
    busy, end = 0.0, min(start for start, _ in spans)
    begin = end
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (end - begin)


# --- The image encoder


@torch.inference_mode()
def explain_encoder(options: argparse.Namespace) -> None:
    """Where the encoder's time goes, and what it would be with other choices."""
    report = Report("encoder_parts", __doc__, options)
    ours, _, pixels = captioner(options)
    model, config = ours.model, ours.model.config.vision
    block, tokens = model.vision.blocks[0], model.encode_image(pixels)
    wide = block.mlp[0](tokens)
    query, key, value = (
        part.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for part in block.attention.qkv(tokens).chunk(3, -1)
    )

    def encode() -> object:
        return model.encode_image(pixels)

    def products() -> None:
        for layer in (block.attention.qkv, block.attention.out, block.mlp[0]):
            layer(tokens)
        block.mlp[2](wide)

    def attention() -> object:
        return F.scaled_dot_product_attention(query, key, value)

    def without_cudnn(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                return call()

        return run

    def convolved() -> object:
        plain = lambda convolution, pixels: convolution(pixels).flatten(2).transpose(1, 2)  # noqa: E731
        with patch.object(vit, "embed_patches", plain):
            return encode()

    def gelu_apart() -> object:
        with patch.object(linear, "_infers_in_half", lambda *_: False):
            return encode()

    layers = range(config.num_layers)
    sides: dict[str, Callable[[], object]] = {
        "encoder": encode,
        "with flash attention instead of cuDNN's": without_cudnn(encode),
        "with a convolution for patches": convolved,
        "with GELU apart": gelu_apart,
        "matrix products alone": lambda: [products() for _ in layers],
        "attention alone": lambda: [attention() for _ in layers],
        "attention alone, flash": without_cudnn(lambda: [attention() for _ in layers]),
        "norms alone": lambda: [block.mlp_norm(tokens) for _ in range(2 * config.num_layers)],
        "residuals alone": lambda: [tokens + tokens for _ in range(2 * config.num_layers)],
    }
    ceiling = matmul_ceiling(torch.bfloat16, options.device)
    seconds = alternate(sides, 1 if options.small else 7)
    report.timings(f"encoding {len(pixels)} normalised images", seconds)
    operations = len(pixels) * vision_flops(config)
    shares = sorted(operations / own / ceiling for own in seconds["encoder"])
    settings = {"unit": "of the ceiling", "target": 0.6, "note": f"ceiling {ceiling / 1e12:.0f} TFLOP/s"}
    report.add("encoder", shares[len(shares) // 2], shares[0], shares[-1], **settings)
    report.save()
    with profile() as profiler:
        timed(encode)
    sort_by = "self_cuda_time_total" if options.device == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=14, max_name_column_width=70))


@torch.inference_mode()
def compile_encoder(options: argparse.Namespace) -> None:
    """What torch.compile, which needs a C compiler, would make of the encoder."""
    report = Report("encoder_compiled", __doc__, options)
    ours, _, pixels = captioner(options)
    compiled = torch.compile(ours.model.encode_image)
    report.facts["compilation, s"] = timed(lambda: compiled(pixels))
    sides = {"encoder": lambda: ours.model.encode_image(pixels), "compiled": lambda: compiled(pixels)}
    seconds = alternate(sides, 1 if options.small else 7)
    report.timings(f"encoding {len(pixels)} normalised images", seconds)
    report.ratio("encoder, compiled beside as it is", seconds["encoder"], seconds["compiled"])
    report.save()


# --- Training


def train(options: argparse.Namespace, part: str, batch_size: int, repeats: int) -> None:
    from benchmarks import training_step

    torch.backends.cudnn.allow_tf32 = False  # the two sides are compared in float32
    batch_size, repeats = (2, 1) if options.small else (batch_size, repeats)
    training_step.run(sized(options, part=part, batch_size=batch_size, repeats=repeats))


def train_large(options: argparse.Namespace) -> None:
    """Our step alone, of as many images as fit."""
    from benchmarks import training_step
    from openblip.models.config import BlipConfig
    from openblip.models.flops import contrastive_step_flops

    report = Report("training_large", __doc__, options)
    size, device, config = 2, options.device, BlipConfig()
    if not options.small:
        memory = torch.cuda.get_device_properties(0).total_memory
        size = next(size for least, size in LARGEST_BATCHES.items() if memory >= least)
    task = training_step.pretraining(config, training_step.QUEUE_SIZE, device)
    batch = training_step.pairs(size, 224, config.text.vocab_size)
    step = training_step.our_step(task, batch, device)
    for _ in range(2):
        step()
    seconds = [timed(step) for _ in range(1 if options.small else 5)]
    report.timings(f"pre-training of BLIP-base, batch {size}", {"openblip": seconds})
    operations = contrastive_step_flops(config, size, training_step.LONGEST, training_step.QUEUE_SIZE)
    ceilings = [matmul_ceiling(torch.bfloat16, device)]
    training_step.add_share(report, f"pre-training step, batch {size}", operations, seconds, ceilings, 0.45)
    if device == "cuda":
        report.add("peak memory", torch.cuda.max_memory_allocated() / 1e9, unit="GB")
    report.save()
    with profile() as profiler:
        timed(step)
    sort_by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=22, max_name_column_width=70))


# --- Commands over shards, and BLIP-2


def run_commands(options: argparse.Namespace) -> None:
    from benchmarks import command_line

    images, batch_size = (4, 1) if options.small else (1024, 64)
    given = ["--device", options.device, "--results", str(options.results), "--repeats", "1" if options.small else "3"]
    given = ["capfilt", "640x480", "--images", str(images), "--batch-size", str(batch_size), *given]
    with patch("sys.argv", ["command_line", *given]):
        command_line.main()


def write_blip2(options: argparse.Namespace) -> None:
    from benchmarks import blip2_decoding

    blip2_decoding.run(sized(options, language="opt", strategy="greedy", repeats=1 if options.small else 3))


PARTS: dict[str, tuple[float, Callable[[argparse.Namespace], None]]] = {
    # Seconds that it may take, and what it is.
    "greedy": (60, lambda options: caption(options, "greedy", 5)),
    "encoder": (40, explain_encoder),
    "nucleus": (40, lambda options: caption(options, "nucleus", 3, captions=40, alone=True)),
    "gaps": (40, find_gaps),
    "training": (70, lambda options: train(options, "speed", 96, 3)),
    "training-large": (60, train_large),
    "commands": (80, run_commands),
    "stage1": (50, lambda options: train(options, "stage1", 128, 4)),
    "beam": (40, lambda options: caption(options, "beam", 3)),
    "matching": (30, match),
    "encoding": (30, encode),
    "blip2": (60, write_blip2),
    "compiled": (60, compile_encoder),
}


def print_table(results: Path) -> None:
    """All figures and timings of the files in a folder."""
    for path in sorted(Path(results).glob("*.json")):
        content = json.loads(path.read_text())
        run = content["runs"][-1]
        load = run["machine"]["load"][0]
        print(f"\n{content['name']} at {run['commit']}, {machine_text(run['machine'])}, load {load}")
        for fields in run["figures"]:
            figure = Figure(**fields)
            print(f"  {figure.name}: {figure_text(figure)} {figure.note}")
        for title, sides in run["seconds"].items():
            print(f"  {title}: " + "; ".join(f"{n} {1e3 * sorted(v)[len(v) // 2]:.4g} ms" for n, v in sides.items()))
        if run["facts"]:
            print(f"  {run['facts']}")


if __name__ == "__main__":
    main()
