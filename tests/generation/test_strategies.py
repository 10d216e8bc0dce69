import itertools
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openblip.errors import ConfigError
from openblip.generation.decoding import Beam, Greedy, Nucleus
from openblip.generation.search import adjust_scores, sample_nucleus, uniforms


def nucleus_by_hand(logits: list[float], top_p: float) -> list[int]:
    probs = np.exp(np.array(logits) - max(logits))
    probs /= probs.sum()
    kept: list[int] = []
    for token in sorted(range(len(logits)), key=lambda t: (-logits[t], t)):
        kept.append(token)
        if probs[kept].sum() >= top_p:
            break
    return kept


def test_tokens_come_as_often_as_the_nucleus_says() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    grid = (torch.arange(900) + 0.5) / 900
    tokens = sample_nucleus(logits.expand(900, -1), grid, top_p=0.85)
    assert torch.bincount(tokens, minlength=4).tolist() == [0, 400, 300, 200]


@pytest.mark.parametrize(("top_p", "allowed"), [(0.01, {1}), (0.4, {1}), (0.41, {1, 2}), (1.0, {0, 1, 2, 3})])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, allowed: set[int]) -> None:
    logits = torch.tensor([0.09375, 0.40625, 0.3125, 0.1875]).log()
    tokens = sample_nucleus(logits.expand(1000, -1), torch.arange(1000) / 1000, top_p)
    assert set(tokens.tolist()) == allowed


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-60, 60).map(lambda n: n / 8), min_size=1, max_size=12),
    top_p=st.floats(0.01, 1.0),
    uniform=st.integers(0, 2**24 - 1).map(lambda n: n / 2**24),
)
def test_a_sample_is_always_inside_the_nucleus(logits: list[float], top_p: float, uniform: float) -> None:
    token = int(sample_nucleus(torch.tensor([logits]), torch.tensor([uniform]), top_p))
    # top_p on the edge of the cumulative sum may round either way.
    allowed = nucleus_by_hand(logits, min(1.0, top_p + 1e-5))
    assert token in allowed


def test_impossible_tokens_are_never_sampled_and_a_set_that_reaches_top_p_exactly_is_enough() -> None:
    assert sample_nucleus(torch.zeros(1, 4), torch.tensor([0.99]), top_p=0.5).tolist() == [1]
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]]).expand(5, -1)
    tokens = sample_nucleus(logits, torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-24]), top_p=1.0)
    assert tokens.tolist() == [1, 1, 3, 3, 3]


def test_uniforms_are_a_function_of_seed_caption_and_step() -> None:
    table = uniforms([5, 6], 3, 8).reshape(2, 3, 8)
    assert np.array_equal(uniforms([6], 2, 4).reshape(2, 4), table[1, :2, :4])
    assert len(np.unique(table)) == table.size
    # the same in every version
    assert uniforms([0], 1, 3).tolist() == [[0.011546730995178223, 0.24154919385910034, 0.11142581701278687]]


def test_uniforms_are_uniform() -> None:
    table = uniforms(range(500), 2, 20)
    assert table.dtype == np.float32
    assert table.min() >= 0.0
    assert table.max() < 1.0
    assert np.bincount((table.ravel() * 10).astype(int), minlength=10) == pytest.approx(2000, rel=0.1)
    assert abs(np.corrcoef(table[:, 0], table[:, 1])[0, 1]) < 0.1
    assert abs(np.corrcoef(table[::2, 0], table[1::2, 0])[0, 1]) < 0.15


SCORES = torch.tensor([[0.5, -2.0, 1.5, -3.0], [1.0, 2.0, 3.0, 4.0]])


def test_the_penalty_makes_written_tokens_less_likely_whatever_their_sign_and_once() -> None:
    written = torch.tensor([[0, 1, 1], [3, 3, 3]])
    before = SCORES.clone()
    for length in (3, torch.tensor([3])):
        for ids in (written, torch.nn.functional.pad(written, (0, 2), value=2)):  # later ones do not count
            adjusted = adjust_scores(SCORES, ids, length, Greedy(repetition_penalty=2.0), eos_id=2)
            assert adjusted.tolist() == [[0.25, -4.0, 1.5, -3.0], [1.0, 2.0, 3.0, 2.0]]
    assert torch.equal(SCORES, before)


def test_the_end_is_impossible_until_enough_tokens_were_written() -> None:
    decoding = Greedy(min_new_tokens=2)
    tokens, before = torch.zeros(2, 5, dtype=torch.long), SCORES.clone()
    assert adjust_scores(SCORES, tokens, 1, decoding, eos_id=2)[:, 2].tolist() == [-torch.inf, -torch.inf]
    assert torch.equal(adjust_scores(SCORES, tokens, 2, decoding, eos_id=2), before)


def test_defaults_are_those_of_the_contract() -> None:
    common = {"max_new_tokens": 20, "min_new_tokens": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    assert vars(Greedy()) == common
    assert vars(Beam()) == {**common, "num_beams": 3, "length_penalty": 1.0}
    assert vars(Nucleus()) == {**common, "top_p": 0.9, "top_k": 0, "temperature": 1.0, "seed": None}


COMMON = [
    {"max_new_tokens": 0}, {"min_new_tokens": -1}, {"min_new_tokens": 21}, {"repetition_penalty": 0.0},
    {"repetition_penalty": float("nan")}, {"repetition_penalty": "1.1"}, {"max_new_tokens": 20.5},
    {"max_new_tokens": "20"}, {"max_new_tokens": True}, {"no_repeat_ngram_size": -1}, {"no_repeat_ngram_size": 2.0},
]  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "wrong"),
    [
        *itertools.product((Greedy, Beam, Nucleus), COMMON),
        (Beam, {"num_beams": 0}),
        (Beam, {"length_penalty": float("inf")}),
        (Nucleus, {"top_p": 0.0}),
        (Nucleus, {"top_p": 1.01}),
        (Nucleus, {"temperature": 0.0}),
        (Nucleus, {"temperature": float("inf")}),
        (Nucleus, {"top_k": -1}),
        (Nucleus, {"top_k": 0.5}),
        (Nucleus, {"seed": -1}),
    ],
)
def test_values_out_of_range_are_refused_by_name(strategy: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{strategy.__name__}: {next(iter(wrong))}"):
        strategy(**wrong)


def test_numbers_of_numpy_are_those_of_python() -> None:
    given = Nucleus(max_new_tokens=np.int64(5), top_p=np.float32(0.5), seed=np.uint8(1), temperature=2)  # type: ignore[arg-type]
    assert given == Nucleus(max_new_tokens=5, top_p=0.5, seed=1, temperature=2)
    assert {type(value) for value in vars(given).values()} == {int, float}


def test_strategies_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        Greedy().max_new_tokens = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Beam(5)  # type: ignore[misc]
