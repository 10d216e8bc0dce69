"""`/v1`: what of OpenAI's HTTP API a model of images can answer, so that clients written for it work unchanged.

A chat completion is about one image. Without a text it is the image's caption; with one it is the reply of a model that
can chat, or the answer of one that answers questions. Embeddings are of texts, and of images as data URIs. Errors have
OpenAI's form. `REFUSED_UNLESS` has the parameters that are refused.
"""

import asyncio
import base64
import json
import re
import secrets
import struct
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from openblip.errors import ImageError, OpenBlipError
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus
from openblip.predictor.values import ScoredText
from openblip.serve.schema import ImageField, read_image_field
from openblip.serve.worker import WorkerReply

REFUSED_UNLESS: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
}
"""Parameters that would change the reply and that these models do not have, with the values that change nothing. Others
that are not known are ignored: they say how a reply is billed, stored or routed."""
GREEDY_BELOW = 0.01
"""Temperatures under this take the most likely token, as temperature 0 does."""
MAX_CHOICES = 16
UNSUPPORTED = "unsupported_parameter"


# Requests.


class ParameterError(ValueError):
    """A parameter whose value cannot be answered. `code` is for programs, and `status` of HTTP."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class TextPart(BaseModel):
    """A text in a message."""

    type: Literal["text"]
    text: str


class ImageAddress(BaseModel):
    """An image as a data URI. `detail` is ignored: a model has one size of images."""

    url: ImageField


class ImagePart(BaseModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageAddress


class Message(BaseModel):
    """A turn. The text of the system and of the developer is ignored: no such model was trained to follow one."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None

    @property
    def text(self) -> str:
        """All text, joined."""
        if self.content is None or isinstance(self.content, str):
            return (self.content or "").strip()
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart)).strip()

    @property
    def images(self) -> list[bytes | str]:
        """All images."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class StreamOptions(BaseModel):
    """What else comes in a stream."""

    include_usage: bool | None = None


class _OpenAIBody(BaseModel):
    """Parameters that are not named are ignored, unless `REFUSED_UNLESS` has them."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        for name, accepted in REFUSED_UNLESS.items():
            if isinstance(values, dict) and values.get(name) not in accepted:
                raise PydanticCustomError(UNSUPPORTED, "{name} is not supported: leave it out", {"name": name})
        return values


StopText = Annotated[str, Field(min_length=1)]


class ChatCompletionBody(_OpenAIBody):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class EmbeddingsBody(_OpenAIBody):
    """`POST /v1/embeddings`. An input that begins with `data:image/` is an image."""

    input: str | Annotated[list[str], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1)


# What is asked.


class ImageConversation(NamedTuple):
    """What was said about an image, and what is asked: nothing, where only an image is given."""

    image: bytes | str
    earlier: list[tuple[str, str]]  # questions with their answers
    question: str


def read_messages(messages: Sequence[Message]) -> ImageConversation:
    """The conversation about the last image in these messages. What was said before that image was about another.

    Raises ParameterError, which says why, for messages that are no conversation about one image.
    """
    turns = [message for message in messages if message.role in ("user", "assistant")]
    with_images = [position for position, message in enumerate(turns) if message.images]
    if not with_images:
        raise ParameterError("there is no image: give the user's message an image_url with a data URI", "messages")
    about = turns[with_images[-1] :]
    if about[0].role != "user" or len(about[0].images) > 1:
        raise ParameterError("a message of the user has one image: these models look at one at a time", "messages")
    if about[-1].role != "user":
        raise ParameterError("the last message must be the user's", "messages")
    earlier, asked, answered = [], "", ""
    for message in about:
        if message.role == "assistant":
            answered = f"{answered}\n{message.text}".strip()
            continue
        if answered:
            earlier += [(asked, answered)] if asked else []
            asked, answered = "", ""
        asked = f"{asked}\n{message.text}".strip()
    return ImageConversation(about[0].images[0], earlier, asked)


def choose_decoding(body: ChatCompletionBody, default: Decoding, writes_several: bool) -> Decoding:
    """The strategy that the parameters ask for: sampling where there is a temperature or `top_p`, the likeliest tokens
    at temperature 0, and the model's own, `default`, otherwise.
    ParameterError for several texts that would all be equal.

    writes_several: whether the call that is made can write several texts by beam search.
    """
    n = body.n or 1
    max_new_tokens = body.max_completion_tokens or body.max_tokens or default.max_new_tokens
    if body.temperature is not None and body.temperature < GREEDY_BELOW:
        if n > 1:
            raise ParameterError("n must be 1 at temperature 0: all choices would be equal", "n")
        return Greedy(max_new_tokens=max_new_tokens)
    if body.temperature is None and body.top_p is None and (n == 1 or writes_several):
        if isinstance(default, Beam):
            default = replace(default, num_beams=max(n, default.num_beams))
        return replace(
            default, max_new_tokens=max_new_tokens, min_new_tokens=min(default.min_new_tokens, max_new_tokens)
        )
    return Nucleus(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        max_new_tokens=max_new_tokens,
        seed=None if body.seed is None else body.seed % 2**63,
    )


# Replies.


class Choice(NamedTuple):
    """A text, and why it ends."""

    text: str
    finish_reason: Literal["stop", "length"]


def as_choice(written: ScoredText, stops: Sequence[str]) -> Choice:
    """What was written, up to the first of `stops`."""
    found = [at for stop in stops if (at := written.text.find(stop)) >= 0]
    if found:
        return Choice(written.text[: min(found)], "stop")
    return Choice(written.text, "stop" if written.has_end else "length")


def encoded_vector(vector: Sequence[float], encoding: str | None) -> list[float] | str:
    """An embedding as numbers, or as base64 of its little-endian float32."""
    if encoding != "base64":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def stream_events(head: Mapping[str, Any], choices: Sequence[Choice], usage: Mapping[str, int] | None) -> Iterator[str]:
    """A completion as server-sent events, a word at a time. With `usage`, the last chunk has it."""

    def event(choices: list[dict[str, Any]], usage_now: Mapping[str, int] | None = None) -> str:
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices}
        chunk |= {} if usage is None else {"usage": usage_now}
        return f"data: {json.dumps(chunk)}\n\n"

    def delta(index: int, finish_reason: str | None = None, **content: str) -> dict[str, Any]:
        return {"index": index, "delta": content, "logprobs": None, "finish_reason": finish_reason}

    for index, choice in enumerate(choices):
        yield event([delta(index, role="assistant", content="")])
        for piece in re.findall(r"\s*\S+\s*\Z|\s*\S+", choice.text):
            yield event([delta(index, content=piece)])
        yield event([delta(index, choice.finish_reason)])
    if usage is not None:
        yield event([], usage)
    yield "data: [DONE]\n\n"


# Errors.

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def openai_error(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error as OpenAI's clients read it."""
    kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class OpenAIRoute(APIRoute):
    """A route whose errors have OpenAI's form. Unreadable images are 422, other wrong requests 400, as OpenAI's are."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                status, body = 400, _validation_error(error)
            except ParameterError as error:
                status, body = error.status, openai_error(error.status, str(error), error.param, error.code)
            except ImageError as error:
                status, body = 422, openai_error(422, str(error), code="invalid_image")
            except OpenBlipError as error:
                status, body = 400, openai_error(400, str(error))
            except HTTPException as error:
                body = openai_error(error.status_code, str(error.detail))
                return JSONResponse(body, error.status_code, error.headers)
            return JSONResponse(body, status)

        return with_errors


def _validation_error(error: RequestValidationError) -> dict[str, Any]:
    """The first of what is wrong with a body."""
    first = error.errors()[0]
    if first["type"] == UNSUPPORTED:
        name = first["ctx"]["name"]
        return openai_error(400, first["msg"], name, UNSUPPORTED)
    names = [str(part) for part in first["loc"] if part not in ("body", "text", "image_url")]
    param = ".".join(names) or None
    return openai_error(400, f"{param}: {first['msg']}" if param else first["msg"], param)


# Routes.


class ModelCalls(Protocol):
    """What `/v1` needs of a server. Its methods raise HTTPException where no model answers (429, 503, 504)."""

    def tasks(self) -> Mapping[str, frozenset[str]]:
        """The served models with the calls that they can do."""

    def default_decoding(self, model: str, call: str) -> Decoding:
        """How a model writes unless it is told otherwise."""

    async def read_images(self, images: Sequence[bytes | str]) -> list[bytes]:
        """The files of images, within the server's limits. Raises ImageError for a URL that is not allowed."""

    async def call(self, model: str, call: str, **arguments: Any) -> WorkerReply:
        """What the model gives for caption, answer, chat or embed, batched with calls of other requests."""


def openai_router(models: ModelCalls) -> APIRouter:
    """The routes of `/v1`."""
    router = APIRouter(prefix="/v1", route_class=OpenAIRoute, tags=["openai"])
    started = int(time.time())

    def tasks_of(model: str) -> frozenset[str]:
        served = models.tasks()
        if not served:
            raise HTTPException(503, "The models are starting.", {"Retry-After": "1"})
        if model not in served:
            names = ", ".join(served)
            raise ParameterError(
                f"There is no model {model!r:.200}; there are {names}.", "model", "model_not_found", 404
            )
        return served[model]

    def described(model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": started, "owned_by": "openblip"}

    async def write(
        body: ChatCompletionBody, asked: ImageConversation, tasks: frozenset[str]
    ) -> tuple[list[ScoredText], int]:
        """`n` texts, and the number of tokens that were read."""
        n = body.n or 1
        call = "caption" if not asked.question else "chat" if "chat" in tasks else "answer"
        if call not in tasks:
            can_do = ", ".join(sorted(tasks))
            advice = "; leave the text out for a caption" if call != "caption" and "caption" in tasks else ""
            raise ParameterError(
                f"{body.model} cannot {call}: it can do {can_do}{advice}.", "model", "unsupported_task"
            )
        images = await models.read_images([asked.image])
        decoding = choose_decoding(body, models.default_decoding(body.model, call), call == "caption")
        if call == "caption":
            reply = await models.call(
                body.model, call, images=images, decoding=decoding, num_captions=n, return_scores=True
            )
            return list(reply.result[0]) if n > 1 else list(reply.result), 0
        turns = [*asked.earlier, asked.question]
        given: dict[str, Any] = {"turns": [tuple(turns)]} if call == "chat" else {"questions": [asked.question]}
        strategies = _with_seeds(decoding, n)
        replies = await asyncio.gather(*(
            models.call(body.model, call, images=images, decoding=each, return_scores=True, **given)
            for each in strategies
        ))  # fmt: skip
        return [text for reply in replies for text in reply.result], replies[0].num_tokens

    @router.post("/chat/completions", response_model=None)
    async def complete_chat(body: ChatCompletionBody) -> Response:
        """The caption of an image, or the answer to what is asked about it."""
        tasks = tasks_of(body.model)
        asked = read_messages(body.messages)
        written, num_read = await write(body, asked, tasks)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        choices = [as_choice(text, stops) for text in written]
        num_written = sum(len(text.tokens) for text in written)
        usage = {"prompt_tokens": num_read, "completion_tokens": num_written, "total_tokens": num_read + num_written}
        name = f"chatcmpl-{secrets.token_hex(12)}"
        head = {"id": name, "created": int(time.time()), "model": body.model, "system_fingerprint": None}
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            events = stream_events(head, choices, usage if wants_usage else None)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        messages = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return JSONResponse({**head, "object": "chat.completion", "choices": messages, "usage": usage})

    @router.post("/embeddings", response_model=None)
    async def embed_inputs(body: EmbeddingsBody) -> Response:
        """Unit vectors of texts and images."""
        tasks = tasks_of(body.model)
        if "embed_texts" not in tasks:
            can_do = ", ".join(sorted(tasks))
            raise ParameterError(f"{body.model} cannot embed: it can do {can_do}.", "model", "unsupported_task")
        inputs = [body.input] if isinstance(body.input, str) else body.input
        vectors: list[list[float]] = [[] for _ in inputs]
        is_image = [each[:11].lower() == "data:image/" for each in inputs]
        images, texts = ([at for at, image in enumerate(is_image) if image is kind] for kind in (True, False))
        try:
            files = [read_image_field(inputs[at]) for at in images]
        except ValueError as error:
            raise ParameterError(f"input: {error}", "input", "invalid_image", 422) from error
        read, given = await models.read_images(files), [inputs[at] for at in texts]
        reply = await models.call(body.model, "embed", images=read, texts=given)
        for places, embedded in ((images, reply.result.images), (texts, reply.result.texts)):
            if places and embedded.ndim != 2:
                raise ParameterError(
                    f"{body.model} has {embedded.shape[1]} vectors for an image, and here is room for one; POST /embed "
                    "gives them all.", "input", "unsupported_task",
                )  # fmt: skip
            for at, vector in zip(places, embedded.tolist() if places else (), strict=True):
                vectors[at] = vector
        if body.dimensions not in (None, len(vectors[0])):
            raise ParameterError(
                f"dimensions is not supported: the vectors of {body.model} have {len(vectors[0])} numbers.",
                "dimensions", UNSUPPORTED,
            )  # fmt: skip
        data = [
            {"object": "embedding", "index": index, "embedding": encoded_vector(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": reply.num_tokens, "total_tokens": reply.num_tokens}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    @router.get("/models")
    async def list_served_models() -> dict[str, Any]:
        """The served models."""
        return {"object": "list", "data": [described(model) for model in models.tasks()]}

    @router.get("/models/{model:path}")
    async def find_served_model(model: str) -> dict[str, Any]:
        """One of them."""
        tasks_of(model)
        return described(model)

    return router


def _with_seeds(decoding: Decoding, count: int) -> list[Decoding]:
    """The strategy `count` times, with seeds that follow each other where it has one."""
    if not isinstance(decoding, Nucleus) or decoding.seed is None:
        return [decoding] * count
    return [replace(decoding, seed=decoding.seed + number) for number in range(count)]
