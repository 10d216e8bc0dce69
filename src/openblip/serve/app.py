"""The HTTP app: routes, limits, keys, errors, metrics, and what happens when a model is down or the server ends.

`ModelServer` has the handles of the workers and answers calls; `make_app` puts routes before it. Every error is
`{"error": {"type", "message"}}`. T texts.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import from_json
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openblip import Beam, Greedy, Nucleus
from openblip.data.images import read_image
from openblip.data.reader import num_cores
from openblip.errors import ConfigError, OpenBlipError
from openblip.predictor.base import CAPTION_DECODING, CHAT_DECODING
from openblip.serve import schema
from openblip.serve.config import ServerLimits
from openblip.serve.openai import openai_error
from openblip.serve.remote_images import ImageFetcher
from openblip.serve.worker import ModelCall, WorkerReply

OPEN_PATHS = ("/", "/health", "/ready", "/openapi.json", "/page.css", "/page.js")  # without a key
RETRY_AFTER, ASK_FOR_KEY = {"Retry-After": "1"}, {"WWW-Authenticate": "Bearer"}
ERROR_KINDS = {
    400: "invalid", 401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large",
    415: "media_type", 422: "invalid", 429: "busy", 500: "internal", 503: "unavailable", 504: "timeout",
}  # fmt: skip
MAX_NEW_TOKENS, MAX_BEAMS = 512, 16
logger = logging.getLogger("openblip.serve")
_Body = TypeVar("_Body", bound=BaseModel)


class ModelServer:
    """The models that are served: `ModelCalls` of the OpenAI routes, and of the routes here."""

    def __init__(
        self,
        handles: Mapping[str, Any],
        limits: ServerLimits,
        index: Any = None,
        *,
        num_replicas: int = 1,
        image_urls: Sequence[str] = (),
    ) -> None:
        """handles: of the deployments, by the name of the model; each has `num_replicas` workers. index: an open
        `ImageIndex`, for /search. image_urls: prefixes below which images are fetched. Raises ConfigError for what is
        no prefix.
        """
        self.handles, self.limits, self.index, self.num_replicas = handles, limits, index, num_replicas
        self.about: dict[str, dict[str, Any]] = {}  # of models that have answered once
        self.workers: dict[str, dict[str, asyncio.Task[None]]] = {name: {} for name in handles}
        """The living workers of each model by their ids, with what waits for their death."""
        self.died = {name: asyncio.Event() for name in handles}
        self.is_draining = False
        self.fetcher = ImageFetcher(image_urls, max_bytes=limits.max_body * 1_000_000, timeout=limits.timeout)
        self.num_searching, self.search_threads = 0, ThreadPoolExecutor(num_cores())
        self.num_waiting = dict.fromkeys(handles, 0)
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("openblip_requests", "Answered requests", ["path", "status"], registry=registry)
        self.seconds = Histogram("openblip_request_seconds", "Until the reply", ["path"], registry=registry)
        self.batches = Histogram(
            "openblip_batch_size", "Requests answered together", ["model"], registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )  # fmt: skip
        self.images = Counter("openblip_images", "Images of requests", ["model", "cached"], registry=registry)
        self.waiting = Gauge("openblip_requests_in_flight", "Requests of a model", ["model"], registry=registry)

    async def watch(self) -> None:
        """Know of each model which workers it has. Never returns."""
        await asyncio.gather(*(self._watch_model(name, handle) for name, handle in self.handles.items()))

    async def _watch_model(self, name: str, handle: Any) -> None:
        """Look every second for workers that are not known, where there should be more."""
        while True:
            if len(self.workers[name]) < self.num_replicas:
                await self._meet(name, handle)
            await asyncio.sleep(1.0)

    async def _meet(self, name: str, handle: Any) -> None:
        """Ask a worker, which the balancer of Ray Serve chooses, to stay: that call fails when the worker dies."""
        staying = handle.stay.options(stream=True).remote(list(self.workers[name]))
        try:
            async with asyncio.timeout(5):
                worker, about = await anext(staying)
        except StopAsyncIteration:
            return  # it is known
        except (RayError, RayServeException, TimeoutError) as error:
            staying.cancel()
            if not self.workers[name]:
                logger.warning("%s does not answer (%s)", name, type(error).__name__)
            return
        self.about[name] = about
        self.workers[name][worker] = asyncio.create_task(self._wait_for_death(name, worker, staying))
        self.died[name].clear()

    async def _wait_for_death(self, name: str, worker: str, staying: Any) -> None:
        try:
            await anext(staying)
        except (RayError, RayServeException, StopAsyncIteration) as error:
            logger.warning("a worker of %s is gone (%s)", name, type(error).__name__)
        finally:
            del self.workers[name][worker]
            if not self.workers[name]:
                self.died[name].set()

    async def _unless_dead(self, name: str, response: Any) -> Any:
        """What a worker gives; nobody waits for it afterwards. Raises RayError as soon as the last worker has died,
        when Ray would hold the call until the next one has started.
        """

        async def result() -> Any:
            return await response

        tasks = [asyncio.ensure_future(result()), asyncio.ensure_future(self.died[name].wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                return tasks[0].result()
            raise RayActorError(error_msg=f"the worker of {name} has died")
        finally:
            if not tasks[0].done():
                response.cancel()
            for task in tasks:
                task.cancel()
                task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody asks any more

    @property
    def down(self) -> list[str]:
        """The models without a living worker."""
        return [name for name, workers in self.workers.items() if not workers]

    @property
    def is_ready(self) -> bool:
        """Whether every model answers, and the server takes requests."""
        return not self.down and not self.is_draining

    def tasks(self) -> dict[str, frozenset[str]]:
        """The served models with the calls that they can do."""
        return {name: frozenset(self.about[name]["tasks"]) for name in self.handles if name in self.about}

    def default_decoding(self, model: str, call: str) -> Beam | Greedy | Nucleus:
        """How a model writes unless it is told otherwise."""
        own: Beam = self.about[model]["answer_decoding"]
        return {"caption": CAPTION_DECODING, "chat": CHAT_DECODING}.get(call, own)

    def choose(self, model: str | None, *calls: str) -> str:
        """The named model, or the first that can do all of the calls, or else one of them."""
        tasks = self.tasks()
        if model is not None and model not in self.handles:
            raise HTTPException(422, f"there is no model {model!r:.200}; there are {', '.join(self.handles)}")
        if (model is not None and model not in tasks) or not tasks:
            raise HTTPException(503, "the model is starting", RETRY_AFTER)
        names = list(tasks) if model is None else [model]
        best = max(names, key=lambda name: len(tasks[name] & set(calls)))
        if not tasks[best] & set(calls):
            can_do = "; ".join(f"{name} can {', '.join(sorted(tasks[name]))}" for name in names)
            raise HTTPException(422, f"no model here can {' or '.join(calls)}: {can_do}")
        return best

    async def read_images(self, images: Sequence[bytes | str]) -> list[bytes]:
        """The files of the images of a request, at most so many as the limits say; those at URLs are fetched. Raises
        ImageError for a URL that is not allowed or gives no file.
        """
        if len(images) > self.limits.max_images:
            raise HTTPException(422, f"{len(images)} images: a request has at most {self.limits.max_images}")
        fetched = iter(await self.fetcher.fetch([image for image in images if isinstance(image, str)]))
        return [next(fetched) if isinstance(image, str) else image for image in images]

    def check_texts(self, count: int) -> None:
        """Raises HTTPException for a request of more texts than the limits say; one counts again for each image."""
        if count > self.limits.max_texts:
            raise HTTPException(
                422, f"{count} texts, each counted again for every image: a request has at most {self.limits.max_texts}"
            )

    async def call(self, model: str, call: str, **arguments: Any) -> WorkerReply:
        """What the model gives for caption, answer, chat or embed, batched with calls of other requests."""
        images = tuple(arguments.pop("images", ()))
        names = [name for name in ("questions", "turns", "texts") if name in arguments]
        rows: dict[str, tuple[Any, ...]] = {name: tuple(arguments.pop(name)) for name in names}
        self.check_texts(sum(map(len, rows.values())))
        return await self.answer(model, ModelCall(name=call, images=images, rows=rows, settings=arguments))

    async def answer(self, model: str, call: ModelCall) -> WorkerReply:
        """The reply to a call. Raises HTTPException where there is none, and what the predictor raises."""
        decoding = call.settings.get("decoding")
        if getattr(decoding, "max_new_tokens", 0) > MAX_NEW_TOKENS or getattr(decoding, "num_beams", 0) > MAX_BEAMS:
            raise HTTPException(422, f"at most {MAX_NEW_TOKENS} new tokens and {MAX_BEAMS} beams")
        if call.settings.get("num_captions", 1) > MAX_BEAMS:
            raise HTTPException(422, f"at most {MAX_BEAMS} captions of an image")
        if not self.workers[model]:
            raise HTTPException(503, f"{model} is starting again", RETRY_AFTER)
        if self.num_waiting[model] >= self.limits.queue + self.limits.batch_size * len(self.workers[model]):
            raise HTTPException(429, f"{self.num_waiting[model]} requests wait for {model}", RETRY_AFTER)
        self.num_waiting[model] += 1
        self.waiting.labels(model).set(self.num_waiting[model])
        try:
            reply = await self._reply(model, self.handles[model].remote(call))
        finally:
            self.num_waiting[model] -= 1
            self.waiting.labels(model).set(self.num_waiting[model])
        self.batches.labels(model).observe(reply.batch_size)
        self.images.labels(model, "yes").inc(reply.num_cached)
        self.images.labels(model, "no").inc(max(0, len(set(call.images)) - reply.num_cached))
        if reply.error is not None:
            raise reply.error
        return reply

    async def _reply(self, model: str, response: Any) -> WorkerReply:
        """What a worker gives. Raises HTTPException where it gives nothing."""
        try:
            async with asyncio.timeout(self.limits.timeout):
                reply: WorkerReply = await self._unless_dead(model, response)
                return reply
        except TimeoutError as error:
            raise HTTPException(504, f"no answer within {self.limits.timeout:g} seconds") from error
        except BackPressureError as error:
            raise HTTPException(429, f"too many requests wait for {model}", RETRY_AFTER) from error
        except RayTaskError as error:
            logger.exception("%s has failed", model)
            raise HTTPException(503, f"{model} has failed; the log of the server says how", RETRY_AFTER) from error
        except (RayError, RayServeException) as error:
            logger.warning("%s: %s", model, str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise HTTPException(503, f"the worker of {model} has died; it is started again", RETRY_AFTER) from error

    async def search(self, text: str | None, image: bytes | None, **options: Any) -> list[Any]:
        """`ImageIndex.search`. Raises HTTPException where too many searches wait, or one takes too long."""
        if self.num_searching >= self.limits.queue:
            raise HTTPException(429, f"{self.num_searching} searches wait", RETRY_AFTER)
        loop = asyncio.get_running_loop()

        def look() -> list[Any]:
            opened = None if image is None else read_image(image, name="image", max_pixels=self.limits.max_pixels)
            hits: list[Any] = self.index.search(text, opened, **options)
            return hits

        def note_end(_: Any) -> None:
            self.num_searching -= 1

        self.num_searching += 1
        searching = self.search_threads.submit(look)
        searching.add_done_callback(lambda ended: loop.call_soon_threadsafe(note_end, ended))
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await asyncio.wrap_future(searching)  # one that still waits is given up when nobody asks for it
        except TimeoutError as error:
            raise HTTPException(504, f"no answer within {self.limits.timeout:g} seconds") from error


class _Guard:
    """The layer before all routes: keys, the size of bodies, clients that go away, errors nobody expects, metrics."""

    def __init__(self, app: ASGIApp, server: ModelServer, keys: Sequence[str]) -> None:
        self.app, self.server = app, server
        self.keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        limit, began, read = self.server.limits.max_body * 1_000_000, time.monotonic(), 0
        timeout, path = self.server.limits.timeout, scope["path"]
        deadline = asyncio.get_running_loop().time() + timeout
        after_body: asyncio.Future[Message] | None = None
        status = "client gone"

        async def limited() -> Message:
            nonlocal read, after_body
            if after_body is not None:
                return await asyncio.shield(after_body)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"the body did not come within {timeout:g} seconds") from error
            if message["type"] == "http.disconnect":
                answering.cancel()
            elif not message.get("more_body", False):
                after_body = asyncio.ensure_future(_coroutine(receive()))
                after_body.add_done_callback(lambda _: answering.cancel())
            read += len(message.get("body", b""))
            if read > limit:
                raise HTTPException(413, f"the body has more than {limit:,} bytes")
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                if self.server.is_draining:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        async def answer() -> None:
            length = headers.get(b"content-length", b"0")
            try:
                if not self._is_allowed(path, headers):
                    refusal = _error(401, "give an API key: Authorization: Bearer KEY", path, ASK_FOR_KEY)
                elif length.isdigit() and int(length) > limit:
                    refusal = _error(413, f"the body has {int(length):,} bytes; the limit is {limit:,}", path)
                else:
                    await self.app(scope, limited, noted)
                    return
                await _discard_body(receive)
                await refusal(scope, limited, noted)
            except ClientDisconnect:
                pass  # within its body
            except Exception:
                logger.exception("%s %r", scope["method"], path)
                if status != "client gone":
                    raise  # in the middle of a reply: the connection is closed
                await _error(500, "an error of the server; its log says more", path)(scope, limited, noted)

        answering = asyncio.ensure_future(answer())
        try:
            await asyncio.wait([answering])
            if not answering.cancelled():
                answering.result()
        finally:
            answering.cancel()
            if after_body is not None:
                after_body.cancel()
            path = getattr(scope.get("route"), "path", "other")
            self.server.requests.labels(path, status).inc()
            self.server.seconds.labels(path).observe(time.monotonic() - began)

    def _is_allowed(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the request has one of the keys. Hashes of all are compared, so that time says nothing of them."""
        if not self.keys or path in OPEN_PATHS:
            return True
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b""))
        return sum(hmac.compare_digest(given, key) for key in self.keys) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _coroutine(message: Awaitable[Message]) -> Message:
    return await message


async def _discard_body(receive: Receive) -> None:
    """Read for a second what a client sends: one whose connection is closed while it sends sees no reply."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            while (await receive()).get("more_body", False):
                pass


def _error(status: int, message: str, path: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    body = {"error": {"message": message, "type": ERROR_KINDS.get(status, "error")}}
    return JSONResponse(openai_error(status, message) if path.startswith("/v1/") else body, status, headers)


async def read_body(request: Request, kind: type[_Body]) -> _Body:
    """The body of a request, as JSON, or as a multipart upload of files beside the JSON. HTTPException 422 or 415."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if media == "multipart/form-data":
            return await _read_form(request, kind)
        if media != "application/json":
            raise HTTPException(415, "send application/json, or multipart/form-data with files")
        return kind.model_validate(from_json(await request.body()))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise HTTPException(422, f"{place}: {first['msg']}" if place else first["msg"]) from error
    except ValueError as error:
        raise HTTPException(422, f"the body is no JSON: {error}") from error
    except StarletteHTTPException as error:
        if error.status_code != 400:  # of a form that is none
            raise
        raise HTTPException(422, str(error.detail)) from error


async def _read_form(request: Request, kind: type[_Body]) -> _Body:
    async with request.form(max_files=64, max_fields=4) as form:
        given = form.get("request") or "{}"
        values = from_json(given if isinstance(given, str) else await given.read())
        if not isinstance(values, dict):
            raise HTTPException(422, "request: a JSON object is expected")
        for name in ("images", "image"):
            files = [await file.read() for file in form.getlist(name) if not isinstance(file, str)]
            if files:
                values[name] = files if len(files) > 1 or isinstance(values.get(name), list) else files[0]
        return kind.model_validate(values)


def make_app(server: ModelServer, *, keys: Sequence[str] = (), routers: Sequence[Any] = ()) -> FastAPI:
    """The app before a server. keys: of which a request must have one, where there are any. routers: further routes."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(server.watch())
        yield
        watching.cancel()
        await server.fetcher.close()

    app = FastAPI(title="OpenBLIP", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = server
    app.add_middleware(_Guard, server=server, keys=keys)

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), request.url.path, error.headers)

    @app.exception_handler(OpenBlipError)
    async def explain_error(request: Request, error: OpenBlipError) -> JSONResponse:
        return _error(422, str(error), request.url.path)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(request: Request) -> Response:
        if server.is_ready:
            return JSONResponse({"status": "ready"})
        why = "the server ends" if server.is_draining else f"starting: {', '.join(sorted(server.down))}"
        return _error(503, why, request.url.path, RETRY_AFTER)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(server.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/models")
    async def models() -> schema.ModelsReply:
        served = [
            schema.ModelInfo(
                name=name, is_ready=name not in server.down,
                **{key: server.about[name][key] for key in ("tasks", "dtype", "device", "num_parameters")},
            )
            for name in server.tasks()
        ]  # fmt: skip
        index = server.index
        found = None if index is None else schema.IndexInfo(images=index.num_images, model=index.settings["checkpoint"])
        return schema.ModelsReply(models=served, index=found)

    def posts(kind: type[BaseModel], reply: type[BaseModel]) -> Callable[[Any], Any]:
        """A route `POST /<name of the function>` that reads a body of this kind."""

        def decorate(answer: Callable[[Any], Awaitable[BaseModel]]) -> Any:
            async def route(request: Request) -> Response:
                result = await answer(await read_body(request, kind))
                return Response(result.model_dump_json(), media_type="application/json")

            reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
            field = "image" if "image" in kind.model_fields else "images"
            files = {"type": "array", "items": {"type": "string", "format": "binary"}}
            form = {"type": "object", "properties": {field: files, "request": {"type": "string"}}}
            content = {"application/json": {"schema": reference}, "multipart/form-data": {"schema": form}}
            errors: dict[int | str, dict[str, Any]] = {
                code: {"model": schema.ErrorReply} for code in (401, 408, 413, 415, 422, 429, 500, 503, 504)
            }
            app.add_api_route(
                f"/{answer.__name__}", route, methods=["POST"], response_model=reply, responses=errors,
                name=answer.__name__, description=kind.__doc__,
                openapi_extra={"requestBody": {"required": True, "content": content}},
            )  # fmt: skip
            return answer

        return decorate

    def as_list(given: Any) -> list[Any]:
        return given if isinstance(given, list) else [given]

    def pair(images: list[bytes], texts: Any, is_one: bool) -> tuple[list[bytes], list[Any]]:
        """Images and texts of the same number; one that is not in a list goes with all of the other."""
        listed = [texts] * len(images) if isinstance(texts, str | None) else list(texts)
        server.check_texts(len(listed))
        if is_one:
            images = images * len(listed)
        if len(images) != len(listed):
            raise ConfigError(f"{len(images)} images and {len(listed)} texts: one for each, or one that is in no list")
        return images, listed

    def written(text: Any) -> schema.WrittenText:
        return schema.WrittenText(text=text.text, logprob=text.logprob)

    @posts(schema.CaptionBody, schema.CaptionReply)
    async def caption(body: schema.CaptionBody) -> BaseModel:
        model, is_one = server.choose(body.model, "caption"), not isinstance(body.images, list)
        images, prompts = pair(await server.read_images(as_list(body.images)), body.prompt, is_one)
        server.check_texts(len(images) * body.num_captions)
        settings: dict[str, Any] = {"num_captions": body.num_captions, "return_scores": True}
        settings["decoding"] = body.strategy or server.default_decoding(model, "caption")
        call = ModelCall(name="caption", images=tuple(images), rows={"prompt": tuple(prompts)}, settings=settings)
        texts = (await server.answer(model, call)).result
        rows = [[written(text) for text in (row if body.num_captions > 1 else [row])] for row in texts]
        is_single = is_one and isinstance(body.prompt, str | None)
        return schema.CaptionReply(model=model, captions=rows[0] if is_single else rows)

    @posts(schema.AnswerBody, schema.AnswerReply)
    async def answer(body: schema.AnswerBody) -> BaseModel:
        model, is_one = server.choose(body.model, "answer"), not isinstance(body.images, list)
        images, questions = pair(await server.read_images(as_list(body.images)), body.questions, is_one)
        rows: dict[str, tuple[Any, ...]] = {"questions": tuple(questions)}
        settings = {"return_scores": True, "decoding": body.strategy or server.default_decoding(model, "answer")}
        if body.candidates is not None:
            shared = all(isinstance(each, str) for each in body.candidates)
            lists: list[Any] = [body.candidates] * len(questions) if shared else list(body.candidates)
            if not all(lists) or len(lists) != len(questions):
                raise ConfigError("candidates: texts for all questions, or a list that is not empty for each")
            server.check_texts(sum(map(len, lists)))
            rows["candidates"] = tuple(map(tuple, lists))
        call = ModelCall(name="answer", images=tuple(images), rows=rows, settings=settings)
        replies = [written(text) for text in (await server.answer(model, call)).result]
        is_single = is_one and isinstance(body.questions, str)
        return schema.AnswerReply(model=model, answers=replies[0] if is_single else replies)

    @posts(schema.MatchBody, schema.MatchReply)
    async def match(body: schema.MatchBody) -> BaseModel:
        model, texts = server.choose(body.model, "match", "similarity"), tuple(as_list(body.texts))
        images = await server.read_images(as_list(body.images))
        server.check_texts(len(images) * len(texts))
        call = ModelCall(name="compare", images=tuple(images), rows={"texts": texts})
        found = (await server.answer(model, call)).result
        return schema.MatchReply(model=model, match=found.match, similarity=found.similarity)

    @posts(schema.EmbedBody, schema.EmbedReply)
    async def embed(body: schema.EmbedBody) -> BaseModel:
        needed = [f"embed_{name}" for name in ("images", "texts") if getattr(body, name) is not None]
        if not needed:
            raise ConfigError("give images, texts or both")
        model = server.choose(body.model, *needed)
        images, texts = ([] if given is None else as_list(given) for given in (body.images, body.texts))
        found = (await server.call(model, "embed", images=await server.read_images(images), texts=texts)).result

        def listed(given: Any, vectors: Any) -> Any:
            return None if given is None else [] if vectors is None else vectors.tolist()

        vectors = {"images": listed(body.images, found.images), "texts": listed(body.texts, found.texts)}
        return schema.EmbedReply(model=model, **vectors)

    @posts(schema.ExplainBody, schema.ExplainReply)
    async def explain(body: schema.ExplainBody) -> BaseModel:
        model = server.choose(body.model, *(("caption",) if body.text is None else ("match", "answer", "caption")))
        images = tuple(await server.read_images([body.image]))
        call = ModelCall(name="explain", images=images, settings={"text": body.text})
        found = (await server.answer(model, call)).result

        def scaled(heat: Any) -> list[list[float]]:
            return list((heat / heat.max().clamp(min=1e-12)).tolist())

        words = [schema.WordHeat(word=w, heat=scaled(h)) for w, h in zip(found.words, found.heat, strict=True)]
        overall = scaled(found.overall)
        return schema.ExplainReply(model=model, text=found.text, score=found.score, words=words, overall=overall)

    @posts(schema.ChatBody, schema.ChatReply)
    async def chat(body: schema.ChatBody) -> BaseModel:
        model, images = server.choose(body.model, "chat"), await server.read_images(as_list(body.images))
        if len(images) != 1:
            raise ConfigError("a conversation is about one image")
        decoding = body.strategy or server.default_decoding(model, "chat")
        server.check_texts(len(body.turns))
        turns = [tuple(body.turns)]
        (reply,) = (
            await server.call(model, "chat", images=images, turns=turns, return_scores=True, decoding=decoding)
        ).result
        return schema.ChatReply(model=model, answer=written(reply))

    @posts(schema.SearchBody, schema.SearchReply)
    async def search(body: schema.SearchBody) -> BaseModel:
        if server.index is None:
            raise HTTPException(404, "this server has no index: start it with --index DIR")
        image = None if body.image is None else (await server.read_images([body.image]))[0]
        hits = await server.search(
            body.text, image, find=body.find, top=body.top, rerank=body.rerank, where=body.where,
            thumbnails=body.find == "images",
        )  # fmt: skip
        results = [
            schema.SearchResult(
                shard=hit.shard, key=hit.key, caption=hit.text, similarity=hit.similarity, match=hit.match,
                thumbnail=hit.thumbnail and f"data:image/jpeg;base64,{base64.b64encode(hit.thumbnail).decode()}",
            )
            for hit in hits
        ]  # fmt: skip
        return schema.SearchReply(results=results)

    for router in routers:
        app.include_router(router)
    make_schema = app.openapi

    def openapi() -> dict[str, Any]:
        """The schema of FastAPI, with the bodies, which it does not read itself."""
        if app.openapi_schema is None:
            bodies = [(kind, "validation") for kind in (
                schema.CaptionBody, schema.AnswerBody, schema.MatchBody, schema.EmbedBody, schema.ExplainBody,
                schema.ChatBody, schema.SearchBody,
            )]  # fmt: skip
            _, found = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            made = make_schema()
            made.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
            app.openapi_schema = json.loads(json.dumps(made))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app
