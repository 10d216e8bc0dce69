"""A server on one core writes captions nearly as fast as the model offline, and stays well under twice that load.

Peers: the model called offline with lists of JPEG files, in batches as large as the server's; and a plain FastAPI
handler in one process of uvicorn, which calls the model for each request: a `def`, which FastAPI runs in a thread, an
`async def`, which answers one request after the other, and a `def` with transformers' model.
Claims: under load at least 0.8 of the offline rate, and 2 x the plain handler's. An image that was seen before is at
least 5 x cheaper to match and to embed, and 1.5 x to caption. At twice the rate that it sustains, for a minute, every
request is answered (200, or 429 with Retry-After), accepted ones correctly, and memory stays. Clients that go away
stop costing.

Method: BLIP-base at 384 pixels in bfloat16 with random weights, beam search over 20 tokens, photographs of 640 x 480 as
JPEG files in data URIs, over loopback. All processes of a server are on core 0, with one thread of torch each; the
client is on core 1. The peers are measured before and after the server and do not run beside it, since its idle
processes would slow them down. No file is sent twice where that is not said. Memory is that of all processes of the
server, every second of the minute from the tenth on, when the queue and the cache of encoded images (64 MB) have been
full for long; its growth is the slope of a line through all of these. With random weights many texts are about as
likely, so the size of a batch decides between them in bfloat16: there the probabilities are compared with those
offline. The texts themselves are compared at twice the rate of the shipped captioner in float32, over emoji scenes.

    python -m benchmarks.serve_load [--seconds 60] [--requests 64]
"""

import argparse
import asyncio
import base64
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks import blip_base
from benchmarks.harness import Report, parser
from benchmarks.served import Reply, Server, ask_all, ask_at_rate, fresh_images, jpeg_files, leave_after

SERVER_CORE, CLIENT_CORE = 0, 1
BATCH_SIZE, QUEUE, CACHE = 8, 16, 64
LIMITS = ("--batch-size", str(BATCH_SIZE), "--queue", str(QUEUE), "--cache", str(CACHE), "--timeout", "120")
BEAM = {"num_beams": 3, "max_new_tokens": blip_base.NUM_TOKENS, "min_new_tokens": blip_base.NUM_TOKENS}
NUM_PHOTOGRAPHS, NUM_SCENES = 16, 64
LOGPROB_TOLERANCE = 0.02  # of bfloat16, relative
WARM_UP = 10.0  # seconds of the minute, before memory is counted
PLAIN = {"def": "/caption", "async def": "/caption_one_by_one", "def with transformers": "/caption_transformers"}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=64, help="of a round")
    options.add_argument("--seconds", type=int, default=60, help="of twice the sustainable rate")
    options.set_defaults(repeats=2)
    run(options.parse_args())


def run(options: argparse.Namespace) -> None:
    os.sched_setaffinity(0, {CLIENT_CORE})
    report = Report("serve_load", __doc__, options)
    captioner, filterer = map(str, (blip_base.captioner_folder(), blip_base.filter_folder()))
    fresh = fresh_images(jpeg_files(blip_base.images(NUM_PHOTOGRAPHS)))
    peers = Server(
        command=[sys.executable, "-m", "benchmarks.serve_load", "peers", captioner, "PORT"], core=SERVER_CORE
    )
    offline: list[float] = []
    plain: dict[str, list[float]] = {name: [] for name in PLAIN}

    def measure_peers() -> list[Any]:
        with peers:
            expected, _ = offline_captions(peers.url, fresh(NUM_PHOTOGRAPHS))
            with cpu_per_caption(report, "offline", peers, options.requests):
                offline.append(options.requests / offline_captions(peers.url, fresh(options.requests))[1])
            for name, path in PLAIN.items():
                caption_rate(peers.url, fresh, 2, path)
                plain[name].append(caption_rate(peers.url, fresh, options.requests // 3, path)[0])
        return expected

    expected = measure_peers()
    models = ["--model", f"captioner={captioner}", "--model", f"filter={filterer}", "--dtype", "bfloat16"]
    with Server(*models, *LIMITS, core=SERVER_CORE) as server:
        caption_rate(server.url, fresh, BATCH_SIZE)
        rates, wrong = [], 0
        with cpu_per_caption(report, "server", server, options.repeats * options.requests):
            for _ in range(options.repeats):
                rate, replies = caption_rate(server.url, fresh, options.requests)
                rates.append(rate)
                wrong += num_wrong(replies, expected)
        rate = statistics.median(rates)
        seen(report, server, fresh)
        overload(report, server, fresh, expected, rate, options.seconds)
        gone(report, server, fresh)
    measure_peers()
    report.facts["captions a second"] = {"offline": offline, **plain, "server": rates}
    print(report.facts)
    shares(report, "the offline rate", rates, offline, 0.8)
    for name, each in plain.items():
        shares(report, f"the rate of a plain handler ({name})", rates, each, 2 if name == "def" else None)
    report.add("captions under load that are wrong", wrong, unit="captions", target=0, at_most=True)
    exact_texts(report, options.seconds // 3)
    report.save()


def shares(report: Report, name: str, rates: Sequence[float], peer: Sequence[float], target: float | None) -> None:
    """The server's rate as a share of a peer's before and after it."""
    rate = statistics.median(rates)
    ratios = [rate / each for each in peer]
    report.add(f"captions under load, of {name}", statistics.median(ratios), min(ratios), max(ratios), target=target)


def seen(report: Report, server: Server, fresh: Callable[[int], list[str]]) -> None:
    """A file for the second time against a file for the first time, one request after the other."""
    texts = {"texts": ["a man riding a horse on the beach"]}
    for path, rest, target in (("/match", texts, 5), ("/embed", {}, 5), ("/caption", caption_settings(), 1.5)):
        ratios = []
        for image in fresh(9):
            first, second = asyncio.run(ask_all(server.url, path, [{"images": image, **rest}] * 2, 1))
            assert first.status == second.status == 200, (first, second)
            ratios.append(first.seconds / second.seconds)
        name = f"{path} of a seen image, times as fast"
        report.add(name, statistics.median(ratios[1:]), min(ratios[1:]), max(ratios[1:]), target=target)


def overload(
    report: Report, server: Server, fresh: Callable[[int], list[str]], expected: list[Any], rate: float, seconds: int
) -> None:
    """Twice the rate: requests are sent at their times, whatever becomes of those before."""
    images = fresh(round(2 * rate * seconds))
    with memory_samples(server) as samples:
        replies = asyncio.run(ask_at_rate(server.url, "/caption", [caption_body(image) for image in images], 2 * rate))
    note_answers(report, "twice the rate", replies, seconds, rate)
    wrong = num_wrong(replies, expected)
    report.add("twice the rate: accepted captions that are wrong", wrong, unit="captions", target=0, at_most=True)
    began = samples[0][0]
    counted = [(moment, sizes) for moment, sizes in samples if began + WARM_UP <= moment <= began + seconds]
    moments = [moment - began for moment, _ in counted]
    totals = [sum(sizes.values()) / 2**20 for _, sizes in counted]
    slope = float(np.polyfit(moments, totals, 1)[0])
    ends = counted[0][1], counted[-1][1]
    report.facts["memory"] = {
        "mib": [round(total) for total in totals],
        "mib_by_process": {
            name: [round(sizes.get(name, 0) / 2**20, 1) for sizes in ends]
            for name in ends[1]
            if max(sizes.get(name, 0) for sizes in ends) > 2**20
        },
    }
    middle = len(totals) // 2
    halves = statistics.median(totals[:middle]), statistics.median(totals[middle:])
    report.add("twice the rate: memory, last half of first", halves[1] / halves[0], target=1.02, at_most=True)
    report.add("twice the rate: growth of memory", 60 * slope, unit="MiB a minute")


def note_answers(report: Report, title: str, replies: Sequence[Reply], seconds: int, rate: float) -> None:
    statuses = Counter(reply.status for reply in replies)
    report.facts[title] = {str(status): count for status, count in statuses.items()}
    print(title, report.facts[title])
    told = sum(reply.status == 429 and "retry-after" in reply.headers for reply in replies)
    report.add(f"{title}: requests answered with 200, or 429 and Retry-After", (statuses[200] + told) / len(replies),
               target=1, unit="of all")  # fmt: skip
    report.add(f"{title}: accepted requests a second, of the rate", statuses[200] / seconds / rate)


def exact_texts(report: Report, seconds: int) -> None:
    """The shipped captioner in float32 at twice its rate: every accepted text is the one that it writes offline."""
    import openblip
    from openblip.emoji_scenes.writer import SceneRequest, sample_members

    asked = SceneRequest(split="test", num_samples=NUM_SCENES, seed=0, noise=0.0, samples_per_shard=NUM_SCENES)
    files = [sample_members(asked, number)[0][1] for number in range(NUM_SCENES)]
    expected = openblip.load("openblip-mini-captioner", dtype="float32").caption(files)
    fresh = fresh_images(files)
    with Server("--model", "openblip-mini-captioner", "--dtype", "float32", *LIMITS, core=SERVER_CORE) as server:
        for count in (NUM_SCENES, 4 * NUM_SCENES):
            bodies = [{"images": image} for image in fresh(count)]
            began = time.perf_counter()
            asyncio.run(ask_all(server.url, "/caption", bodies, BATCH_SIZE + QUEUE))
            rate = count / (time.perf_counter() - began)
        bodies = [{"images": image} for image in fresh(round(2 * rate * seconds))]
        replies = asyncio.run(ask_at_rate(server.url, "/caption", bodies, 2 * rate))
    title = "shipped captioner, twice the rate"
    note_answers(report, title, replies, seconds, rate)
    different = sum(
        reply.body["captions"][0]["text"] != expected[number % NUM_SCENES]
        for number, reply in enumerate(replies)
        if reply.status == 200
    )
    report.add(f"{title}: texts that differ from those offline", different, unit="texts", target=0, at_most=True)


def gone(report: Report, server: Server, fresh: Callable[[int], list[str]]) -> None:
    """CPU time of the server for requests whose clients leave after a second, against as many that are answered."""
    count, seconds = BATCH_SIZE + QUEUE, []
    for leaves in (False, True):
        began = sum(server.cpu_seconds().values())
        bodies = [caption_body(image) for image in fresh(count)]
        asking = leave_after(1.0, server.url, "/caption", bodies) if leaves else ask_all(
            server.url, "/caption", bodies, count
        )  # fmt: skip
        asyncio.run(asking)  # type: ignore[arg-type]
        asyncio.run(ask_all(server.url, "/caption", [caption_body(fresh(1)[0])], 1))  # after what is still under way
        seconds.append(sum(server.cpu_seconds().values()) - began)
    report.facts["gone"] = {"answered_cpu_seconds": seconds[0], "gone_cpu_seconds": seconds[1]}
    report.add(f"CPU time of {count} requests whose clients left after 1 s, of as many that stay",
               seconds[1] / seconds[0], target=0.6, at_most=True)  # fmt: skip


@contextmanager
def cpu_per_caption(report: Report, name: str, server: Server, count: int) -> Iterator[None]:
    """Keep the CPU time of each process for one of so many captions, which says where a missing rate has gone."""
    before = server.cpu_seconds()
    yield
    spent = {title: (seconds - before.get(title, 0.0)) / count for title, seconds in server.cpu_seconds().items()}
    report.facts[f"CPU seconds a caption, {name}"] = {
        title: round(seconds, 4) for title, seconds in sorted(spent.items(), key=lambda each: -each[1])
    }


@contextmanager
def memory_samples(server: Server) -> Iterator[list[tuple[float, dict[str, int]]]]:
    """Moments and the memory of the server's processes, every second until the end of the block."""
    samples, ended = [(time.perf_counter(), server.memory())], threading.Event()

    def sample() -> None:
        while not ended.wait(1.0):
            samples.append((time.perf_counter(), server.memory()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


# Requests.


def caption_settings() -> dict[str, Any]:
    return {"decoding": {"kind": "beam", **BEAM}}


def caption_body(image: str) -> dict[str, Any]:
    return {"images": image, **caption_settings()}


def caption_rate(
    url: str, fresh: Callable[[int], list[str]], count: int, path: str = "/caption"
) -> tuple[float, list[Reply]]:
    """Captions a second while as many clients ask as fit in, and the replies."""
    bodies = [caption_body(image) for image in fresh(count)]
    began = time.perf_counter()
    replies = asyncio.run(ask_all(url, path, bodies, BATCH_SIZE + QUEUE))
    assert all(reply.status == 200 for reply in replies), Counter(reply.status for reply in replies)
    return count / (time.perf_counter() - began), replies


def offline_captions(url: str, images: Sequence[str]) -> tuple[list[Any], float]:
    """Texts with their probabilities, and the seconds that the call took where the model is."""
    (reply,) = asyncio.run(ask_all(url, "/offline", [{"images": images}], 1))
    return reply.body["captions"], reply.body["seconds"]


def num_wrong(replies: Sequence[Reply], expected: Sequence[Any]) -> int:
    """Captions of accepted requests whose probability is another than offline by more than bfloat16 explains."""
    wrong = 0
    for number, reply in enumerate(replies):
        if reply.status == 200:
            logprob = expected[number % NUM_PHOTOGRAPHS][1]
            wrong += abs(reply.body["captions"][0]["logprob"] - logprob) > LOGPROB_TOLERANCE * abs(logprob)
    return wrong


# Peers.


def serve_peers(folder: str, port: int) -> None:
    """Plain handlers; and at /offline the model with a list of images, timed where it is called."""
    import io

    import torch
    import uvicorn
    from fastapi import FastAPI
    from PIL import Image
    from transformers import AutoTokenizer, BlipImageProcessor

    import openblip

    predictor, decoding, app = openblip.load(folder, dtype="bfloat16"), openblip.Beam(**BEAM), FastAPI()
    theirs, processor = blip_base.transformers_captioner(torch.bfloat16), BlipImageProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def file(uri: str) -> bytes:
        return base64.b64decode(uri.partition(",")[2])

    def captioned(body: dict[str, Any]) -> dict[str, Any]:
        text = predictor.caption(file(body["images"]), decoding=decoding, return_scores=True)
        return {"captions": [{"text": text.text, "logprob": text.logprob}]}

    @app.get("/ready")
    async def ready() -> None:
        pass

    @app.post("/caption")
    def caption(body: dict[str, Any]) -> dict[str, Any]:
        return captioned(body)

    @app.post("/caption_one_by_one")
    async def caption_one_by_one(body: dict[str, Any]) -> dict[str, Any]:
        return captioned(body)

    @app.post("/caption_transformers")
    def caption_transformers(body: dict[str, Any]) -> dict[str, Any]:
        image = Image.open(io.BytesIO(file(body["images"]))).convert("RGB")
        pixels = processor(images=image, return_tensors="pt").pixel_values.to(torch.bfloat16)
        with torch.inference_mode():
            ids = theirs.generate(pixel_values=pixels, do_sample=False, **BEAM)
        return {"captions": [{"text": tokenizer.decode(ids[0], skip_special_tokens=True)}]}

    @app.post("/offline")
    async def offline(body: dict[str, Any]) -> dict[str, Any]:
        files, began = [file(uri) for uri in body["images"]], time.perf_counter()
        texts = predictor.caption(files, decoding=decoding, return_scores=True, batch_size=BATCH_SIZE)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "captions": [(text.text, text.logprob) for text in texts]}

    uvicorn.run(app, port=port, log_level="warning")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peers"]:
        serve_peers(sys.argv[2], int(sys.argv[3]))
    else:
        main()
