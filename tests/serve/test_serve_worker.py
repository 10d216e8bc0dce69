"""The worker of a model: answers do not depend on which calls come together, and images are encoded once."""

import io

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
    return worker.answer([worker.prepare(call) for call in calls])


def test_merged_calls_answer_as_the_predictor_does(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    red, blue = png("red"), png("blue")
    settings = {"decoding": openblip.Nucleus(seed=3), "num_captions": 2, "return_scores": True}
    calls = [
        ModelCall(name="caption", images=(red,), rows={"prompt": (None,)}, settings=settings),
        ModelCall(name="compare", images=(red, blue), rows={"texts": ("a dog", "a red ball")}),
        ModelCall(name="caption", images=(blue, red), rows={"prompt": ("a", "the")}, settings=settings),
        ModelCall(name="embed", rows={"texts": ("a dog",)}),
        ModelCall(name="compare", images=(blue,), rows={"texts": ("a red ball", "a small cat beside a tree", "a dog")}),
        ModelCall(name="embed", images=(blue, red, blue), rows={"texts": ("a red ball", "a dog")}),
    ]
    asked: list[str] = []
    for name in ("caption", "score_texts", "embed_images", "embed_texts"):
        whole = getattr(worker.predictor, name)
        monkeypatch.setattr(
            worker.predictor, name, lambda *a, _name=name, _call=whole, **k: (asked.append(_name), _call(*a, **k))[1]
        )
    replies = together(worker, *calls)
    # `score_texts` embeds the images itself
    assert sorted(asked) == ["caption", "embed_images", "embed_images", "embed_texts", "score_texts"]
    first, matrix, second, text, row, both = (reply.result for reply in replies)
    model = openblip.load("openblip-mini", "cpu")
    assert [t.text for t in first[0]] == [t.text for t in model.caption([red], **settings)[0]]
    expected = model.caption([blue, red], ["a", "the"], **settings)
    assert [[t.text for t in row] for row in second] == [[t.text for t in row] for row in expected]
    for found, images, texts in ((matrix, [red, blue], calls[1].rows), (row, [blue], calls[4].rows)):
        given = texts["texts"]
        torch.testing.assert_close(torch.tensor(found.match), model.match_matrix(images, given))
        torch.testing.assert_close(torch.tensor(found.similarity), model.similarity(images, given))
    torch.testing.assert_close(both.images, model.embed_images([blue, red, blue]))
    torch.testing.assert_close(both.texts, model.embed_texts(["a red ball", "a dog"]))
    torch.testing.assert_close(text.texts, both.texts[1:])
    assert text.images is None
    assert [reply.num_tokens for reply in replies] == [0, 0, 0, 4, 0, 9]


def test_calls_without_images_have_no_results(worker: ModelWorker) -> None:
    calls = [
        ModelCall(name="caption", rows={"prompt": ()}),
        ModelCall(name="compare", rows={"texts": ("a dog",)}),
        ModelCall(name="embed", rows={"texts": ()}),
        ModelCall(name="compare", images=(png("red"),), rows={"texts": ()}),
    ]
    assert [reply.result for reply in together(worker, *calls)] == [[], ([], []), (None, None), ([[]], [[]])]


def test_an_image_that_left_the_cache_while_its_call_waited_is_encoded(worker: ModelWorker) -> None:
    call = ModelCall(name="embed", images=(png("teal"),))
    (first,) = together(worker, call)
    waiting = worker.prepare(call)
    assert waiting.pixels == {}
    worker.cache.entries.clear()
    worker.cache.num_bytes = 0
    (again,) = worker.answer([waiting])
    torch.testing.assert_close(again.result.images, first.result.images)


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
    call = ModelCall(name="embed", images=(png("lime"), png("pink")))
    same = ModelCall(name="embed", images=(png("pink"),))
    first, shared = together(worker, call, same)
    (again,) = together(worker, call)
    assert encoded == [2]  # the image that two calls have, once
    assert (first.num_cached, again.num_cached) == (0, 2)
    torch.testing.assert_close(first.result.images, again.result.images)
    torch.testing.assert_close(shared.result.images, again.result.images[1:])
    one = next(iter(worker.cache.entries.values())).tokens.nbytes
    monkeypatch.setattr(worker.cache, "max_bytes", one)
    together(worker, ModelCall(name="embed", images=(png("gold"), png("navy"))))
    assert len(worker.cache.entries) == 1
    assert worker.cache.num_bytes == one
