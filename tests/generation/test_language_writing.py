"""A language model of transformers writes what the project's own loop writes around it.

R rows, Q visual prompts, T text tokens, V vocabulary, Dl width of the language model.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from openblip.errors import CheckpointError, ConfigError
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus
from openblip.generation.language import best_texts, write_texts
from openblip.generation.search import Generated, generate
from openblip.models.language_model import LanguageModel
from tiny_blip import Uncached
from tiny_blip2 import LANGUAGE_DIM, Language, tiny_language_model
from written_texts import ids_of_transformers

START = 0
PROMPTS = ["a photo of", "", "Question: how many cats are there? Answer:"]
DECODINGS = [
    Greedy(max_new_tokens=7),
    Greedy(max_new_tokens=7, min_new_tokens=4, repetition_penalty=1.7),
    Beam(num_beams=3, max_new_tokens=7),
    Beam(num_beams=4, max_new_tokens=6, min_new_tokens=2, length_penalty=-1.0, repetition_penalty=1.7),
    Nucleus(top_p=0.9, temperature=1.3, max_new_tokens=7, min_new_tokens=2, repetition_penalty=1.7),
    Nucleus(top_p=0.9, top_k=9, temperature=1.3, max_new_tokens=12, no_repeat_ngram_size=1),
]
SEEDS = [5, 7, 11]


class Context:
    """Visual prompts (B, Q, Dl) with the text that follows each."""

    def __init__(self, visual: Tensor, prompts: Sequence[str]) -> None:
        self.visual = visual
        self.prompts = list(prompts)

    def select(self, index: Tensor) -> "Context":
        return Context(self.visual[index], [self.prompts[i] for i in index.tolist()])


class SlowDecoder(Uncached):
    """A language model in our own decoding, which reads everything anew, row by row.

    Its first token, START, stands for the prompt; the context holds visual prompts and their words.
    """

    def __init__(self, language: LanguageModel) -> None:
        self.language = language

    def decode(self, ids: Tensor, context_kv: Context) -> Tensor:
        logits = []
        for row, read in enumerate(ids.tolist()):
            written = [*read[1:], self.language.end_id]  # what the last token is does not matter
            own, prompt = context_kv.visual[row : row + 1], context_kv.prompts[row : row + 1]
            logits.append(self.language.predict_ids(own, prompt, [written]).logits[0, -1])
        return torch.stack(logits)[:, None]


def visual_prompts(count: int = 3) -> Tensor:
    return torch.randn(count, 4, LANGUAGE_DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["opt", "t5"])
def language(request: pytest.FixtureRequest) -> LanguageModel:
    kind: Language = request.param
    return tiny_language_model(kind)


def same(found: list[list[Generated]], expected: list[list[Generated]]) -> None:
    for own, others in zip(found, expected, strict=True):
        assert [text.ids for text in own] == [text.ids for text in others]
        for text, other in zip(own, others, strict=True):
            assert text.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)


@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_it_writes_what_the_loop_of_our_own_writes(language: LanguageModel, decoding: Decoding) -> None:
    """Prompts of different lengths, so that all but one row are padded."""
    num_captions = 1 if isinstance(decoding, Greedy) else 2
    found = write_texts(language, visual_prompts(), PROMPTS, decoding, num_captions=num_captions, seeds=SEEDS)
    with torch.inference_mode():
        expected = generate(
            SlowDecoder(language), Context(visual_prompts(), PROMPTS), torch.tensor([START]), 3, decoding,
            num_captions=num_captions, eos_id=language.end_id, seeds=SEEDS,
        )  # fmt: skip
    same(found, expected)
    assert len({tuple(text.ids) for own in found for text in own}) > 2


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_what_may_not_repeat_is_as_in_transformers(language: LanguageModel, size: int, num_beams: int) -> None:
    visual, settings = visual_prompts(), {"num_beams": num_beams, "max_new_tokens": 20}
    free, theirs = (
        ids_of_transformers(language, visual, PROMPTS, **settings, no_repeat_ngram_size=n) for n in (0, size)
    )
    found = write_texts(language, visual, PROMPTS, Beam(**settings, no_repeat_ngram_size=size))
    assert [text.ids for (text,) in found] == theirs != free


@pytest.mark.parametrize("decoding", [DECODINGS[1], DECODINGS[3], DECODINGS[4]], ids=str)
def test_a_row_does_not_depend_on_the_others(language: LanguageModel, decoding: Decoding) -> None:
    visual = visual_prompts()
    together = write_texts(language, visual, PROMPTS, decoding, seeds=SEEDS)
    alone = [write_texts(language, visual[i : i + 1], [PROMPTS[i]], decoding, seeds=[SEEDS[i]])[0] for i in range(3)]
    same(together, alone)


def test_a_seed_decides_what_is_sampled(language: LanguageModel) -> None:
    decoding = Nucleus(max_new_tokens=12, top_p=1.0, temperature=2.0)
    visual = visual_prompts(1).expand(2, -1, -1)
    (first, again), (other, _) = (
        [own[0].ids for own in write_texts(language, visual, ["a", "a"], decoding, seeds=seeds)]
        for seeds in ([1, 1], [2, 2])
    )
    assert first == again != other
    three = write_texts(language, visual[:1], ["a"], decoding, num_captions=3, seeds=[1])[0]
    assert three[0].ids == first
    assert len({tuple(text.ids) for text in three}) == 3


CANDIDATES = ["yes", "two", "a big green tree", "a small red dog", "two"]


def test_the_likeliest_candidate_is_found(language: LanguageModel) -> None:
    """Against every text's log-probability by itself, also where few are read at a time."""
    visual = visual_prompts()
    lists = [CANDIDATES, CANDIDATES[1:3], CANDIDATES[::-1]]
    for max_rows in (1, 3, 100):
        found = best_texts(language, visual, PROMPTS, lists, max_rows=max_rows)
        for row, (best, texts) in enumerate(zip(found, lists, strict=True)):
            expected = [logprob(language, visual[row : row + 1], PROMPTS[row], text) for text in texts]
            assert best.position == expected.index(max(expected))
            assert best.generated.logprob == pytest.approx(max(expected), abs=1e-4)

    # only likely beginnings are compared
    for row, best in enumerate(best_texts(language, visual, PROMPTS, [CANDIDATES] * 3, num_candidates=1)):
        own, prompt = visual[row : row + 1], PROMPTS[row]
        begin = [logprob(language, own, prompt, text, first_only=True) for text in CANDIDATES]
        assert begin[best.position] == pytest.approx(max(begin), abs=1e-5)


def logprob(language: LanguageModel, visual: Tensor, prompt: str, text: str, first_only: bool = False) -> float:
    """Of a text with its end, from `predict`; or of its first token."""
    with torch.inference_mode():
        predicted = language.predict(visual, [prompt], [text], None)
    keep = predicted.labels[0] >= 0
    logprobs = predicted.logits[0, keep].log_softmax(dim=-1)
    found = logprobs.gather(1, predicted.labels[0, keep][:, None]).squeeze(1)
    return float(found[0] if first_only else found.sum())


def test_requests_that_cannot_be_met_are_refused(language: LanguageModel) -> None:
    visual = visual_prompts(1)
    with pytest.raises(ConfigError, match="Greedy writes one"):
        write_texts(language, visual, ["a"], Greedy(), num_captions=2)
    with pytest.raises(ConfigError, match="num_candidates"):
        best_texts(language, visual, ["a"], [["b"]], num_candidates=0)
    assert write_texts(language, visual[:0], [], Greedy()) == []
    with pytest.raises(CheckpointError, match="not numbers"):
        write_texts(language, visual * torch.nan, ["a"], Greedy(max_new_tokens=2))
    if not language.is_encoder_decoder:
        with pytest.raises(ConfigError, match="reads at most 128"):
            write_texts(language, visual, ["a photo " * 80], Greedy())
