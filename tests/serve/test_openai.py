"""The official client, over a socket, against the routes of `/v1` around shipped models in this process."""

import asyncio
import base64
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, HTTPException
from openai import APIStatusError, OpenAI
from PIL import Image

import openblip
from openblip.errors import ImageError
from openblip.generation.decoding import Beam, Decoding
from openblip.serve.openai import Message, openai_router, read_messages
from openblip.serve.worker import EmbedResult, WorkerReply

CAPTIONER, FILTER = "openblip-mini-captioner", "openblip-mini-filter"
FULL = "full-queue"


class LocalCalls:
    """Predictors in this process; the model `full-queue` never answers."""

    def __init__(self) -> None:
        self.predictors = {name: openblip.load(name) for name in (CAPTIONER, FILTER)}

    def tasks(self) -> Mapping[str, frozenset[str]]:
        return {name: each.tasks for name, each in self.predictors.items()} | {FULL: frozenset({"caption"})}

    def default_decoding(self, model: str, call: str) -> Decoding:
        return Beam(num_beams=3, max_new_tokens=20)

    async def read_images(self, images: Sequence[bytes | str]) -> list[bytes]:
        if any(isinstance(image, str) for image in images):
            raise ImageError("URLs are not read")
        return [image for image in images if isinstance(image, bytes)]

    async def call(self, model: str, call: str, **arguments: Any) -> WorkerReply:
        if model == FULL:
            raise HTTPException(429, "The queue is full.", {"Retry-After": "1"})
        return await asyncio.to_thread(self._answer, self.predictors[model], call, arguments)

    def _answer(self, predictor: Any, call: str, arguments: Any) -> WorkerReply:
        if call != "embed":
            return WorkerReply(result=getattr(predictor, call)(**arguments))
        images, texts = (arguments[name] or None for name in ("images", "texts"))
        vectors = EmbedResult(images and predictor.embed_images(images), texts and predictor.embed_texts(texts))
        return WorkerReply(result=vectors, num_tokens=sum(predictor.count_tokens(texts or [], "embed_texts")))


@pytest.fixture(scope="module")
def models() -> LocalCalls:
    return LocalCalls()


@pytest.fixture(scope="module")
def client(models: LocalCalls) -> Iterator[OpenAI]:
    app = FastAPI()
    app.include_router(openai_router(models))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    server.should_exit = True
    thread.join()


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (112, 112), colour).save(file, "PNG")
    return file.getvalue()


def uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def asking(text: str | None = None, image: str | None = None) -> Any:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": image or uri(png())}}]
    return [{"role": "user", "content": parts + ([{"type": "text", "text": text}] if text else [])}]


def test_an_image_alone_is_captioned(client: OpenAI, models: LocalCalls) -> None:
    written = models.predictors[CAPTIONER].caption(png(), return_scores=True)
    reply = client.chat.completions.create(model=CAPTIONER, messages=asking())
    assert reply.choices[0].message.content == written.text
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(written.tokens)


def test_a_stream_has_the_same_text_and_its_usage(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=CAPTIONER, messages=asking())
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model=CAPTIONER, messages=asking(), stream=True, stream_options=options)
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    assert chunks[0].usage is None


def test_n_texts_lengths_seeds_and_stops(client: OpenAI) -> None:
    def texts(**settings: Any) -> list[Any]:
        return client.chat.completions.create(model=CAPTIONER, messages=asking(), **settings).choices

    assert len({choice.message.content for choice in texts(n=4)}) == 4
    assert texts(max_tokens=2)[0].finish_reason == "length"
    sampled = [[choice.message.content for choice in texts(n=3, temperature=2.0, seed=-5)] for _ in range(2)]
    assert sampled[0] == sampled[1]
    greedy = texts(temperature=0)[0].message.content
    first, second, *_ = greedy.split()
    assert texts(temperature=0, stop=[f" {second}"])[0].message.content == first


def test_embeddings_of_texts_and_images_in_both_encodings(client: OpenAI, models: LocalCalls) -> None:
    inputs = ["a red dog", uri(png()), "a blue car"]
    floats, packed, by_default = (
        client.embeddings.create(model=FILTER, input=inputs, **settings)
        for settings in ({"encoding_format": "float"}, {"encoding_format": "base64"}, {})
    )
    predictor = models.predictors[FILTER]
    expected = [
        predictor.embed_texts(inputs[0])[0],
        predictor.embed_images(png())[0],
        predictor.embed_texts(inputs[2])[0],
    ]
    for each, vector in zip(floats.data, expected, strict=True):
        assert each.embedding == pytest.approx(vector.tolist(), abs=1e-5)
    assert by_default.data[1].embedding == pytest.approx(floats.data[1].embedding, abs=1e-6)
    assert isinstance(packed.data[0].embedding, str)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [CAPTIONER, FILTER, FULL]
    assert client.models.retrieve(FILTER).owned_by == "openblip"


@pytest.mark.parametrize(
    ("status", "param", "settings"),
    [
        (404, "model", {"model": "gpt-4o"}),
        (400, "model", {"messages": asking("what colour is it?")}),
        (400, "model", {"model": FILTER}),
        (400, "messages", {"messages": [{"role": "user", "content": "hello"}]}),
        (400, "tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (400, "frequency_penalty", {"frequency_penalty": 0.5}),
        (400, "temperature", {"temperature": 3}),
        (400, "n", {"n": 2, "temperature": 0}),
        (422, None, {"messages": asking(image=uri(b"no image"))}),
        (422, None, {"messages": asking(image="http://169.254.169.254/a.png")}),
        (429, None, {"model": FULL}),
    ],
)
def test_wrong_input_is_an_error_of_openai(
    client: OpenAI, status: int, param: str | None, settings: dict[str, Any]
) -> None:
    with pytest.raises(APIStatusError) as raised:
        client.chat.completions.create(**{"model": CAPTIONER, "messages": asking(), **settings})
    assert raised.value.status_code == status
    assert raised.value.param == param
    assert raised.value.type


@pytest.mark.parametrize(
    "settings", [{"dimensions": 8}, {"model": CAPTIONER}, {"input": []}, {"input": [[1, 2]]}, {"input": "data:image/x"}]
)
def test_wrong_embeddings_are_refused(client: OpenAI, settings: dict[str, Any]) -> None:
    with pytest.raises(APIStatusError) as raised:
        client.embeddings.create(**{"model": FILTER, "input": "a dog", **settings})
    assert raised.value.status_code in (400, 422)


def test_a_conversation_is_about_its_last_image() -> None:
    def said(role: Any, text: str, image: bytes | None = None) -> Message:
        parts: list[Any] = [{"type": "text", "text": text}]
        parts += [{"type": "image_url", "image_url": {"url": uri(image)}}] if image else []
        return Message(role=role, content=parts)

    messages = [
        said("system", "be brief"), said("user", "", b"first"), said("assistant", "a dog"),
        said("user", "is it red?", b"second"), said("assistant", "no"), said("user", "why"), said("user", "not?"),
    ]  # fmt: skip
    assert read_messages(messages) == (b"second", [("is it red?", "no")], "why\nnot?")
