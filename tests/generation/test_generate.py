import itertools
from typing import Any

import pytest
import torch
from tiny_decoders import DEC, EOS, PROMPT, TableDecoder, numbered_images
from torch import Tensor

from openblip.errors import CheckpointError, ConfigError
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus
from openblip.generation.search import Generated, derive_seeds, generate

STRATEGIES = [Greedy(), Beam(), Beam(length_penalty=0.0), Nucleus(top_p=0.95)]


def write(model: Any, images: list[int], decoding: Decoding, **settings: Any) -> list[list[Generated]]:
    return generate(model, numbered_images(*images), PROMPT, len(images), decoding, eos_id=EOS, **settings)


def logprobs_of(model: TableDecoder, image: int, ids: list[int]) -> Tensor:
    """The model's own log-probabilities (T,) of ids after the prompt, in one uncached pass."""
    full = torch.cat([PROMPT, torch.tensor(ids)])[None]
    return model.decode(full[:, :-1], numbered_images(image))[0].log_softmax(-1).gather(1, full[0, 1:, None])[:, 0]


@pytest.mark.parametrize("decoding", [*STRATEGIES, Beam(num_beams=2, length_penalty=3.0)], ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_a_text_does_not_depend_on_its_batch(decoding: Decoding, seed: int) -> None:
    model, images = TableDecoder(seed), list(range(9))
    seeds = [1000 + i for i in images]
    together = write(model, images, decoding, seeds=seeds)
    alone = [write(model, [i], decoding, seeds=[1000 + i])[0] for i in images]
    backwards = write(model, images[::-1], decoding, seeds=seeds[::-1])[::-1]
    assert together == alone == backwards
    assert len({len(texts[0].ids) for texts in together}) > 1, "texts must end at different steps"


@pytest.mark.parametrize(
    ("decoding", "num_captions"), [(Greedy(), 1), (Beam(num_beams=4), 4), (Nucleus(top_p=0.95, seed=3), 4)]
)
def test_logprobs_are_the_models_own_and_count_the_end(decoding: Decoding, num_captions: int) -> None:
    model, ended = TableDecoder(5), set()
    changed = type(decoding)(**{**vars(decoding), "min_new_tokens": 2, "repetition_penalty": 1.2})
    for strategy in (decoding, changed):
        for image, texts in enumerate(write(model, list(range(6)), strategy, num_captions=num_captions)):
            for text in texts:
                has_end = len(text.token_logprobs) == len(text.ids) + 1
                assert has_end or len(text.ids) == len(text.token_logprobs) == 20
                expected = logprobs_of(model, image, text.ids + [EOS] * has_end)
                assert torch.tensor(text.token_logprobs) == pytest.approx(expected, abs=1e-5)
                assert text.logprob == pytest.approx(float(expected.sum()), abs=1e-4)
                ended.add(has_end)
    assert ended == {True, False} or num_captions == 1


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_texts(length_penalty: float) -> None:
    for seed in range(5):
        model = TableDecoder(seed, vocab_size=5)
        every = [list(ids) for n in range(4) for ids in itertools.product([0, 1, 3, 4], repeat=n)]
        candidates = [ids + [EOS] * (len(ids) < 3) for ids in every]  # the third token may be anything but longer
        candidates += [[*ids, EOS] for ids in every if len(ids) == 2]
        scores = [float(logprobs_of(model, 1, ids).sum()) / len(ids) ** length_penalty for ids in candidates]
        best = candidates[max(range(len(scores)), key=scores.__getitem__)]
        decoding = Beam(num_beams=64, max_new_tokens=3, length_penalty=length_penalty)
        assert write(model, [1], decoding)[0][0].ids == [token for token in best if token != EOS]


@pytest.mark.parametrize("decoding", STRATEGIES, ids=repr)
def test_minimum_and_maximum_length(decoding: Decoding) -> None:
    free = {len(texts[0].ids) for texts in write(TableDecoder(1), list(range(40)), decoding)}
    limited = type(decoding)(**{**vars(decoding), "min_new_tokens": 4, "max_new_tokens": 6})
    lengths = {len(texts[0].ids) for texts in write(TableDecoder(1), list(range(40)), limited)}
    assert min(free) < min(lengths) >= 4
    assert max(lengths) == 6 < max(free)
    one = type(decoding)(**{**vars(decoding), "max_new_tokens": 1})
    assert all(len(texts[0].token_logprobs) == 1 for texts in write(TableDecoder(1), [0, 1, 2], one))
    model = TableDecoder(0)
    model.table[:, DEC, EOS] = 50.0  # a text that ends at once is empty
    assert write(model, [0, 1], decoding)[1][0].ids == []


def test_several_captions_from_beams_are_the_best_ones_in_order() -> None:
    model, images = TableDecoder(2), [0, 1, 2, 3, 4]
    four = write(model, images, Beam(num_beams=4), num_captions=4)
    assert write(model, images, Beam(num_beams=4), num_captions=2) == [texts[:2] for texts in four]
    for texts in four:
        scores = [text.logprob / len(text.token_logprobs) for text in texts]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(text.ids) for text in texts}) == 4


def test_a_sampled_caption_does_not_depend_on_how_many_are_sampled() -> None:
    model, images, seeds = TableDecoder(3), [4, 5, 6], [7, 8, 9]
    five = write(model, images, Nucleus(), num_captions=5, seeds=seeds)
    assert [texts[:2] for texts in five] == write(model, images, Nucleus(), num_captions=2, seeds=seeds)
    assert len({tuple(text.ids) for texts in five for text in texts}) > 10


def test_seeds_decide_the_samples() -> None:
    model, many, images = TableDecoder(4), [1] * 40, [1, 1, 1]
    assert write(model, images, Nucleus(seed=5)) == write(model, images, Nucleus(seed=5))
    assert write(model, many, Nucleus(seed=5)) != write(model, many, Nucleus(seed=6))
    assert write(model, many, Nucleus()) != write(model, many, Nucleus())
    assert write(model, images, Nucleus(seed=5)) == write(model, images, Nucleus(), seeds=derive_seeds(5, 3))
    first, second, _ = write(model, images, Nucleus(), seeds=[-1, 2**64 - 1, 10**30])
    assert first == second, "seeds count modulo 2**64"
    assert derive_seeds(5, 2) == derive_seeds(5, 9)[:2]


def test_the_callers_random_state_and_gradients_are_left_alone() -> None:
    before, model = torch.get_rng_state(), TableDecoder(0)
    model.table.requires_grad_()
    for decoding in STRATEGIES:
        write(model, [0, 1], decoding)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "decoding", [Greedy(min_new_tokens=1), Beam(num_beams=3), Nucleus(seed=0, min_new_tokens=1)], ids=repr
)
def test_the_prompt_is_read_once_per_image_and_finished_images_are_dropped(decoding: Decoding) -> None:
    model = TableDecoder(1)
    write(model, list(range(12)), decoding)
    rows = getattr(decoding, "num_beams", 1)
    assert model.rows_read[:2] == [12, 12 * rows]
    assert model.rows_read[-1] < 12 * rows
    assert model.rows_read[1:] == sorted(model.rows_read[1:], reverse=True)


@pytest.mark.parametrize("decoding", STRATEGIES, ids=repr)
def test_logits_that_are_not_numbers_are_reported(decoding: Decoding) -> None:
    model = TableDecoder(0)
    model.table[:, 7] = torch.nan
    model.table[:, DEC, 7] = 50.0
    with pytest.raises(CheckpointError, match="float32"):
        write(model, [0, 1], decoding)


@pytest.mark.parametrize(
    ("decoding", "settings", "message"),
    [
        (Greedy(), {"num_captions": 2}, "Greedy"),
        (Beam(num_beams=2), {"num_captions": 3}, "num_beams"),
        (Nucleus(), {"num_captions": 0}, "num_captions"),
        (Nucleus(), {"seeds": [1]}, "1 seeds for 2 images"),
        ("beam", {}, r"decoding is 'beam': give openblip.Beam\(\)"),
        (Beam, {}, "decoding is <class.*Beam"),
    ],
)
def test_what_cannot_be_is_refused(decoding: Decoding, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(TableDecoder(0), [0, 1], decoding, **settings)


def test_an_empty_prompt_is_refused_and_no_image_gives_no_text() -> None:
    with pytest.raises(ConfigError, match="prompt_ids"):
        generate(TableDecoder(0), numbered_images(0), PROMPT[:0], 1, Greedy(), eos_id=EOS)
    assert write(TableDecoder(0), [], Greedy()) == []
