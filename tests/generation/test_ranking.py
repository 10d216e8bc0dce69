import itertools

import pytest
import torch
from tiny_decoders import EOS, PROMPT, HuggingFaceDecoder, Images, TableDecoder, numbered_images

from openblip.errors import ConfigError
from openblip.generation.ranking import rank_candidates

CANDIDATES = [[5], [6, 7, 8], [], [9, 4], [11, 11, 11, 11, 11]]


def test_a_score_is_the_sum_of_the_texts_log_probabilities() -> None:
    model = TableDecoder(0)
    scores = rank_candidates(model, numbered_images(3, 8), PROMPT, CANDIDATES, 2, eos_id=EOS)
    for (row, image), (column, ids) in itertools.product(enumerate([3, 8]), enumerate(CANDIDATES)):
        expected, read = 0.0, PROMPT.tolist()
        for token in [*ids, EOS]:
            logits = model.decode(torch.tensor([read]), numbered_images(image))[0, -1]
            expected += float(logits.log_softmax(-1)[token])
            read.append(token)
        assert float(scores[row, column]) == pytest.approx(expected, abs=1e-4)


def test_all_texts_of_a_length_have_probability_one_together() -> None:
    model = TableDecoder(1, vocab_size=4)
    texts = [list(ids) for n in range(7) for ids in itertools.product([0, 1, 3], repeat=n)]
    model.table[:, :, EOS] += 6.0
    scores = rank_candidates(model, numbered_images(2), PROMPT, texts, 1, eos_id=EOS)
    assert float(scores.double().exp().sum()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("candidates_per_pass", [1, 2, 5])
def test_scores_do_not_depend_on_the_pass_size(candidates_per_pass: int) -> None:
    model, images = (
        HuggingFaceDecoder(0),
        Images(torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))),
    )
    prompt = torch.tensor([3, 9, 10])
    whole = rank_candidates(model, images, prompt, CANDIDATES, 3, eos_id=EOS)
    parts = rank_candidates(
        model, images, prompt, CANDIDATES, 3, eos_id=EOS, candidates_per_pass=candidates_per_pass
    )
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert whole.shape == (3, 5)


def test_nothing_to_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="candidates"):
        rank_candidates(TableDecoder(0), numbered_images(0), PROMPT, [], 1, eos_id=EOS)
