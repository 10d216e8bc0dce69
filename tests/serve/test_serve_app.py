"""The HTTP app before models that only pretend: limits, errors, uploads, and calls that nobody awaits."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

pytest.importorskip("ray.serve", reason='needs pip install "openblip[serve]"')
from fastapi import FastAPI
from ray.exceptions import RayActorError

from openblip import Beam, ConfigError
from openblip.data.reader import num_cores
from openblip.predictor.values import ScoredText
from openblip.serve.app import ModelServer, make_app
from openblip.serve.config import ServerLimits
from openblip.serve.openai import openai_router
from openblip.serve.worker import EmbedResult, ModelCall, WorkerReply

JSON = ("content-type", "application/json")


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


IMAGE = "data:image/png;base64," + base64.b64encode(png()).decode()


class Pending:
    """A call on its way, as Ray Serve's: it begins at once, can be awaited and cancelled."""

    def __init__(self, work: Awaitable[Any]) -> None:
        self.task = asyncio.ensure_future(work)

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.shield(self.task).__await__()

    def cancel(self) -> None:
        self.task.cancel()


class Staying:
    """The stream of a call to `stay`: the id and the facts of a worker, and then an error when it dies."""

    def __init__(self, worker: "Worker", known: Sequence[str]) -> None:
        self.worker, self.is_known, self.has_said = worker, worker.name in known, False

    async def __anext__(self) -> tuple[str, dict[str, Any]]:
        if self.is_known:
            raise StopAsyncIteration
        if self.has_said:
            await self.worker.dead.wait()
        if self.worker.dead.is_set():
            raise RayActorError
        self.has_said = True
        about = {"dtype": "float32", "device": "cpu", "num_parameters": 1, "answer_decoding": Beam()}
        return self.worker.name, {"tasks": list(self.worker.tasks), **about}

    def cancel(self) -> None:
        pass


class Worker:
    """A worker's handle. Captions say whose they are and how large the image's file is; `free` holds calls back."""

    def __init__(self, name: str, tasks: Sequence[str] = ("caption",)) -> None:
        self.name, self.tasks = name, tasks
        self.free, self.dead = asyncio.Event(), asyncio.Event()
        self.free.set()
        self.calls: list[ModelCall] = []
        self.cancelled = 0
        self.stay = SimpleNamespace(options=lambda stream: SimpleNamespace(remote=lambda known: Staying(self, known)))

    def remote(self, call: ModelCall) -> Pending:
        return Pending(self._answer(call))

    async def _answer(self, call: ModelCall) -> WorkerReply:
        self.calls.append(call)
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if call.name == "caption":
            texts = [
                ScoredText(
                    text=f"{self.name} {len(image)}", logprob=-1.0, tokens=(), token_logprobs=(), ids=(), has_end=True
                )
                for image in call.images
            ]
            return WorkerReply(result=texts, num_cached=1, batch_size=2)
        if call.name == "embed":
            return WorkerReply(result=EmbedResult(None, torch.ones(len(call.rows["texts"]), 2)))
        return WorkerReply(error=ConfigError("not this"))


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.content)


class Client:
    """Requests to an app, without a network."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    async def ask(self, path: str, body: Any = None, *headers: tuple[str, str], **options: Any) -> Reply:
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        messages = options.get("messages", [{"type": "http.request", "body": content}])
        left: asyncio.Event = options.get("left") or asyncio.Event()
        sent: list[Any] = []
        coming = iter(messages)

        async def receive() -> Any:
            for message in coming:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        given = headers or (JSON,)
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "path": path,
            "method": "GET" if body is None and "messages" not in options else "POST", "query_string": b"",
            "raw_path": path.encode(), "root_path": "", "client": ("client", 1), "server": ("server", 80),
            "headers": [(name.encode(), value.encode()) for name, value in given],
        }  # fmt: skip
        await self.app(scope, receive, send)
        if not sent:
            return Reply(0, {}, b"")
        received = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Reply(sent[0]["status"], received, b"".join(each.get("body", b"") for each in sent[1:]))


def served(
    test: Callable[[Client, ModelServer], Awaitable[None]], *workers: Any, index: Any = None,
    keys: Sequence[str] = (), num_replicas: int = 1, **limits: Any,
) -> None:  # fmt: skip
    """Run a test with a server before workers, which have answered once."""

    async def run() -> None:
        handles = {worker.name: worker for worker in workers}
        server = ModelServer(handles, ServerLimits(**limits), index, num_replicas=num_replicas)
        app = make_app(server, keys=keys, routers=[openai_router(server)])
        async with app.router.lifespan_context(app):
            async with asyncio.timeout(60):
                while not server.is_ready:
                    await asyncio.sleep(0)
                await test(Client(app), server)

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_a_full_queue_is_refused_and_the_accepted_are_answered() -> None:
    worker = Worker("a")

    async def test(client: Client, server: ModelServer) -> None:
        worker.free.clear()
        accepted = [asyncio.ensure_future(client.ask("/caption", {"images": IMAGE})) for _ in range(3)]
        await until(lambda: len(worker.calls) == 3)
        refused = await client.ask("/caption", {"images": IMAGE})
        assert (refused.status, refused.headers["retry-after"], refused.body["error"]["type"]) == (429, "1", "busy")
        assert b'openblip_requests_in_flight{model="a"} 3.0' in (await client.ask("/metrics")).content
        worker.free.set()
        assert [each.status for each in await asyncio.gather(*accepted)] == [200] * 3
        figures = (await client.ask("/metrics")).content.decode()
        for line in (
            'openblip_requests_total{path="/caption",status="200"} 3.0',
            'openblip_requests_total{path="/caption",status="429"} 1.0',
            'openblip_request_seconds_count{path="/caption"} 4.0',
            'openblip_images_total{cached="yes",model="a"} 3.0',
            'openblip_batch_size_sum{model="a"} 6.0',
            'openblip_requests_in_flight{model="a"} 0.0',
        ):
            assert line in figures, figures

    served(test, worker, queue=1, batch_size=2)


def test_calls_that_nobody_awaits_are_cancelled() -> None:
    worker = Worker("a")

    async def test(client: Client, server: ModelServer) -> None:
        worker.free.clear()
        late = await client.ask("/caption", {"images": IMAGE})
        assert (late.status, late.body["error"]["type"]) == (504, "timeout")
        await until(lambda: worker.cancelled == 1)
        left = asyncio.Event()
        server.limits = ServerLimits()
        leaving = asyncio.ensure_future(client.ask("/caption", {"images": IMAGE}, left=left))
        await until(lambda: len(worker.calls) == 2)
        left.set()
        await asyncio.wait([leaving])
        await until(lambda: worker.cancelled == 2)
        assert server.num_waiting == {"a": 0}

    served(test, worker, timeout=0.05)


def test_a_body_that_does_not_come_is_refused() -> None:
    async def test(client: Client, server: ModelServer) -> None:
        begun: list[Any] = [{"type": "http.request", "body": b"{", "more_body": True}]
        for path in ("/caption", "/v1/chat/completions"):
            reply = await client.ask(path, None, JSON, messages=begun)
            assert (reply.status, "did not come" in reply.body["error"]["message"]) == (408, True)
        form = ("content-type", "multipart/form-data; boundary=x")
        begun[0]["body"] = b"--x\r\n"
        assert (await client.ask("/caption", None, form, messages=begun)).status == 408

    served(test, Worker("a"), timeout=0.05)


def test_a_dead_worker_is_answered_at_once_and_comes_back() -> None:
    worker, other = Worker("a"), Worker("b")

    async def test(client: Client, server: ModelServer) -> None:
        worker.free.clear()  # as Ray, which holds calls until the next worker is there
        held = asyncio.ensure_future(client.ask("/caption", {"images": IMAGE}))
        await until(lambda: len(worker.calls) == 1)
        worker.dead.set()
        for reply in (await held, await client.ask("/caption", {"images": IMAGE, "model": "a"})):
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert (await client.ask("/ready")).status == 503
        assert (await client.ask("/caption", {"images": IMAGE, "model": "b"})).status == 200
        about, server.about = server.about, {}  # as before any model has answered
        for path, body in (("/caption", {"images": IMAGE}), ("/v1/embeddings", {"model": "a", "input": "x"})):
            assert (await client.ask(path, body)).status == 503
        server.about = about
        assert [each["is_ready"] for each in (await client.ask("/models")).body["models"]] == [False, True]
        worker.dead.clear()
        worker.free.set()
        while not server.is_ready:
            await asyncio.sleep(0.05)
        assert (await client.ask("/caption", {"images": IMAGE, "model": "a"})).status == 200

    served(test, worker, other)


class Replicas:
    """The handle of a model with several workers: calls go to the next one that lives, as those to stay do."""

    def __init__(self, *workers: Worker) -> None:
        self.name, self.workers, self.number = "a", workers, 0
        self.stay = SimpleNamespace(
            options=lambda stream: SimpleNamespace(remote=lambda known: Staying(self._next(), known))
        )

    def _next(self) -> Worker:
        living = [worker for worker in self.workers if not worker.dead.is_set()] or list(self.workers)
        self.number += 1
        return living[self.number % len(living)]

    def remote(self, call: ModelCall) -> Pending:
        return self._next().remote(call)


def test_a_model_is_down_when_its_last_worker_has_died() -> None:
    first, second = Worker("first"), Worker("second")

    async def test(client: Client, server: ModelServer) -> None:
        await until(lambda: len(server.workers["a"]) == 2)
        for worker in (first, second):
            worker.free.clear()
        calls = [asyncio.ensure_future(client.ask("/caption", {"images": IMAGE})) for _ in range(4)]
        await until(lambda: len(first.calls) == len(second.calls) == 2)
        assert (await client.ask("/caption", {"images": IMAGE})).status == 429
        first.dead.set()
        await until(lambda: len(server.workers["a"]) == 1)
        assert (await client.ask("/ready")).status == 200
        second.free.set()
        done, held = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 2:
            done, held = await asyncio.wait(calls, timeout=0.01)
        assert {each.result().status for each in done} == {200}
        second.dead.set()  # and those of the first, which are held here, do not wait for the next worker
        assert {(await each).status for each in held} == {503}
        assert (await client.ask("/ready")).status == 503

    served(test, Replicas(first, second), num_replicas=2, queue=2, batch_size=1)


def test_uploads_and_several_models() -> None:
    talker, looker = Worker("talker"), Worker("looker", ["embed_texts", "embed_images"])

    async def test(client: Client, server: ModelServer) -> None:
        parts = [
            ("images", "a.png", png()),
            ("images", "b.png", png("blue") + b"\n"),
            ("request", None, b'{"model": null}'),
        ]
        form = b""
        for field, file, content in parts:
            named = f'; filename="{file}"' if file else ""
            form += f'--x\r\ncontent-disposition: form-data; name="{field}"{named}\r\n\r\n'.encode() + content + b"\r\n"
        reply = await client.ask("/caption", form + b"--x--\r\n", ("content-type", "multipart/form-data; boundary=x"))
        texts = [[text["text"] for text in row] for row in reply.body["captions"]]
        assert texts == [[f"talker {len(png())}"], [f"talker {len(png('blue')) + 1}"]]
        assert (await client.ask("/embed", {"texts": ["x", "y"]})).body["texts"] == [[1.0, 1.0]] * 2
        assert (await client.ask("/embed", {"texts": "x"})).body["model"] == "looker"
        wrong = await client.ask("/caption", {"images": IMAGE, "model": "looker"})
        assert (wrong.status, "looker can embed_images" in wrong.body["error"]["message"]) == (422, True)
        unknown = await client.ask("/caption", {"images": IMAGE, "model": "none"})
        assert (unknown.status, "talker, looker" in unknown.body["error"]["message"]) == (422, True)
        no_form = await client.ask("/caption", b"x", ("content-type", "multipart/form-data"))
        assert (no_form.status, no_form.body["error"]["type"]) == (422, "invalid")
        many = await client.ask("/caption", {"images": IMAGE, "prompt": ["a"] * 100, "num_captions": 11})
        assert (many.status, "1100 texts" in many.body["error"]["message"]) == (422, True)

    served(test, talker, looker)


def test_images_at_urls_are_fetched_where_they_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://good.example/a.png"
    chat = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}

    async def test(client: Client, server: ModelServer) -> None:
        for path, body in (("/caption", {"images": [IMAGE, url]}), ("/v1/chat/completions", {"messages": [chat]})):
            refused = await client.ask(path, {"model": "a", **body})
            assert (refused.status, "opens no URL" in refused.body["error"]["message"]) == (422, True)

        async def fetch(urls: Sequence[str]) -> list[bytes]:
            return [each.encode() for each in urls]

        monkeypatch.setattr(server.fetcher, "fetch", fetch)
        reply = await client.ask("/caption", {"images": [IMAGE, url, IMAGE]})
        sizes = [len(png()), len(url), len(png())]
        assert [row[0]["text"] for row in reply.body["captions"]] == [f"a {size}" for size in sizes]
        reply = await client.ask("/v1/chat/completions", {"model": "a", "messages": [chat]})
        assert reply.body["choices"][0]["message"]["content"] == f"a {len(url)}"

    served(test, Worker("a"))


def test_search_asks_the_index() -> None:
    asked: list[Any] = []

    def search(*words: Any, **options: Any) -> list[Any]:
        asked.append((words, options))
        return [SimpleNamespace(shard="s", key="k", text="a dog", similarity=0.5, match=None, thumbnail=b"jpeg")]

    async def test(client: Client, server: ModelServer) -> None:
        reply = await client.ask("/search", {"text": "a dog", "top": 3, "where": "width > 5"})
        (result,) = reply.body["results"]
        assert (result["key"], result["caption"], result["thumbnail"]) == (
            "k",
            "a dog",
            "data:image/jpeg;base64,anBlZw==",
        )
        options = {"find": "images", "top": 3, "rerank": 0, "where": "width > 5", "thumbnails": True}
        assert asked == [(("a dog", None), options)]
        assert (await client.ask("/search", {"text": "a dog", "top": 0})).status == 422
        server.index = SimpleNamespace(search=lambda *query, **options: 1 / 0)
        broken = await client.ask("/search", {"text": "a dog"})
        assert (broken.status, broken.body["error"]["type"]) == (500, "internal")
        assert b'path="/search",status="500"' in (await client.ask("/metrics")).content
        server.index = None
        assert (await client.ask("/search", {"text": "a dog"})).status == 404

    served(test, Worker("a"), index=SimpleNamespace(search=search))


def test_searches_wait_in_a_queue_that_ends() -> None:
    free = threading.Event()

    def search(*query: Any, **options: Any) -> list[Any]:
        free.wait(60)
        return []

    async def test(client: Client, server: ModelServer) -> None:
        left = asyncio.Event()
        asked = [asyncio.ensure_future(client.ask("/search", {"text": "x"}, left=left)) for _ in range(9)]
        await until(lambda: server.num_searching == 9)
        assert (await client.ask("/search", {"text": "x"})).status == 429
        left.set()  # those that have not begun are given up, and nobody waits for the others
        await asyncio.wait(asked)
        await until(lambda: server.num_searching <= num_cores())
        free.set()
        await until(lambda: server.num_searching == 0)

    served(test, Worker("a"), index=SimpleNamespace(search=search), queue=9)


@pytest.mark.parametrize(("path", "kind"), [("/caption", "too_large"), ("/v1/embeddings", "invalid_request_error")])
def test_what_is_refused_before_a_route_has_the_form_of_its_api(path: str, kind: str) -> None:
    async def test(client: Client, server: ModelServer) -> None:
        for key in (("x-api-key", "wrong"), ("authorization", "Bearer"), ("authorization", "Basic secret")):
            reply = await client.ask(path, {}, JSON, key)
            assert reply.status == 401
            assert ("param" in reply.body["error"]) == path.startswith("/v1/")
        secret = ("authorization", "Bearer secret")
        said = await client.ask(path, {}, JSON, secret, ("content-length", "1000001"))
        pieces = [{"type": "http.request", "body": b" " * 600_000, "more_body": True}] * 2
        found = await client.ask(path, None, JSON, secret, messages=pieces)
        for reply in (said, found):
            assert (reply.status, reply.body["error"]["type"]) == (413, kind)
        assert (await client.ask("/health", None, JSON)).status == 200

    served(test, Worker("a"), keys=["secret", "other"], max_body=1)
