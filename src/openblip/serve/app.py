"""The HTTP app: routes, limits, keys, errors, metrics, and what happens when a model is down or the server ends.

`ModelServer` has the handles of the workers and answers calls; `make_app` puts routes before it. Every error is
`{"error": {"type", "message"}}`. T texts.
"""

import asyncio
import base64
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openblip import Beam, Greedy, Nucleus
from openblip.errors import ConfigError, ImageError, OpenBlipError
from openblip.predictor.base import CAPTION_DECODING, CHAT_DECODING
from openblip.serve import schema
from openblip.serve.config import ServerLimits
from openblip.serve.openai import openai_error
from openblip.serve.worker import ModelCall

OPEN_PATHS = ("/", "/health", "/ready", "/openapi.json", "/page.css", "/page.js")  # without a key
RETRY_AFTER = {"Retry-After": "1"}
ERROR_KINDS = {
    401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large",
    415: "media_type", 422: "invalid", 429: "busy", 503: "unavailable", 504: "timeout",
}  # fmt: skip
MAX_NEW_TOKENS, MAX_BEAMS = 512, 16
logger = logging.getLogger("openblip.serve")
_Body = TypeVar("_Body", bound=BaseModel)


class ModelServer:
    """The models that are served: `ModelCalls` of the OpenAI routes, and of the routes here."""

    def __init__(self, handles: Mapping[str, Any], limits: ServerLimits, index: Any = None) -> None:
        """handles: of the workers, by the name of the model. index: an open `ImageIndex`, for /search."""
        self.handles, self.limits, self.index = handles, limits, index
        self.about: dict[str, dict[str, Any]] = {}  # of models that have answered once
        self.down: set[str] = set(handles)
        self.died = {name: asyncio.Event() for name in handles}
        self.is_draining = False
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
        """Know of each model whether it is there. Never returns."""
        await asyncio.gather(*(self._watch_model(name, handle) for name, handle in self.handles.items()))

    async def _watch_model(self, name: str, handle: Any) -> None:
        """Ask a model every second until it answers; then a call that it never answers says when it has died."""
        while True:
            self.died[name].clear()
            try:
                self.about[name] = await asyncio.wait_for(self._unless_dead(name, handle.describe.remote()), 5)
                self.down.discard(name)
                await self._unless_dead(name, handle.stay.remote())
            except (RayError, RayServeException, TimeoutError) as error:
                logger.warning("%s does not answer (%s)", name, type(error).__name__)
            self._note_death(name)
            await asyncio.sleep(1.0)

    def _note_death(self, name: str) -> None:
        self.down.add(name)
        self.died[name].set()

    async def _unless_dead(self, name: str, response: Any) -> Any:
        """What a worker gives; nobody waits for it afterwards. Raises RayError as soon as the worker has died."""

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

    async def read_image(self, image: bytes | str) -> bytes:
        """The file of an image. Raises ImageError for a URL: this server asks nothing of other machines."""
        if isinstance(image, str):
            raise ImageError("images are taken as data URIs or uploads; this server opens no URL")
        return image

    async def read_images(self, images: Any) -> list[bytes]:
        """The files of one image or several, at most so many as the limits say."""
        listed = images if isinstance(images, list) else [images]
        if len(listed) > self.limits.max_images:
            raise HTTPException(422, f"{len(listed)} images: a request has at most {self.limits.max_images}")
        return [await self.read_image(image) for image in listed]

    async def count_tokens(self, model: str, texts: Sequence[str]) -> int:
        """How many tokens the model reads of these texts, without padding."""
        return int(await self._result(model, self.handles[model].count_tokens.remote(list(texts))))

    async def call(self, request: Request, model: str, call: str, **arguments: Any) -> Any:
        """The predictor's call of this name, batched with those of other requests."""
        images = tuple(arguments.pop("images", ()))
        rows = {
            name: tuple(arguments.pop(name)) for name in ("questions", "turns", "candidates", "prompt")
            if isinstance(arguments.get(name), list | tuple)
        }  # fmt: skip
        if call == "embed_texts":
            rows["texts"] = tuple(arguments.pop("texts"))
        return await self.answer(request, model, ModelCall(name=call, images=images, rows=rows, settings=arguments))

    async def answer(self, request: Request, model: str, call: ModelCall) -> Any:
        """The result of a call. Raises HTTPException where there is none, and what the predictor raises."""
        decoding = call.settings.get("decoding")
        if getattr(decoding, "max_new_tokens", 0) > MAX_NEW_TOKENS or getattr(decoding, "num_beams", 0) > MAX_BEAMS:
            raise HTTPException(422, f"at most {MAX_NEW_TOKENS} new tokens and {MAX_BEAMS} beams")
        if call.settings.get("num_captions", 1) > MAX_BEAMS:
            raise HTTPException(422, f"at most {MAX_BEAMS} captions of an image")
        if self.num_waiting[model] >= self.limits.queue + self.limits.batch_size:
            raise HTTPException(429, f"{self.num_waiting[model]} requests wait for {model}", RETRY_AFTER)
        if model in self.down:
            raise HTTPException(503, f"{model} is starting again", RETRY_AFTER)
        self.num_waiting[model] += 1
        self.waiting.labels(model).set(self.num_waiting[model])
        try:
            outcome = await self._result(model, self.handles[model].remote(call), request)
        finally:
            self.num_waiting[model] -= 1
            self.waiting.labels(model).set(self.num_waiting[model])
        self.batches.labels(model).observe(outcome.batch_size)
        self.images.labels(model, "yes").inc(outcome.num_cached)
        self.images.labels(model, "no").inc(max(0, len(set(call.images)) - outcome.num_cached))
        if outcome.error is not None:
            raise outcome.error
        return outcome.result

    async def _result(self, model: str, response: Any, request: Request | None = None) -> Any:
        """What a worker gives. Raises HTTPException where it gives nothing, CancelledError when the client goes away.

        Ray would hold a call for a worker that has died until the next one has started; here it is refused at once.
        """

        async def gone(request: Request) -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        found = asyncio.ensure_future(self._unless_dead(model, response))
        tasks = [found, *([] if request is None else [asyncio.ensure_future(gone(request))])]
        try:
            done, _ = await asyncio.wait(tasks, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if found in done:
                return found.result()
            if done:
                raise asyncio.CancelledError
            raise HTTPException(504, f"no answer within {self.limits.timeout:g} seconds")
        except BackPressureError as error:
            raise HTTPException(429, f"too many requests wait for {model}", RETRY_AFTER) from error
        except RayTaskError as error:
            logger.exception("%s has failed", model)
            raise HTTPException(503, f"{model} has failed; the log of the server says how", RETRY_AFTER) from error
        except (RayError, RayServeException) as error:
            logger.warning("%s: %s", model, str(error).splitlines()[0] if str(error) else type(error).__name__)
            self._note_death(model)
            raise HTTPException(503, f"the worker of {model} has died; it is started again", RETRY_AFTER) from error
        finally:
            for task in tasks:
                task.cancel()


class _Guard:
    """The outermost layer: keys, the size of bodies, and metrics."""

    def __init__(self, app: ASGIApp, server: ModelServer, keys: Sequence[bytes]) -> None:
        self.app, self.server, self.keys = app, server, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        limit, began, read = self.server.limits.max_body * 1_000_000, time.monotonic(), 0
        timeout, is_read = self.server.limits.timeout, False
        deadline = asyncio.get_running_loop().time() + timeout
        status = "client gone"

        async def limited() -> Message:
            nonlocal read, is_read
            try:
                async with asyncio.timeout_at(None if is_read else deadline):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"the body did not come within {timeout:g} seconds") from error
            is_read = is_read or not message.get("more_body", False)
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

        length = headers.get(b"content-length", b"0")
        if not self._is_allowed(scope["path"], headers):
            refusal: Response | None = _error(401, "give an API key: Authorization: Bearer KEY", scope["path"])
        elif length.isdigit() and int(length) > limit:
            refusal = _error(413, f"the body has {int(length):,} bytes; the limit is {limit:,}", scope["path"])
        else:
            refusal = None
        try:
            if refusal is not None:
                await _discard_body(receive)
            await (refusal or self.app)(scope, limited, noted)
        except asyncio.CancelledError:
            if self.server.is_draining or status != "client gone":
                raise
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.server.requests.labels(path, status).inc()
            self.server.seconds.labels(path).observe(time.monotonic() - began)

    def _is_allowed(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the request has one of the keys. All are compared, so that time says nothing of them."""
        if not self.keys or path in OPEN_PATHS:
            return True
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        return sum(hmac.compare_digest(given, key) for key in self.keys) > 0


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

    app = FastAPI(title="OpenBLIP", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = server
    app.add_middleware(_Guard, server=server, keys=[key.encode() for key in keys])

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
                **{key: about[key] for key in ("tasks", "dtype", "device", "num_parameters")},
            )
            for name, about in server.about.items()
        ]  # fmt: skip
        index = server.index
        found = None if index is None else schema.IndexInfo(images=len(index), model=index.settings["checkpoint"])
        return schema.ModelsReply(models=served, index=found)

    def posts(kind: type[BaseModel], reply: type[BaseModel]) -> Callable[[Any], Any]:
        """A route `POST /<name of the function>` that reads a body of this kind."""

        def decorate(answer: Callable[[Request, Any], Awaitable[BaseModel]]) -> Any:
            async def route(request: Request) -> Response:
                result = await answer(request, await read_body(request, kind))
                return Response(result.model_dump_json(), media_type="application/json")

            reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
            field = "image" if "image" in kind.model_fields else "images"
            files = {"type": "array", "items": {"type": "string", "format": "binary"}}
            form = {"type": "object", "properties": {field: files, "request": {"type": "string"}}}
            content = {"application/json": {"schema": reference}, "multipart/form-data": {"schema": form}}
            errors: dict[int | str, dict[str, Any]] = {
                code: {"model": schema.ErrorReply} for code in (401, 408, 413, 415, 422, 429, 503, 504)
            }
            app.add_api_route(
                f"/{answer.__name__}", route, methods=["POST"], response_model=reply, responses=errors,
                name=answer.__name__, description=kind.__doc__,
                openapi_extra={"requestBody": {"required": True, "content": content}},
            )  # fmt: skip
            return answer

        return decorate

    def texts_of(texts: Any) -> list[str]:
        listed = [texts] if isinstance(texts, str) else list(texts)
        if len(listed) > server.limits.max_texts:
            raise HTTPException(422, f"{len(listed)} texts: a request has at most {server.limits.max_texts}")
        return listed

    def pair(images: list[bytes], texts: Any, is_one: bool) -> tuple[list[bytes], list[Any]]:
        """Images and texts of the same number; one that is not in a list goes with all of the other."""
        listed = [texts] * len(images) if isinstance(texts, str | None) else texts_of(texts)
        if is_one:
            images = images * len(listed)
        if len(images) != len(listed):
            raise ConfigError(f"{len(images)} images and {len(listed)} texts: one for each, or one that is in no list")
        return images, listed

    def written(text: Any) -> schema.WrittenText:
        return schema.WrittenText(text=text.text, logprob=text.logprob)

    @posts(schema.CaptionBody, schema.CaptionReply)
    async def caption(request: Request, body: schema.CaptionBody) -> BaseModel:
        model, is_one = server.choose(body.model, "caption"), not isinstance(body.images, list)
        images, prompts = pair(await server.read_images(body.images), body.prompt, is_one)
        settings: dict[str, Any] = {"num_captions": body.num_captions, "return_scores": True}
        settings["decoding"] = body.strategy or server.default_decoding(model, "caption")
        call = ModelCall(name="caption", images=tuple(images), rows={"prompt": tuple(prompts)}, settings=settings)
        texts = await server.answer(request, model, call)
        rows = [[written(text) for text in (row if body.num_captions > 1 else [row])] for row in texts]
        is_single = is_one and isinstance(body.prompt, str | None)
        return schema.CaptionReply(model=model, captions=rows[0] if is_single else rows)

    @posts(schema.AnswerBody, schema.AnswerReply)
    async def answer(request: Request, body: schema.AnswerBody) -> BaseModel:
        model, is_one = server.choose(body.model, "answer"), not isinstance(body.images, list)
        images, questions = pair(await server.read_images(body.images), body.questions, is_one)
        rows: dict[str, tuple[Any, ...]] = {"questions": tuple(questions)}
        settings = {"return_scores": True, "decoding": body.strategy or server.default_decoding(model, "answer")}
        if body.candidates is not None:
            shared = all(isinstance(each, str) for each in body.candidates)
            lists: list[Any] = [body.candidates] * len(questions) if shared else list(body.candidates)
            if not all(lists) or len(lists) != len(questions):
                raise ConfigError("candidates: texts for all questions, or a list that is not empty for each")
            rows["candidates"] = tuple(tuple(texts_of(each)) for each in lists)
        texts = await server.answer(
            request, model, ModelCall(name="answer", images=tuple(images), rows=rows, settings=settings)
        )
        replies = [written(text) for text in texts]
        is_single = is_one and isinstance(body.questions, str)
        return schema.AnswerReply(model=model, answers=replies[0] if is_single else replies)

    @posts(schema.MatchBody, schema.MatchReply)
    async def match(request: Request, body: schema.MatchBody) -> BaseModel:
        model, images = server.choose(body.model, "match", "similarity"), await server.read_images(body.images)
        texts, scores = tuple(texts_of(body.texts)), {}
        for name, needed in (("match_matrix", "match"), ("similarity", "similarity")):
            if needed in server.tasks()[model]:
                call = ModelCall(name=name, images=tuple(images), settings={"texts": texts})
                scores[needed] = (await server.answer(request, model, call)).tolist()
        return schema.MatchReply(model=model, match=scores.get("match"), similarity=scores.get("similarity"))

    @posts(schema.EmbedBody, schema.EmbedReply)
    async def embed(request: Request, body: schema.EmbedBody) -> BaseModel:
        if body.images is None and body.texts is None:
            raise ConfigError("give images, texts or both")
        model, vectors = server.choose(body.model, "embed_images", "embed_texts"), {}
        if body.images is not None:
            files = tuple(await server.read_images(body.images))
            call = ModelCall(name="embed_images", images=files)
            vectors["images"] = (await server.answer(request, model, call)).tolist() if files else []
        if body.texts is not None:
            call = ModelCall(name="embed_texts", rows={"texts": tuple(texts_of(body.texts))})
            vectors["texts"] = (await server.answer(request, model, call)).tolist()
        return schema.EmbedReply(model=model, images=vectors.get("images"), texts=vectors.get("texts"))

    @posts(schema.ExplainBody, schema.ExplainReply)
    async def explain(request: Request, body: schema.ExplainBody) -> BaseModel:
        model = server.choose(body.model, *(("caption",) if body.text is None else ("match", "answer", "caption")))
        call = ModelCall(name="explain", images=(await server.read_image(body.image),), settings={"text": body.text})
        found = await server.answer(request, model, call)

        def scaled(heat: Any) -> list[list[float]]:
            return list((heat / heat.max().clamp(min=1e-12)).tolist())

        words = [schema.WordHeat(word=w, heat=scaled(h)) for w, h in zip(found.words, found.heat, strict=True)]
        overall = scaled(found.overall)
        return schema.ExplainReply(model=model, text=found.text, score=found.score, words=words, overall=overall)

    @posts(schema.ChatBody, schema.ChatReply)
    async def chat(request: Request, body: schema.ChatBody) -> BaseModel:
        model, images = server.choose(body.model, "chat"), await server.read_images(body.images)
        if len(images) != 1:
            raise ConfigError("a conversation is about one image")
        settings = {"return_scores": True, "decoding": body.strategy or CHAT_DECODING}
        call = ModelCall(name="chat", images=tuple(images), rows={"turns": (tuple(body.turns),)}, settings=settings)
        (reply,) = await server.answer(request, model, call)
        return schema.ChatReply(model=model, answer=written(reply))

    @posts(schema.SearchBody, schema.SearchReply)
    async def search(request: Request, body: schema.SearchBody) -> BaseModel:
        if server.index is None:
            raise HTTPException(404, "this server has no index: start it with --index DIR")
        image = None if body.image is None else await server.read_image(body.image)
        hits = await asyncio.to_thread(
            server.index.search, body.text, image, find=body.find, top=body.top, rerank=body.rerank, where=body.where,
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
