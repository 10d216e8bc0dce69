"""The worker of a model: answers do not depend on which calls come together, and images are encoded once."""

import hashlib
import io
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("ray.serve", reason='needs pip install "openblip[serve]"')
import openblip
from openblip.errors import UnsupportedTaskError
from openblip.serve.worker import ModelCall, ModelWorker, WorkerReply


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 32), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def worker() -> ModelWorker:
    load = {"source": "openblip-mini", "device": "cpu"}
    return ModelWorker(load, batch_size=8, batch_wait=0.0, cache_bytes=10**7, max_pixels=10**6)


def together(worker: ModelWorker, *calls: ModelCall) -> list[WorkerReply]:
    items: list[Any] = []
    for call in calls:
        names = [hashlib.sha256(image).digest() for image in call.images]
        files = dict(zip(names, call.images, strict=True))
        items.append((call, names, dict(zip(files, worker._prepare(call.images, files), strict=True))))
    return worker.answer(items)


def test_merged_calls_answer_as_the_predictor_does(worker: ModelWorker) -> None:
    red, blue = png("red"), png("blue")
    settings = {"decoding": openblip.Nucleus(seed=3), "num_captions": 2, "return_scores": True}
    calls = [
        ModelCall(name="caption", images=(red,), rows={"prompt": (None,)}, settings=settings),
        ModelCall(name="match_matrix", images=(red, blue), settings={"texts": ("a dog", "a red ball")}),
        ModelCall(name="caption", images=(blue, red), rows={"prompt": ("a", "the")}, settings=settings),
        ModelCall(name="embed_texts", rows={"texts": ("a dog",)}),
        ModelCall(name="embed_texts", rows={"texts": ("a red ball", "x")}),
    ]
    first, matrix, second, text, texts = (outcome.result for outcome in together(worker, *calls))
    model = openblip.load("openblip-mini", "cpu")
    assert [t.text for t in first[0]] == [t.text for t in model.caption([red], **settings)[0]]
    expected = model.caption([blue, red], ["a", "the"], **settings)
    assert [[t.text for t in row] for row in second] == [[t.text for t in row] for row in expected]
    torch.testing.assert_close(matrix, model.match_matrix([red, blue], ["a dog", "a red ball"]))
    torch.testing.assert_close(torch.cat([text, texts]), model.embed_texts(["a dog", "a red ball", "x"]))


def test_a_call_that_fails_leaves_others_alone(worker: ModelWorker) -> None:
    settings = {"decoding": openblip.Greedy(max_new_tokens=5), "num_captions": 1}
    calls = [
        ModelCall(name="caption", images=(png("red"),), rows={"prompt": (prompt,)}, settings=settings)
        for prompt in ("a", "a " * 600)
    ]
    good, bad = together(worker, *calls)
    assert good.error is None
    assert len(good.result) == 1
    assert isinstance(bad.error, openblip.ConfigError)
    (unable,) = together(worker, ModelCall(name="chat", images=(png("red"),), rows={"turns": (("what?",),)}))
    assert isinstance(unable.error, UnsupportedTaskError)


def test_images_are_encoded_once_within_a_bound(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = worker.predictor.encode
    monkeypatch.setattr(worker.predictor, "encode", lambda x, size: (encoded.append(len(x)), encode(x, size))[1])
    call = ModelCall(name="embed_images", images=(png("lime"), png("pink")))
    same = ModelCall(name="embed_images", images=(png("pink"),))
    first, shared = together(worker, call, same)
    (again,) = together(worker, call)
    assert encoded == [2]  # the image that two calls have, once
    assert (first.num_cached, again.num_cached) == (0, 2)
    torch.testing.assert_close(first.result, again.result)
    torch.testing.assert_close(shared.result, again.result[1:])
    one = next(iter(worker.cache.entries.values())).tokens.nbytes
    monkeypatch.setattr(worker.cache, "max_bytes", one)
    together(worker, ModelCall(name="embed_images", images=(png("gold"), png("navy"))))
    assert len(worker.cache.entries) == 1
    assert worker.cache.num_bytes == one
