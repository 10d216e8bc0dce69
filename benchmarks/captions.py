"""BLIP-base writes captions several times as fast as transformers, with the same weights on the same processor.

Peer: transformers' BlipForConditionalGeneration.generate, in the same precision; int8 is compared with transformers'
bfloat16. It has one attention, written out, so there is no other to choose; its static cache fails for BLIP (see
`--static-cache`), and torch.compile (`--compiled`, needs a C++ compiler) takes minutes at the first call.
Method: 8 prepared images at 384 pixels, exactly 20 new tokens on both sides (min = max), random weights. A call goes
from pixels to tokens, encoding included. The sides take turns. The greedy tokens of both sides are compared, too.
"The floor" is what the call would take if all of its matrix products ran at the speed of a large one, and every step
read the decoder's weights and the images' keys and values at the speed of a memory copy: no program is faster.

    python -m benchmarks.captions greedy [--dtypes bfloat16 int8]
    python -m benchmarks.captions beam
    python -m benchmarks.captions nucleus

`benchmarks/gpu.sh` runs it on a GPU, with 64 images, whose rates are targets too: `--images`, `--captions`, `--alone`.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import openblip
from benchmarks import blip_base
from benchmarks.harness import Report, alternate, copy_ceiling, matmul_ceiling, parser, timed
from openblip.models.flops import context_kv_flops, num_image_tokens, text_flops, vision_flops

NUM_IMAGES, NUM_TOKENS = 8, 20
LENGTH = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
OURS: dict[str, dict[str, Any]] = {
    "greedy": {"decoding": openblip.Greedy(**LENGTH)},
    "beam": {"decoding": openblip.Beam(num_beams=3, **LENGTH)},
    "nucleus": {"decoding": openblip.Nucleus(top_p=0.9, seed=0, **LENGTH), "num_captions": 5},
}
THEIRS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "nucleus": {"num_beams": 1, "do_sample": True, "top_p": 0.9, "top_k": 0, "num_return_sequences": 5},
}
NUM_ROWS = {"greedy": 1, "beam": 3, "nucleus": 5}  # of an image
NAMES = {"greedy": "greedy", "beam": "beam 3", "nucleus": "five nucleus captions an image"}
TARGETS = {
    ("greedy", "bfloat16"): 2.2,
    ("greedy", "int8"): 2.7,
    ("beam", "bfloat16"): 3.0,
    ("beam", "int8"): 4.0,
    ("nucleus", "bfloat16"): 4.0,
    ("nucleus", "int8"): 5.0,
}
GPU_TARGETS = {"greedy": 3.0}
GPU_RATES = {"greedy": 1500, "nucleus": 150}  # images a second, the latter with 40 captions each
PEER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("strategy", choices=list(NAMES))
    options.add_argument("--dtypes", nargs="+", choices=list(PEER_DTYPES), default=["bfloat16", "int8"])
    options.add_argument("--compiled", action="store_true", help="a further side: transformers with torch.compile")
    options.add_argument("--images", type=int, default=NUM_IMAGES)
    options.add_argument("--captions", type=int, help="of an image; five with nucleus, else one")
    options.add_argument("--alone", action="store_true", help="without transformers")
    options.add_argument("--static-cache", action="store_true", help="a further side: transformers' static cache")
    run(options.parse_args())


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    strategy, name = options.strategy, NAMES[options.strategy]
    report = Report(f"captions-{strategy}", __doc__, options)
    sides: dict[str, Callable[[], Any]] = {}
    settings = {} if options.captions is None else {"num_captions": options.captions}
    returned = {} if options.captions is None else {"num_return_sequences": options.captions}
    if options.captions is not None:
        name = f"{options.captions} {strategy} captions an image"
    on_gpu = options.device.startswith("cuda")
    models: dict[str, Any] = {}
    for dtype in options.dtypes:
        ours = models[dtype] = openblip.load(blip_base.captioner_folder(), device=options.device, dtype=dtype)
        prepared, normalised = repeated(blip_base.pixels(ours, min(NUM_IMAGES, options.images)), options.images)
        if on_gpu:
            prepared = prepared.pin_memory()  # as the model's own calls leave what they read from files
        peer_dtype = PEER_DTYPES[dtype]
        peer = peer_of(dtype)
        if peer not in sides and not options.alone:
            theirs = blip_base.transformers_captioner(peer_dtype).to(options.device)
            inputs = normalised.to(options.device, peer_dtype)
            sides[peer] = their_call(theirs, inputs, strategy, **returned)
        sides[f"openblip {dtype}"] = our_call(ours, prepared, strategy, **settings)
    if options.static_cache:
        sides["transformers static cache"] = their_call(theirs, inputs, strategy, cache_implementation="static")
    if options.compiled:
        sides["transformers compiled"] = compiled(their_call(compiled_model(theirs), inputs, strategy), report)
    report.facts["first call, s"] = {side: timed(call) for side, call in sides.items()}
    if strategy == "greedy" and not options.alone:
        report.facts["tokens equal to the peer's"] = {
            f"openblip {dtype}": equal_tokens(sides[f"openblip {dtype}"](), sides[peer_of(dtype)]())
            for dtype in options.dtypes
        }
    seconds = alternate(sides, options.repeats, warm_up=2 if on_gpu else 0)  # a GPU records in the second call
    report.timings(f"{name}: {options.images} images, {NUM_TOKENS} tokens", seconds)
    if on_gpu:
        for side, values in seconds.items():
            rates = sorted(options.images / own for own in values)
            target = GPU_RATES.get(strategy) if side.startswith("openblip") else None
            bounds = {"low": rates[0], "high": rates[-1], "unit": "images/s"}
            report.add(f"{name}, {side}", rates[len(rates) // 2], **bounds, target=target)
    else:
        profiles = {f"openblip {dtype}": profile(model, prepared, strategy) for dtype, model in models.items()}
        report.facts["profile"] = profiles
    for dtype in [] if options.alone else options.dtypes:
        peer, own = peer_of(dtype), f"openblip {dtype}"
        target = GPU_TARGETS.get(strategy) if on_gpu else TARGETS.get((strategy, dtype))
        report.ratio(f"{name}, {dtype} beside {peer}", seconds[peer], seconds[own], target=target)
    if {"bfloat16", "int8"} <= set(options.dtypes):
        target = 1.3 if strategy == "greedy" and options.device == "cpu" else None
        own = seconds["openblip bfloat16"]
        report.ratio(f"{name}, int8 beside our bfloat16", own, seconds["openblip int8"], target=target)
    for side in ("transformers compiled", "transformers static cache"):
        if side in seconds:
            report.ratio(f"{name}, {side} beside {peer}", seconds[peer], seconds[side])
    if "bfloat16" in options.dtypes:
        captions = settings.get("num_captions") or NUM_ROWS[strategy]
        floor = floor_seconds(ours.model.config, options.images, captions, options.device)
        shares = [floor / own for own in seconds["openblip bfloat16"]]
        report.add(f"{name}, bfloat16: share of the floor", sorted(shares)[len(shares) // 2], min(shares), max(shares))
        if not options.alone:
            peers = [theirs / floor for theirs in seconds[peer_of("bfloat16")]]
            report.add(f"{name}, bfloat16: the floor beside {peer_of('bfloat16')}", sorted(peers)[len(peers) // 2])
    report.save()


def peer_of(dtype: str) -> str:
    return f"transformers {str(PEER_DTYPES[dtype]).removeprefix('torch.')}"


def repeated(tensors: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """The first `count` rows of tensors, which begin anew at their end."""
    return tuple(x[torch.arange(count) % len(x)] for x in tensors)


def our_call(model: Any, prepared: Tensor, strategy: str, **settings: Any) -> Callable[[], Any]:
    settings = {"batch_size": len(prepared), **OURS[strategy], **settings}
    return lambda: model.caption(prepared, prompt="", return_scores=True, **settings)


def their_call(model: Any, pixels: Tensor, strategy: str, **settings: Any) -> Callable[[], Any]:
    settings = {**LENGTH, **THEIRS[strategy], **settings}
    return lambda: model.generate(pixels, **settings)


def compiled_model(model: Any) -> Any:
    """Its image encoder and its decoder's layers, which leaves out only what changes from step to step."""
    torch._dynamo.config.cache_size_limit = 64
    model.vision_model.forward = torch.compile(model.vision_model.forward)
    encoder = model.text_decoder.bert.encoder
    encoder.forward = torch.compile(encoder.forward, dynamic=True)
    return model


def compiled(call: Callable[[], Any], report: Report) -> Callable[[], Any]:
    report.facts["compilation, s"] = timed(call)
    return call


def profile(model: Any, prepared: Tensor, strategy: str) -> dict[str, Any]:
    """The seconds of the parts of a call, and the operators that take the most, as shares of all."""
    encoded = model.encode(prepared, batch_size=len(prepared))
    parts = {
        "encoding, s": lambda: model.encode(prepared, batch_size=len(prepared)),
        "keys and values, s": lambda: model.model.image_kv(encoded.tokens, "decode"),
        "keys and values, and decoding, s": our_call(model, encoded, strategy),
    }
    seconds = {name: min(timed(call) for _ in range(3)) for name, call in parts.items()}
    with torch.profiler.profile() as profiler:
        our_call(model, prepared, strategy)()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    whole = sum(times.values())
    longest = sorted(times, key=times.__getitem__, reverse=True)[:8]
    return {**seconds, "operators": {name: round(times[name] / whole, 3) for name in longest}}


def equal_tokens(ours: Any, theirs: Tensor) -> float:
    """The share of the generated tokens that both sides have in the same place."""
    written = [list(caption.ids)[:NUM_TOKENS] for caption in ours]
    expected = theirs[:, 1 : NUM_TOKENS + 1].tolist()
    assert all(len(row) == NUM_TOKENS for row in [*written, *expected])
    same = [a == b for own, other in zip(written, expected, strict=True) for a, b in zip(own, other, strict=True)]
    return sum(same) / len(same)


def floor_seconds(config: Any, images: int, captions: int, device: str) -> float:
    """What the whole call takes at the measured ceilings, in bfloat16."""
    tokens = num_image_tokens(config.vision)
    rows = images * captions
    width, layers = config.text.hidden_dim, config.text.num_layers
    encoding = vision_flops(config.vision) + context_kv_flops(config.text, tokens, config.vision.hidden_dim)
    decoding = sum(text_flops(config.text, 1, context_tokens=tokens, past=step) for step in range(NUM_TOKENS))
    vocabulary = NUM_TOKENS * 2 * width * (width + config.text.vocab_size)
    products = images * encoding + rows * (decoding + vocabulary)
    # Bytes that every step reads: 4 + 2 + 8 square matrices a layer, the vocabulary, and the keys and values.
    weights = layers * (6 * width**2 + 2 * width * config.text.mlp_dim) + width * (width + config.text.vocab_size)
    keys = images * layers * 2 * tokens * width
    # A copy writes as much as it reads; reading alone could be up to twice as fast.
    read = 2 * copy_ceiling(device)
    return products / matmul_ceiling(torch.bfloat16, device) + NUM_TOKENS * 2 * (weights + keys) / read


if __name__ == "__main__":
    main()
