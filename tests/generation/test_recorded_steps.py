"""Recorded steps without CUDA: a stand-in for a graph repeats its operations on the same memory, as a graph does."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Thread
from typing import Any
from weakref import ref

import pytest
import torch

from openblip.generation import steps
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus
from openblip.generation.search import generate
from openblip.models.blip import Blip
from openblip.models.decoder import CachedDecoder
from tiny_blip import DEC, SEP, random_pixels, tiny_blip

STRATEGIES = [
    (Greedy(), 1),
    (Greedy(min_new_tokens=3, repetition_penalty=1.5, no_repeat_ngram_size=1), 1),
    (Beam(), 2),
    (Beam(num_beams=2, min_new_tokens=2, length_penalty=2.0, repetition_penalty=1.2), 1),
    (Nucleus(top_p=0.9, temperature=1.2, seed=3), 3),
    (Nucleus(top_p=0.9, top_k=5, seed=3, min_new_tokens=1), 1),
]


class Recorder:
    """Runs the function twice, and repeats it later; the numbers of images are noted, and may fail."""

    recorded: list[int]
    replayed = 0
    fails = False

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, function: Callable[[], None], reset: Callable[[], None]) -> Callable[[], None]:
        if Recorder.fails:
            raise RuntimeError("no capture today")
        for _ in range(2):
            reset()
            function()
        Recorder.recorded.append(1)

        def replay() -> None:
            Recorder.replayed += 1
            function()

        return replay


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    Recorder.recorded, Recorder.replayed, Recorder.fails = [], 0, False
    monkeypatch.setattr(steps, "GraphRecorder", Recorder)
    monkeypatch.setattr(steps, "_can_record", lambda each: isinstance(each.decoder, CachedDecoder))
    yield Recorder
    assert not steps._in_use.locked()


@pytest.fixture
def model() -> Blip:
    model = tiny_blip(("lm",))
    with torch.no_grad():
        model.text.lm_head.bias[SEP] += 2.0  # so that texts end at different times
    return model


@torch.no_grad()
def image_kv(model: Blip, count: int, seed: int = 0) -> Any:
    return model.image_kv(model.encode_image(random_pixels(count, seed)), "decode")


def write(model: Blip, kv: Any, decoding: Decoding, num_captions: int = 1, prompt: tuple[int, ...] = (DEC, 7)) -> Any:
    count = len(kv.layers[0].key)
    return generate(model, kv, torch.tensor(prompt), count, decoding, num_captions=num_captions, eos_id=SEP)


def plainly(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **settings: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(steps, "_can_record", lambda each: False)
        return write(*arguments, **settings)


@pytest.mark.parametrize(("decoding", "num_captions"), STRATEGIES, ids=str)
def test_recorded_steps_write_what_plain_steps_write(
    model: Blip, decoding: Decoding, num_captions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, of other images, with other seeds, as images leave; what the caller has is not touched."""
    lengths = set()
    for seed in range(4):
        kv = image_kv(model, 12, seed)
        before = [layer.key.clone() for layer in kv.layers]
        seeded = replace(decoding, seed=seed) if isinstance(decoding, Nucleus) else decoding
        expected = plainly(monkeypatch, model, kv, seeded, num_captions)
        assert write(model, kv, seeded, num_captions) == expected
        assert all(torch.equal(layer.key, key) for layer, key in zip(kv.layers, before, strict=True))
        assert (Recorder.replayed > 0) == (seed > 0)  # from the second time on
        lengths |= {len(text.ids) for texts in expected for text in texts}
    assert len(lengths) > 2
    assert 1 < len(Recorder.recorded) <= 6, "a few numbers of images"


def test_other_shapes_settings_and_weights_are_other_recordings(model: Blip, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(kv: Any, decoding: Decoding, **settings: Any) -> bool:
        """Whether steps were replayed; the second time they are."""
        expected = plainly(monkeypatch, model, kv, decoding, **settings)
        Recorder.replayed = 0
        assert write(model, kv, decoding, **settings) == expected
        return Recorder.replayed > 0

    kv, other_kv, greedy = image_kv(model, 5), image_kv(model, 3), Greedy()
    assert [check(kv, greedy) for _ in range(2)] == [False, True]
    assert [check(kv, greedy, prompt=(DEC, 7, 9)) for _ in range(2)] == [False, True]
    assert [check(other_kv, greedy) for _ in range(2)] == [False, True]
    assert [check(kv, Greedy(repetition_penalty=1.5)) for _ in range(2)] == [False, True]
    assert check(kv, greedy), "four shapes are kept"
    assert [check(kv, Greedy(max_new_tokens=5)) for _ in range(2)] == [False, True]
    assert not check(kv, greedy, prompt=(DEC, 7, 9)), "the shape that was not used for longest is forgotten"
    with torch.no_grad():
        model.text.lm_head.transform.weight.mul_(1.5)  # in its place, as an optimizer does
    assert check(kv, greedy)
    model.text.lm_head.transform.weight = torch.nn.Parameter(model.text.lm_head.transform.weight * 2)
    assert [check(kv, greedy) for _ in range(2)] == [False, True]


def test_models_are_not_kept_alive() -> None:
    model = tiny_blip(("lm",))
    kv = image_kv(model, 2)
    for _ in range(2):
        write(model, kv, Greedy())
    assert model.text in steps._by_model
    alive = ref(model.text)
    del model
    gc.collect()  # of modules, which refer to themselves
    assert alive() is None


def test_without_a_recording_texts_are_written_all_the_same(model: Blip, monkeypatch: pytest.MonkeyPatch) -> None:
    """When recording fails, which is said once, and while another thread has the recorded steps."""
    kv = image_kv(model, 2)
    expected = plainly(monkeypatch, model, kv, Greedy())
    Recorder.fails = True
    assert write(model, kv, Greedy()) == expected
    with pytest.warns(UserWarning, match="no capture today"):
        assert write(model, kv, Greedy()) == expected
    assert write(model, kv, Greedy()) == expected
    Recorder.fails = False
    for _ in range(2):
        write(model, kv, Greedy(max_new_tokens=9))
    replayed, texts = Recorder.replayed, []
    with steps._in_use:
        thread = Thread(target=lambda: texts.append(write(model, kv, Greedy(max_new_tokens=9))))
        thread.start()
        thread.join()
    assert (Recorder.replayed, texts) == (replayed, [plainly(monkeypatch, model, kv, Greedy(max_new_tokens=9))])
