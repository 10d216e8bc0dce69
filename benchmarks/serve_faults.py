"""What breaks around a server breaks nothing else: no accepted request is lost, and each other one is told so at once.

Claims. Of more requests than a server's queue has room for, all are answered: with captions, or 429 and Retry-After.
When the worker of a model is killed under load, requests get 503 at once, and the worker is started again. SIGTERM
under load loses no request that was accepted. Behind a balancer, of two servers one can be drained without any request
noticing, and one can be killed, which costs at most the requests that it had. Clients that go away cost no more than
the batches that the worker has. No request is answered 5xx, whatever it holds (`benchmarks.serve_fuzz`).

Method: the shipped model openblip-mini in float32, over loopback. The captions of every reply are compared with those
that were written before anything broke. The balancer passes on connections in turn, and leaves out a server while its
`/ready`, which is asked five times a second, is not 200; no request is tried again.

    python -m benchmarks.serve_faults [--examples 20] [--hostile 300] [--seed 0]
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx2

from benchmarks import blip_base, served
from benchmarks.harness import Report, parser
from benchmarks.serve_fuzz import fuzz_server
from benchmarks.served import Reply, Server, ask, ask_all

MODEL, BATCH_SIZE, QUEUE, NUM_IMAGES, CLIENTS = "openblip-mini", 4, 8, 16, 8
MOST_REQUESTS = 3000  # of a load
SLOW = {"decoding": {"kind": "beam", "num_beams": 8, "max_new_tokens": 40, "min_new_tokens": 40}}
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
    fresh = served.fresh_images(served.jpeg_files(blip_base.images(NUM_IMAGES, (64, 48))))
    with contextlib.ExitStack() as running:
        for server in (first, second):
            running.enter_context(server)
        replies = asyncio.run(ask_all(first.url, "/caption", [body(image) for image in fresh(NUM_IMAGES)], 1))
        assert all(reply.status == 200 for reply in replies), replies
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
    """Clients that ask for captions one after the other, from `async with` to the end of its block."""

    def __init__(self, url: str, images: Sequence[str]) -> None:
        self.url, self.images, self.goes_on = url, enumerate(images), True
        self.replies: list[tuple[int, Reply]] = []  # with the number of the image

    async def __aenter__(self) -> Self:
        self.client = served.client_of(self.url)
        self.asking = [asyncio.ensure_future(self._ask()) for _ in range(CLIENTS)]
        await self.answered(2 * CLIENTS)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.goes_on = False
        await asyncio.gather(*self.asking)
        await self.client.aclose()

    async def _ask(self) -> None:
        while self.goes_on:
            number, image = next(self.images)
            reply = await ask(self.client, "/caption", body(image))
            self.replies.append((number, reply))
            if reply.status != 200:
                await asyncio.sleep(0.1)

    async def answered(self, count: int) -> None:
        """Wait for so many more captions, a minute at most."""
        began, before = time.perf_counter(), self.num_captions
        while self.num_captions < before + count and time.perf_counter() < began + 60:
            await asyncio.sleep(0.02)

    @property
    def num_captions(self) -> int:
        return sum(reply.status == 200 for _, reply in self.replies)

    def since(self, moment: float) -> list[Reply]:
        """Replies to what was sent from a moment on."""
        return [reply for _, reply in self.replies if reply.sent >= moment]

    def on_their_way(self, moment: float) -> list[Reply]:
        """Replies to what had been sent at a moment, and not answered yet."""
        return [reply for _, reply in self.replies if reply.sent < moment < reply.ended]


@dataclass
class Faults:
    """What is done to servers, each of which writes the figures of it."""

    report: Report
    fresh: Callable[[int], list[str]]
    expected: list[str]  # captions of the photographs

    def note(self, title: str, replies: Iterable[tuple[int, Reply]]) -> Counter[int]:
        """Keep how many replies of each status there were. Captions must be those of the photographs."""
        replies = list(replies)
        statuses = Counter(reply.status for _, reply in replies)
        self.report.facts[title] = {str(status): count for status, count in sorted(statuses.items())}
        print(f"{title}: {self.report.facts[title]}", flush=True)
        wrong = sum(
            reply.body["captions"][0]["text"] != self.expected[number % NUM_IMAGES]
            for number, reply in replies
            if reply.status == 200
        )
        self.report.add(f"{title}: wrong captions", wrong, unit="captions", target=0, at_most=True)
        return statuses

    def load(self, url: str) -> Load:
        return Load(url, self.fresh(MOST_REQUESTS))

    def fill_queue(self, server: Server) -> None:
        """Many more requests at once than there is room for."""
        count = 6 * (QUEUE + BATCH_SIZE)
        replies = asyncio.run(ask_all(server.url, "/caption", [body(image) for image in self.fresh(count)], count))
        statuses = self.note("full queue", enumerate(replies))
        told = sum(reply.status == 429 and "retry-after" in reply.headers for reply in replies)
        self.report.add(
            "full queue: requests with captions, or 429 and Retry-After", (statuses[200] + told) / count, unit="of all",
            target=1,
        )  # fmt: skip
        self.report.add("full queue: requests that are refused", told / count, unit="of all")
        slowest = max(reply.seconds for reply in replies if reply.status == 429)
        self.report.add("full queue: seconds until the last refusal", slowest, unit="s")

    def leave(self, server: Server) -> None:
        """Clients that leave while one batch is under way. Asked again, images say whether they had been encoded."""
        count = QUEUE + BATCH_SIZE
        images = self.fresh(count)
        asyncio.run(served.leave_after(0.3, server.url, "/caption", [body(image) for image in images]))
        asyncio.run(ask_all(server.url, "/caption", [body(image) for image in self.fresh(1)], 1))
        name = f'openblip_images_total{{cached="yes",model="{MODEL}"}}'
        before = server.metric(name)
        replies = asyncio.run(ask_all(server.url, "/embed", [{"images": image} for image in images], 1))
        assert {reply.status for reply in replies} == {200}
        encoded = server.metric(name) - before
        self.report.add(
            f"clients that leave: of {count} requests, those that the model worked on", encoded, unit="requests",
            target=2 * BATCH_SIZE, at_most=True,
        )  # fmt: skip

    def kill_worker(self, server: Server) -> None:
        """SIGKILL of the process that has the model, under load."""

        async def act() -> tuple[Load, float, float]:
            async with self.load(server.url) as load:
                killed = time.perf_counter()
                os.kill(server.worker("model-0"), signal.SIGKILL)
                await asyncio.sleep(0.5)
                await asyncio.to_thread(server.until_ready)
                ready = time.perf_counter()
                await load.answered(2 * CLIENTS)
            return load, killed, ready

        load, killed, ready = asyncio.run(act())
        statuses = self.note("killed worker", load.replies)
        refused = [reply for _, reply in load.replies if reply.status == 503]
        told = sum("retry-after" in reply.headers for reply in refused)
        self.report.add(
            "killed worker: requests with captions, or 503 and Retry-After",
            (statuses[200] + told) / statuses.total(), unit="of all", target=1,
        )  # fmt: skip
        had = max(reply.ended - killed for reply in load.on_their_way(killed))
        self.report.add(
            "killed worker: seconds until the last request that it had is told so", had, unit="s", target=AT_ONCE,
            at_most=True,
        )  # fmt: skip
        later = max((reply.seconds for reply in refused if reply.sent > killed), default=0.0)
        self.report.add(
            "killed worker: seconds of the slowest 503 until the next is ready", later, unit="s", target=AT_ONCE,
            at_most=True,
        )  # fmt: skip
        self.report.add("killed worker: seconds until it is ready again", ready - killed, unit="s")

    def fuzz(self, server: Server, options: argparse.Namespace) -> None:
        """Requests made to hurt."""
        tally = fuzz_server(server.url, MODEL, examples=options.examples, hostile=options.hostile, number=options.seed)
        self.report.facts["hostile"] = {
            "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
            "violations": tally.violations,
        }
        print("\n".join(tally.violations))
        self.report.add(
            f"hostile: of {tally.num_requests} requests, those that end in 5xx or without a reply",
            len(tally.violations), unit="requests", target=0, at_most=True,
        )  # fmt: skip
        replies = asyncio.run(ask_all(server.url, "/caption", [body(image) for image in self.fresh(NUM_IMAGES)], 1))
        self.note("after the hostile ones", enumerate(replies))

    def drain_one(self, first: Server, second: Server) -> None:
        """SIGTERM to one of two servers behind a balancer, under load."""

        async def act() -> Load:
            async with balancer([first, second]) as url, self.load(url) as load:
                first.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(first.process.wait, 60)
                await load.answered(2 * CLIENTS)
            return load

        load = asyncio.run(act())
        statuses = self.note("one of two drained", load.replies)
        self.report.add(
            "one of two drained: requests without captions", statuses.total() - statuses[200], unit="requests",
            target=0, at_most=True,
        )  # fmt: skip

    def kill_one(self, first: Server, second: Server) -> None:
        """SIGKILL to one of two servers behind a balancer, under load."""
        processes = first.processes()

        async def act() -> tuple[Load, float]:
            async with balancer([first, second]) as url, self.load(url) as load:
                killed = time.perf_counter()
                first.process.kill()
                await load.answered(4 * CLIENTS)
            return load, killed

        load, killed = asyncio.run(act())
        statuses = self.note("one of two killed", load.replies)
        without = [reply for _, reply in load.replies if reply.status != 200]
        self.report.add(
            f"one of two killed: requests without captions, of {CLIENTS} on their way", len(without), unit="requests",
            target=CLIENTS, at_most=True,
        )  # fmt: skip
        last = max((reply.ended - killed for reply in without), default=0.0)
        self.report.add("one of two killed: seconds until the last of them", last, unit="s", target=1.0, at_most=True)
        assert statuses[200]
        first.process.wait()
        deadline = time.perf_counter() + 30
        while (left := [title for process, title in processes.items() if served.title_of(process) == title]) and (
            time.perf_counter() < deadline
        ):
            time.sleep(0.2)
        self.report.facts["processes left"] = left
        self.report.add(
            f"one of two killed: of its {len(processes)} processes, those that go on", len(left), unit="processes",
            target=0, at_most=True,
        )  # fmt: skip

    def terminate(self, server: Server) -> None:
        """SIGTERM under load, until no connection is taken any more."""

        async def act() -> tuple[Load, float, float]:
            async with self.load(server.url) as load:
                asked = time.perf_counter()
                server.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(server.process.wait, 60)
                ended = time.perf_counter()
            return load, asked, ended

        load, asked, ended = asyncio.run(act())
        self.note("SIGTERM", load.replies)
        had = load.on_their_way(asked)
        accepted = [reply for _, reply in load.replies if not (reply.status == 0 and "ConnectError" in reply.body)]
        lost = [reply for reply in accepted if reply.status != 200]
        self.report.facts["SIGTERM"] |= {"on their way": len(had), "taken afterwards": len(load.since(asked))}
        self.report.add(
            f"SIGTERM: lost of {len(accepted)} accepted requests", len(lost), unit="requests", target=0, at_most=True
        )
        self.report.add("SIGTERM: exit status", float(server.process.returncode), unit="", target=0, at_most=True)
        self.report.add("SIGTERM: seconds until the end", ended - asked, unit="s")


@contextlib.asynccontextmanager
async def balancer(servers: Sequence[Server]) -> AsyncIterator[str]:
    """The address of a balancer before servers: it passes each connection on to the next server that is ready."""
    is_ready = dict.fromkeys(servers, True)
    turns = itertools.cycle(servers)
    connections: set[asyncio.Task[Any] | None] = set()

    async def watch() -> None:
        async with httpx2.AsyncClient(timeout=1) as client:
            while True:
                for server in servers:
                    try:
                        is_ready[server] = (await client.get(f"{server.url}/ready")).status_code == 200
                    except httpx2.TransportError:
                        is_ready[server] = False
                await asyncio.sleep(0.2)

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.current_task())
        for server in itertools.islice(turns, len(servers)):
            if not is_ready[server]:
                continue
            try:
                upstream, sink = await asyncio.open_connection("127.0.0.1", server.port)
            except ConnectionError:
                is_ready[server] = False
                continue
            await asyncio.gather(copy(reader, sink), copy(upstream, writer))
            return
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    watching = asyncio.create_task(watch())
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        watching.cancel()
        listening.close()
        await asyncio.wait(connections, timeout=5)  # the clients have closed them


if __name__ == "__main__":
    main()
