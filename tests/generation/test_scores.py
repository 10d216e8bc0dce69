import torch

from openblip.generation.decoding import Greedy
from openblip.generation.search import adjust_scores

SCORES = torch.tensor([[0.5, -2.0, 1.5, -3.0], [1.0, 2.0, 3.0, 4.0]])


def test_the_penalty_makes_written_tokens_less_likely_whatever_their_sign_and_once() -> None:
    written = torch.tensor([[0, 1, 1], [3, 3, 3]])
    adjusted = adjust_scores(SCORES, written, Greedy(repetition_penalty=2.0), eos_id=2)
    assert adjusted.tolist() == [[0.25, -4.0, 1.5, -3.0], [1.0, 2.0, 3.0, 2.0]]


def test_the_end_is_impossible_until_enough_tokens_were_written() -> None:
    decoding = Greedy(min_new_tokens=2)
    one, two = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long)
    assert adjust_scores(SCORES, one, decoding, eos_id=2)[:, 2].tolist() == [-torch.inf, -torch.inf]
    assert torch.equal(adjust_scores(SCORES, two, decoding, eos_id=2), SCORES)


def test_the_scores_given_are_not_changed() -> None:
    before = SCORES.clone()
    adjust_scores(SCORES, torch.tensor([[0], [1]]), Greedy(min_new_tokens=5, repetition_penalty=3.0), eos_id=2)
    assert torch.equal(SCORES, before)
