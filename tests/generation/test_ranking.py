"""Choosing from a list: by the whole log-probability, whatever the order, the passes and the doubles."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from tiny_decoders import EOS, PROMPT, VOCAB, HuggingFaceDecoder, Images, TableDecoder, numbered_images
from torch import Tensor

from marks import slow
from openblip.errors import CheckpointError, ConfigError
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus
from openblip.generation.search import Ranked, TextModel, best_candidates, generate
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig
from openblip.nn.config import TextConfig, VisionConfig
from tiny_blip import check_cached_decoding

CANDIDATES = [[5], [6, 7, 8], [], [9, 4], [11, 11, 11, 11, 11], [6, 7], [5, 5], [9]]


@torch.no_grad()
def logprobs(model: TextModel, image: Images, ids: Sequence[int], prompt: torch.Tensor) -> list[float]:
    """Token by token, one text of one image at a time."""
    found, read = [], prompt.tolist()
    for token in [*ids, EOS]:
        found.append(float(model.decode(torch.tensor([read]), image)[0, -1].log_softmax(-1)[token]))
        read.append(token)
    return found


def best_by_hand(model: TextModel, image: Images, candidates: Sequence[Sequence[int]]) -> int:
    totals = [sum(logprobs(model, image, ids, PROMPT)) for ids in candidates]
    return totals.index(max(totals))


@pytest.mark.parametrize("seed", range(4))
def test_the_best_has_the_highest_sum_over_its_tokens_and_the_end(seed: int) -> None:
    model = TableDecoder(seed)
    found = best_candidates(model, numbered_images(3, 8, 1), PROMPT, CANDIDATES, 3, eos_id=EOS)
    for image, ranked in zip([3, 8, 1], found, strict=True):
        assert ranked.position == best_by_hand(model, numbered_images(image), CANDIDATES)
        assert ranked.generated.ids == CANDIDATES[ranked.position]
        expected = logprobs(model, numbered_images(image), ranked.generated.ids, PROMPT)
        assert ranked.generated.token_logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_candidates", [1, 2, 3])
def test_only_those_with_likely_first_tokens_are_compared(num_candidates: int) -> None:
    """Two of three candidates begin alike, so with a limit of one both or the third are compared."""
    differed = False
    for seed, image in itertools.product(range(4), [1, 2, 3]):
        model, candidates = TableDecoder(seed), [[5, 6], [5, 7], [9, 4]]
        first = model.decode(PROMPT[None], numbered_images(image))[0, -1]
        kept = [0, 1] if first[5] > first[9] else [2]
        allowed = kept if num_candidates <= len(kept) else [0, 1, 2]
        best = best_by_hand(model, numbered_images(image), [candidates[i] for i in allowed])
        (found,) = best_candidates(
            model, numbered_images(image), PROMPT, candidates, 1, eos_id=EOS, num_candidates=num_candidates
        )
        assert found.position == allowed[best]
        differed |= found.position != best_by_hand(model, numbered_images(image), candidates)
    assert differed == (num_candidates < 3)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_the_list_decides_nothing(order: Sequence[int]) -> None:
    """Also where the limit falls between candidates that begin alike."""
    candidates = [[5, 6], [5, 7], [5, 8]]
    for seed in range(3):
        model = TableDecoder(seed)
        expected = best_by_hand(model, numbered_images(1), candidates)
        shuffled = [candidates[i] for i in order]
        (found,) = best_candidates(model, numbered_images(1), PROMPT, shuffled, 1, eos_id=EOS, num_candidates=1)
        assert shuffled[found.position] == candidates[expected]


def test_of_equal_candidates_the_first_counts_and_is_scored_once() -> None:
    kv = Images(torch.zeros(0, 1, 1))  # without contexts there are no answers
    assert best_candidates(TableDecoder(0), kv, PROMPT, CANDIDATES, 0, eos_id=EOS) == []
    model = TableDecoder(0)
    (found,) = best_candidates(model, numbered_images(1), PROMPT, [[5], [5], [5], [5]], 1, eos_id=EOS)
    assert found.position == 0
    assert model.rows_read == [1, 1]  # the beginnings, then the one text


def test_a_context_is_read_with_the_candidates_that_it_chose() -> None:
    """Contexts that keep different numbers of candidates, in one call and one by one."""
    model, images = TableDecoder(2), [1, 2, 3, 4, 5]

    def chosen(*numbers: int) -> list[Ranked]:
        kv = numbered_images(*numbers)
        return best_candidates(model, kv, PROMPT, CANDIDATES, len(numbers), eos_id=EOS, num_candidates=2)

    together, apart = chosen(*images), [chosen(image)[0] for image in images]
    assert [ranked.position for ranked in together] == [ranked.position for ranked in apart]
    assert len({ranked.position for ranked in apart}) > 1


@pytest.mark.parametrize("max_rows", [4, *slow(1, 9, 512)])
def test_the_choice_does_not_depend_on_the_passes(max_rows: int) -> None:
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    model, prompt = HuggingFaceDecoder(0), torch.tensor([3, 9, 10])
    candidates = [list(ids) for ids in itertools.product([5, 7, 9], repeat=2)] + CANDIDATES
    found = best_candidates(model, Images(tokens), prompt, candidates, 3, eos_id=EOS, max_rows=max_rows)
    for image, ranked in enumerate(found):
        one = Images(tokens[image : image + 1])
        totals = [sum(logprobs(model, one, ids, prompt)) for ids in candidates]
        assert ranked.position == totals.index(max(totals))
        assert ranked.generated.logprob == pytest.approx(max(totals), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidate_ids": []}, "no candidates"),
        ({"num_candidates": 0}, "num_candidates is 0"),
        ({"prompt_ids": PROMPT[:0]}, "prompt_ids"),
        ({"prompt_ids": PROMPT[None]}, "prompt_ids"),
    ],
)
def test_what_cannot_be_ranked_is_refused(arguments: dict[str, object], message: str) -> None:
    settings = {"prompt_ids": PROMPT, "candidate_ids": CANDIDATES, "num_candidates": 2, **arguments}
    with pytest.raises(ConfigError, match=message):
        best_candidates(TableDecoder(0), numbered_images(0), num_contexts=1, eos_id=EOS, **settings)  # type: ignore[arg-type]


def test_logits_that_are_not_numbers_are_reported() -> None:
    model = TableDecoder(0)
    model.table = torch.full((64, VOCAB, VOCAB), torch.nan)
    with pytest.raises(CheckpointError, match="not numbers"):
        best_candidates(model, numbered_images(0), PROMPT, CANDIDATES, 1, eos_id=EOS)


# --- Over the real model, with caches

BLIP_PROMPT = torch.tensor([3, 7])


@pytest.fixture(scope="module")
def model() -> Blip:
    torch.manual_seed(0)
    vision = VisionConfig(image_size=32, hidden_dim=32, num_layers=1, num_heads=2, mlp_dim=64)
    text = TextConfig(vocab_size=40, hidden_dim=32, num_layers=2, num_heads=4, mlp_dim=64, max_positions=32)
    model = Blip(BlipConfig(vision=vision, text=text, heads=("lm",))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model


@pytest.fixture(scope="module")
def image_tokens(model: Blip) -> Tensor:
    with torch.no_grad():
        return model.encode_image(torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("decoding", "num_captions"),
    [(Greedy(), 1), (Beam(num_beams=4, min_new_tokens=3), 4), (Nucleus(seed=2, repetition_penalty=1.1), 3)],
)
def test_cached_equals_uncached(model: Blip, image_tokens: Tensor, decoding: Decoding, num_captions: int) -> None:
    image_kv = model.image_kv(image_tokens, "decode")
    check_cached_decoding(model, image_kv, BLIP_PROMPT, decoding, num_captions, EOS)


def test_ranking_gives_a_written_text_the_score_it_was_written_with(model: Blip, image_tokens: Tensor) -> None:
    image_kv = model.image_kv(image_tokens, "decode")
    texts = generate(model, image_kv, BLIP_PROMPT, 5, Beam(num_beams=3, max_new_tokens=25), num_captions=3, eos_id=EOS)
    ended = [(i, t) for i, of in enumerate(texts) for t in of if len(t.token_logprobs) > len(t.ids)]
    assert len(ended) > 0
    for image, text in ended:
        own_kv = image_kv.select(torch.tensor([image]))
        (ranked,) = best_candidates(model, own_kv, BLIP_PROMPT, [text.ids], 1, eos_id=EOS)
        assert ranked.generated.ids == text.ids
        assert ranked.generated.token_logprobs == pytest.approx(text.token_logprobs, abs=1e-4)
