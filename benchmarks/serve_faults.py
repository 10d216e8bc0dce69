"""What breaks around a server breaks nothing else: no accepted request is lost, and each other one is told so at once.

Claims. Of more requests than a server's queue has room for, all are answered: with captions, or 429 and Retry-After.
When the worker of a model is killed under load, requests get 503 at once, and the worker is started again. SIGTERM under
load loses no request that was accepted. Behind a balancer, of two servers one can be drained without any request
noticing, and one can be killed, which costs at most the requests that it had. A client that goes away costs at most the
batch that its request is in. No request is answered 5xx, whatever it holds (`benchmarks.serve_fuzz`).

Method: the shipped model openblip-mini in float32, over loopback. The captions of every reply are compared with those
that were written before anything broke. The balancer passes on connections in turn, and leaves out a server for as long
as `/ready`, which it asks five times a second, is not 200; it tries none again.

    python -m benchmarks.serve_faults [--examples 20] [--hostile 300] [--seed 0]
"""

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import httpx2

from benchmarks import blip_base
from benchmarks.harness import Report, parser
from benchmarks.serve_fuzz import fuzz_server
from benchmarks.served import Reply, Server, ask, ask_all, client_of, fresh_images, jpeg_files, leave_after

MODEL, BATCH_SIZE, QUEUE, NUM_IMAGES, CLIENTS = "openblip-mini", 4, 8, 16, 8
SLOW = {"decoding": {"kind": "beam", "num_beams": 8, "max_new_tokens": 60, "min_new_tokens": 60}}
AT_ONCE = 1.0  # seconds


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--examples", type=int, default=20, help="requests of schemathesis, of each operation")
    options.add_argument("--hostile", type=int, default=300, help="requests that are made to hurt")
    options.add_argument("--seed", type=int, default=0)
    run(options.parse_args())


def run(options: argparse.Namespace) -> None:
    report = Report("serve_faults", __doc__, options)
    limits = ["--batch-size", str(BATCH_SIZE), "--queue", str(QUEUE), "--max-pixels", "1000000", "--dtype", "float32"]
    first, second = (Server("--model", MODEL, *limits) for _ in range(2))
    fresh = fresh_images(jpeg_files(blip_base.images(NUM_IMAGES, (64, 48))))
    with contextlib.ExitStack() as running:
        for server in (first, second):
            server.start()
            running.callback(server.stop)
        for server in (first, second):
            server.until_ready()
        replies = asyncio.run(ask_all(first.url, "/caption", [body(image) for image in fresh(NUM_IMAGES)], 1))
        expected = [reply.body["captions"][0]["text"] for reply in replies]
        faults = Faults(report, fresh, expected)
        faults.fill_queue(first)
        faults.leave(first)
        faults.kill_worker(first)
        faults.fuzz(first, options)
        faults.drain_one(first, second)
        first.start()
        first.until_ready()
        faults.kill_one(first, second)
        faults.terminate(second)
    report.save()


def body(image: str) -> dict[str, Any]:
    return {"images": image, **SLOW}


class Load:
    """Clients that ask for captions one after the other, until they are told to stop."""

    def __init__(self, url: str, fresh: Callable[[int], list[str]]) -> None:
        self.url, self.fresh, self.goes_on = url, fresh, True
        self.numbers: list[int] = []  # of the photographs, for each reply
        self.replies: list[Reply] = []
        self.sent = 0

    async def __aenter__(self) -> "Load":
        self.client = client_of(self.url)
        self.asking = [asyncio.ensure_future(self._ask()) for _ in range(CLIENTS)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self.goes_on = False
        await asyncio.gather(*self.asking)
        await self.client.aclose()

    async def _ask(self) -> None:
        while self.goes_on:
            number, (image,) = self.sent, self.fresh(1)
            self.sent += 1
            reply = await ask(self.client, "/caption", body(image))
            self.numbers.append(number)
            self.replies.append(reply)
            if reply.status != 200:
                await asyncio.sleep(0.1)
