"""Every call gives in eight threads what it gives in one, and leaves the model as it was."""

import contextlib
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av")

from tiny_predictor import IMAGES, TEXTS, assert_same, blip2_predictor, make_predictor, random_video

from openblip.errors import OpenBlipError
from openblip.generation.decoding import Beam, Nucleus
from openblip.predictor import BasePredictor

pytestmark = pytest.mark.slow

PREDICTORS: dict[str, BasePredictor] = {
    "blip": make_predictor("itc", "itm", "lm"),
    "lm": make_predictor("lm"),
    "vqa": make_predictor("vqa"),
    "nlvr": make_predictor("nlvr"),
    "visdial": make_predictor("visdial"),
    "blip2": blip2_predictor(("itc", "itm", "itg")),
    "opt": blip2_predictor((), "opt"),
    "t5": blip2_predictor((), "t5"),
}
BEAM, SAMPLES = Beam(num_beams=2, max_new_tokens=4), Nucleus(max_new_tokens=4, seed=1)
CALLS: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "caption": (("blip", "blip2", "opt", "t5"), lambda p: p.caption(IMAGES, decoding=BEAM, return_scores=True)),
    "sampled": (("blip", "blip2", "opt", "t5"), lambda p: p.caption(IMAGES, decoding=SAMPLES, batch_size=2)),
    "answer": (("vqa", "opt", "t5"), lambda p: p.answer(IMAGES[0], TEXTS, decoding=BEAM)),
    "choose": (("vqa", "opt", "t5"), lambda p: p.answer(IMAGES[0], TEXTS, ["a dog", "a cat"])),
    "chat": (("opt", "t5"), lambda p: p.chat(IMAGES[0], "why?", decoding=BEAM)),
    "match": (("blip", "blip2"), lambda p: p.match(IMAGES, TEXTS, batch_size=2)),
    "match_matrix": (("blip", "blip2"), lambda p: p.match_matrix(IMAGES, TEXTS)),
    "similarity": (("blip", "blip2"), lambda p: p.similarity(IMAGES, TEXTS)),
    "embed_images": (("blip", "blip2"), lambda p: p.embed_images(IMAGES)),
    "embed_texts": (("blip", "blip2"), lambda p: p.embed_texts(TEXTS)),
    "score_texts": (("blip", "blip2"), lambda p: p.score_texts(IMAGES, [[text, "a dog"] for text in TEXTS])),
    "judge": (("nlvr",), lambda p: p.judge(IMAGES[:2], TEXTS[0])),
    "rank_answers": (("visdial",), lambda p: p.rank_answers(IMAGES[0], "a dog", ["what is it?"], ["a dog", "a cat"])),
    "features": (("blip", "blip2"), lambda p: vars(p.features(IMAGES, TEXTS))),
    "explain": (("blip", "lm", "vqa", "blip2"), lambda p: vars(p.explain(IMAGES[0], "a small dog"))),
    "explain itself": (("blip", "blip2", "opt", "t5"), lambda p: vars(p.explain(IMAGES[0]))),
    "encode": (("blip", "blip2"), lambda p: vars(p.encode(IMAGES))),
    "encode_videos": (("blip", "blip2"), lambda p: vars(p.encode_videos(VIDEO, num_frames=2))),
    "fingerprint": (("blip", "opt"), lambda p: p.fingerprint()),
}
VIDEO = random_video(0)


def in_threads(call: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(8) as pool:
        return [future.result() for future in [pool.submit(call) for _ in range(8)]]


def check_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        check_same(list(found.items()), list(expected.items()))
    elif isinstance(expected, list | tuple):
        for own, other in zip(found, expected, strict=True):
            check_same(own, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5)
    else:
        assert_same(found, expected)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for name, (kinds, _) in CALLS.items() for kind in kinds])
def test_eight_threads_get_what_one_gets(kind: str, name: str) -> None:
    predictor, call = PREDICTORS[kind], CALLS[name][1]
    expected = call(predictor)
    for found in in_threads(lambda: call(predictor)):
        check_same(found, expected)


@pytest.mark.parametrize("kind", PREDICTORS)
def test_an_explanation_leaves_the_model_as_it_was_also_when_it_fails(kind: str) -> None:
    predictor = PREDICTORS[kind]
    before = {name: dict(module.__dict__) for name, module in predictor.model.named_modules()}
    pixels = predictor.prepare(IMAGES[0])

    class BrokenError(Exception):
        pass

    def broken(*_: Any, **__: Any) -> Any:
        raise BrokenError

    for text in (None, "a small dog", " "):
        with contextlib.suppress(OpenBlipError):  # where there is no head for it, or no word in it
            predictor.explain(IMAGES[0], text)
    with pytest.MonkeyPatch.context() as patch:
        for part in ("text", "qformer"):
            if hasattr(predictor.model, part):
                patch.setattr(type(getattr(predictor.model, part)), "forward", broken)
        with contextlib.suppress(BrokenError, OpenBlipError):
            predictor.explain(pixels, "a small dog")
    after = {name: dict(module.__dict__) for name, module in predictor.model.named_modules()}
    assert after == before
    pickle.dumps(predictor.model)


def test_threads_may_share_a_file_and_an_image_that_is_not_loaded_yet(tmp_path: Path) -> None:
    predictor, path = PREDICTORS["blip"], tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(path)
    for opened in (Image.open(path), path.open("rb"), io.BytesIO(path.read_bytes())):
        with opened:
            results = in_threads(partial(predictor.prepare, opened))
        assert all(torch.equal(found, predictor.prepare(path)) for found in results)
