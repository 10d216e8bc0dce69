"""A server on one core writes captions nearly as fast as the model offline, and stays well under twice that load.

Peers: the model called offline with lists of JPEG files, in batches as large as the server's; and a plain FastAPI
handler in one process of uvicorn, which calls the model for each request.
Claims: under load at least 0.8 of the offline rate, and 2 x the plain handler's. An image that was seen before is at
least 5 x cheaper to match and to embed, and 1.5 x to caption. At twice the rate that it sustains, for a minute, every
request is answered (200, or 429 with Retry-After), accepted ones correctly, and memory stays. Clients that go away
stop costing.

Method: BLIP-base at 384 pixels in bfloat16 with random weights, beam search over 20 tokens, photographs of 640 x 480 as
JPEG files in data URIs, over loopback. All processes of a server are on core 0, with one thread of torch each; the
client is on core 1. The peers are measured first and have ended when the server starts, since its idle processes would
slow them down. No file is sent twice where that is not said.

    python -m benchmarks.serve_load [--seconds 60] [--requests 32]
"""

import argparse
import asyncio
import base64
import io
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from benchmarks import blip_base
from benchmarks.harness import ROOT, Report, parser

SERVER_CORE, CLIENT_CORE = "0", 1
BATCH_SIZE, QUEUE = 8, 16
BEAM = {"num_beams": 3, "max_new_tokens": blip_base.NUM_TOKENS, "min_new_tokens": blip_base.NUM_TOKENS}
NUM_PHOTOGRAPHS = 16
LOGPROB_TOLERANCE = 0.02  # of bfloat16, relative


class Reply(NamedTuple):
    status: int  # 0: the connection broke
    headers: httpx2.Headers
    body: Any


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=32, help="of a round")
    options.add_argument("--seconds", type=int, default=60, help="of twice the sustainable rate")
    options.set_defaults(repeats=2)
    run(options.parse_args())


def run(options: argparse.Namespace) -> None:
    os.sched_setaffinity(0, {CLIENT_CORE})
    report = Report("serve_load", __doc__, options)
    captioner, filterer = map(str, (blip_base.captioner_folder(), blip_base.filter_folder()))
    fresh = fresh_images()
    rounds = options.repeats
    with running([sys.executable, "-m", "benchmarks.harness", __spec__.name, "serve_peers"], captioner) as (url, _):
        asked = [fresh(NUM_PHOTOGRAPHS), *(fresh(options.requests) for _ in range(rounds))]
        replies = [asyncio.run(ask_all(url, "/offline", [{"images": images}], 1))[0] for images in asked]
        expected = replies[0].body["captions"]
        offline = [options.requests / reply.body["seconds"] for reply in replies[1:]]
        caption_rate(url, fresh, 2)
        plain = [caption_rate(url, fresh, options.requests // 3)[0] for _ in range(rounds)]
    command = [sys.executable, "-m", "openblip", "serve", "--model", f"captioner={captioner}"]
    command += ["--model", f"filter={filterer}", "--dtype", "bfloat16", "--timeout", "120"]
    with running([*command, "--batch-size", str(BATCH_SIZE), "--queue", str(QUEUE)]) as (url, process):
        caption_rate(url, fresh, BATCH_SIZE)
        rates, wrong = [], 0
        for _ in range(rounds):
            rate, replies = caption_rate(url, fresh, options.requests)
            rates.append(rate)
            wrong += num_wrong(replies, expected)
        rate = statistics.median(rates)
        print(f"captions a second: offline {offline}, plain handler {plain}, server {rates}, {wrong} wrong")
        report.facts |= {"captions_per_second": {"offline": offline, "plain": plain, "server": rates}}
        for name, peer, target in (("the offline rate", offline, 0.8), ("the plain handler's rate", plain, 2)):
            shares = [ours / theirs for ours, theirs in zip(rates, peer, strict=True)]
            report.add(f"captions under load, of {name}", statistics.median(shares), min(shares), max(shares),
                       target=target)  # fmt: skip
        report.add("captions under load that are wrong", wrong, unit="captions", target=0, at_most=True)
        seen(report, url, fresh)
        overload(report, url, process, fresh, expected, rate, options.seconds)
        gone(report, url, process, fresh)
    report.save()


def seen(report: Report, url: str, fresh: Callable[[int], list[str]]) -> None:
    """A file for the second time against a file for the first time, one request after the other."""
    texts = {"texts": ["a man riding a horse on the beach"]}
    for path, rest, target in (("/match", texts, 5), ("/embed", {}, 5), ("/caption", caption_settings(), 1.5)):
        ratios = []
        for image in fresh(5):
            seconds = []
            for _ in range(2):
                began = time.perf_counter()
                (reply,) = asyncio.run(ask_all(url, path, [{"images": image, **rest}], 1))
                seconds.append(time.perf_counter() - began)
                assert reply.status == 200, reply
            ratios.append(seconds[0] / seconds[1])
        name = f"{path} of a seen image, times as fast"
        report.add(name, statistics.median(ratios[1:]), min(ratios[1:]), max(ratios[1:]), target=target)


def overload(
    report: Report, url: str, process: int, fresh: Callable[[int], list[str]], expected: list[Any], rate: float,
    seconds: int,
) -> None:  # fmt: skip
    """Twice the rate: requests are sent at their times, whatever becomes of those before."""
    images = fresh(round(2 * rate * seconds))
    before = memory(process)
    replies = asyncio.run(ask_at_rate(url, "/caption", [caption_body(image) for image in images], 2 * rate))
    after = memory(process)
    counts = Counter(reply.status for reply in replies)
    print(f"twice the rate for {seconds} s: {dict(counts)}; memory {before >> 20} MiB before, {after >> 20} MiB after")
    report.facts["overload"] = {"statuses": {str(status): count for status, count in counts.items()},
                                "memory_mib": [before >> 20, after >> 20]}  # fmt: skip
    answered = [r for r in replies if r.status == 200 or (r.status == 429 and "retry-after" in r.headers)]
    report.add("twice the rate: requests answered with 200, or 429 and Retry-After", len(answered) / len(replies),
               target=1, unit="of all")  # fmt: skip
    report.add("twice the rate: accepted requests a second, of the rate", counts[200] / seconds / rate)
    wrong = num_wrong(replies, expected)
    report.add("twice the rate: accepted captions that are wrong", wrong, unit="captions", target=0, at_most=True)
    report.add("twice the rate: memory after, of that before", after / before, target=1.1, at_most=True)


def gone(report: Report, url: str, process: int, fresh: Callable[[int], list[str]]) -> None:
    """CPU time of the server for requests whose clients leave after a second, against as many that are answered."""

    async def leave(bodies: Sequence[Any]) -> None:
        asking = asyncio.ensure_future(ask_all(url, "/caption", bodies, len(bodies)))
        await asyncio.sleep(1.0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    count, seconds = BATCH_SIZE + QUEUE, []
    for ask in (lambda bodies: asyncio.run(ask_all(url, "/caption", bodies, count)), lambda b: asyncio.run(leave(b))):
        began = cpu_seconds(process)
        ask([caption_body(image) for image in fresh(count)])
        asyncio.run(ask_all(url, "/caption", [caption_body(fresh(1)[0])], 1))  # after what is still under way
        seconds.append(cpu_seconds(process) - began)
    report.facts["gone"] = {"answered_cpu_seconds": seconds[0], "gone_cpu_seconds": seconds[1]}
    report.add(f"CPU time of {count} requests whose clients left after 1 s, of as many that stay",
               seconds[1] / seconds[0], target=0.6, at_most=True)  # fmt: skip


# Requests.


def fresh_images() -> Callable[[int], list[str]]:
    """Gives so many data URIs of files that no call has given before: 16 photographs in turn, from the first on."""
    numbers, files = itertools.count(), []
    for image in blip_base.images(NUM_PHOTOGRAPHS):
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=87)
        files.append(encoded.getvalue())

    def give(count: int) -> list[str]:
        given = [files[number % NUM_PHOTOGRAPHS] + b"#%d" % next(numbers) for number in range(count)]
        return ["data:image/jpeg;base64," + base64.b64encode(file).decode() for file in given]

    return give


def caption_settings() -> dict[str, Any]:
    return {"decoding": {"kind": "beam", **BEAM}}


def caption_body(image: str) -> dict[str, Any]:
    return {"images": image, **caption_settings()}


def caption_rate(url: str, fresh: Callable[[int], list[str]], count: int) -> tuple[float, list[Reply]]:
    """Captions a second while as many clients ask as fit in, and the replies."""
    bodies = [caption_body(image) for image in fresh(count)]
    began = time.perf_counter()
    replies = asyncio.run(ask_all(url, "/caption", bodies, BATCH_SIZE + QUEUE))
    assert all(reply.status == 200 for reply in replies), Counter(reply.status for reply in replies)
    return count / (time.perf_counter() - began), replies


def num_wrong(replies: Sequence[Reply], expected: Sequence[Any]) -> int:
    """Captions of accepted requests whose probability is another than offline by more than bfloat16 explains.

    Texts are not compared: with random weights many are about as likely, and the size of a batch decides between them.
    """
    wrong = 0
    for number, reply in enumerate(replies):
        if reply.status == 200:
            logprob = expected[number % NUM_PHOTOGRAPHS][1]
            wrong += abs(reply.body["captions"][0]["logprob"] - logprob) > LOGPROB_TOLERANCE * abs(logprob)
    return wrong


async def ask(client: httpx2.AsyncClient, path: str, body: Any) -> Reply:
    try:
        response = await client.post(path, json=body)
    except httpx2.TransportError as error:
        return Reply(0, httpx2.Headers(), repr(error))
    return Reply(response.status_code, response.headers, response.json())


def client_of(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=url, timeout=180, limits=httpx2.Limits(max_connections=None))


async def ask_all(url: str, path: str, bodies: Sequence[Any], at_once: int) -> list[Reply]:
    """A reply to each body; so many are under way at a time."""
    free = asyncio.Semaphore(at_once)

    async def one(client: httpx2.AsyncClient, body: Any) -> Reply:
        async with free:
            return await ask(client, path, body)

    async with client_of(url) as client:
        return await asyncio.gather(*(one(client, body) for body in bodies))


async def ask_at_rate(url: str, path: str, bodies: Sequence[Any], rate: float) -> list[Reply]:
    """A reply to each body; so many are sent every second."""
    start = time.perf_counter()

    async def later(client: httpx2.AsyncClient, number: int, body: Any) -> Reply:
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        return await ask(client, path, body)

    async with client_of(url) as client:
        return await asyncio.gather(*(later(client, number, body) for number, body in enumerate(bodies)))


# Servers.


@contextmanager
def running(command: Sequence[str], *arguments: str) -> Iterator[tuple[str, int]]:
    """A server on its core: its address and its process. arguments: of the peers, before the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    end = [f'["{arguments[0]}", {port}]'] if arguments else ["--port", str(port)]
    process = subprocess.Popen(
        ["taskset", "--cpu-list", SERVER_CORE, *command, *end], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
    try:
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} is not ready")
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def serve_peers(folder: str, port: int) -> None:
    """A plain handler at /caption; and at /offline the model with a list of images, timed where it is called."""
    import uvicorn
    from fastapi import FastAPI

    import openblip

    predictor, decoding, app = openblip.load(folder, dtype="bfloat16"), openblip.Beam(**BEAM), FastAPI()

    def file(uri: str) -> bytes:
        return base64.b64decode(uri.partition(",")[2])

    @app.get("/ready")
    async def ready() -> None:
        pass

    @app.post("/caption")
    async def caption(body: dict[str, Any]) -> dict[str, Any]:
        text = predictor.caption(file(body["images"]), decoding=decoding, return_scores=True)
        return {"captions": [{"text": text.text, "logprob": text.logprob}]}

    @app.post("/offline")
    async def offline(body: dict[str, Any]) -> dict[str, Any]:
        files, began = [file(uri) for uri in body["images"]], time.perf_counter()
        texts = predictor.caption(files, decoding=decoding, return_scores=True, batch_size=BATCH_SIZE)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "captions": [(text.text, text.logprob) for text in texts]}

    uvicorn.run(app, port=port, log_level="warning")


def descendants(process: int) -> Iterator[int]:
    """A process, its children and theirs."""
    yield process
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from descendants(int(child))


def memory(process: int) -> int:
    """Bytes of a server's processes; a page that several share counts once."""
    total = 0
    for each in descendants(process):
        lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def cpu_seconds(process: int) -> float:
    """CPU time of a server's processes."""
    fields = (Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in descendants(process))
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
