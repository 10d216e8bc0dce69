"""Answers: from the question's states, whatever stands beside it in the batch; or the likeliest of a list."""

from typing import Any

import pytest
import torch
from tiny_predictor import IMAGES, TOKENIZER, check_batches, image_tokens, make_predictor, tokens_from_enc

import openblip
from openblip.errors import ConfigError, ImageError
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus
from openblip.predictor import BlipPredictor, ScoredText
from tiny_blip import TINY

QUESTIONS = [
    "what is beside the tree?",
    "a dog?",
    "how many small green birds are below the big red tree",
    "cat",
    "is it blue?",
]
ANSWERS = ["yes", "no", "a dog", "a dog beside a tree", "two", "2", "a", "red", "blue cars"]
DECODINGS: dict[str, Decoding] = {
    "greedy": Greedy(max_new_tokens=6),
    "beam": Beam(num_beams=3, max_new_tokens=10, min_new_tokens=1),
    "nucleus": Nucleus(top_p=0.95, max_new_tokens=6, seed=5),
}
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"decoding": decoding} for name, decoding in DECODINGS.items()},
    "list": {"candidates": ANSWERS},
    "shortlist": {"candidates": ANSWERS, "num_candidates": 2},
    "own lists": {"candidates": [ANSWERS[i : i + 4] for i in range(5)]},
}


@pytest.fixture(scope="module")
def predictor() -> BlipPredictor:
    return make_predictor("vqa")


def question_logits(predictor: BlipPredictor, image: int, question: str, written: list[int]) -> torch.Tensor:
    """Logits (V,) of the next token of an answer, by the parts of the model: one question, no padding."""
    model = predictor.model
    tokens = tokens_from_enc(question)
    with torch.no_grad():
        image_kv = model.image_kv(image_tokens(predictor, IMAGES[image]), "encode")
        states = model.text(tokens.ids, "encode", context_kv=image_kv.layers)
        kv = model.text.context_kv(states, "decode")
        ids = torch.tensor([[TOKENIZER.dec_id, *written]])
        hidden = model.text(ids, "decode", context_kv=kv)
        logits: torch.Tensor = model.text.predict_words(hidden)[0, -1]
    return logits


def test_an_answer_goes_on_from_the_states_of_its_question(predictor: BlipPredictor) -> None:
    found = predictor.answer(IMAGES, QUESTIONS, decoding=DECODINGS["greedy"], return_scores=True)
    assert len({answer.text for answer in found}) > 1
    for image, (question, answer) in enumerate(zip(QUESTIONS, found, strict=True)):
        written: list[int] = []
        while len(written) < 6 and TOKENIZER.sep_id not in written:
            logits = question_logits(predictor, image, question, written)
            written.append(int(logits.argmax()))
            logprob = float(logits.log_softmax(0).max())
            assert answer.token_logprobs[len(written) - 1] == pytest.approx(logprob, abs=1e-4)
        assert answer.tokens == tuple(TOKENIZER.pieces(written))


@pytest.mark.parametrize("way", WAYS)
def test_answers_do_not_depend_on_batches_order_or_padding(predictor: BlipPredictor, way: str) -> None:
    """Trap of the released code: its mask lets answers see the padding of their question."""
    settings = WAYS[way]

    def answers(images: Any, questions: list[str], lists: Any, batch_size: int | None) -> list[ScoredText]:
        own = {**settings, "candidates": lists} if way == "own lists" else settings
        return predictor.answer(images, questions, batch_size=batch_size, return_scores=True, **own)

    lists = settings["candidates"] if way == "own lists" else [None] * 5
    expected = check_batches(answers, IMAGES, QUESTIONS, lists)
    assert len({round(answer.logprob, 2) for answer in expected}) > 1


@pytest.mark.parametrize("way", WAYS)
def test_many_questions_about_one_image_encode_it_once(
    predictor: BlipPredictor, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predictor.answer([IMAGES[2]] * 5, QUESTIONS, **WAYS[way])
    encode, calls = predictor.model.encode_image, []
    monkeypatch.setattr(predictor.model, "encode_image", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    assert predictor.answer(IMAGES[2], QUESTIONS, batch_size=2, **WAYS[way]) == expected
    assert calls == [1]
    encoded = predictor.encode(IMAGES[2])
    assert predictor.answer(encoded, QUESTIONS, **WAYS[way]) == expected


def test_one_in_one_out(predictor: BlipPredictor) -> None:
    answer = predictor.answer(IMAGES[0], QUESTIONS[0])
    assert isinstance(answer, str)
    assert predictor.answer([IMAGES[0]], QUESTIONS[0]) == [answer]
    assert predictor.answer(IMAGES[0], QUESTIONS[:1]) == [answer]
    scored = predictor.answer(IMAGES[0], QUESTIONS[0], return_scores=True)
    assert isinstance(scored, ScoredText)
    assert scored.text == answer
    assert predictor.answer([], []) == predictor.answer([], [], candidates=ANSWERS) == []


def test_the_chosen_answer_is_the_likeliest_as_it_stands_in_the_list(predictor: BlipPredictor) -> None:
    found = predictor.answer(IMAGES, QUESTIONS, candidates=["Two", *ANSWERS], return_scores=True)
    for image, (question, answer) in enumerate(zip(QUESTIONS, found, strict=True)):
        scores = {}
        for text in ["Two", *ANSWERS]:
            ids, total = [*TOKENIZER.prompt(text).tolist()[1:], TOKENIZER.sep_id], 0.0
            for step, token in enumerate(ids):
                logits = question_logits(predictor, image, question, ids[:step])
                total += float(logits.log_softmax(0)[token])
            scores[text] = total
        assert answer.text == max(scores, key=lambda text: scores[text])  # of equal ones the first
        assert answer.logprob == pytest.approx(max(scores.values()), abs=1e-4)


def test_own_lists_are_the_lists_of_their_questions(predictor: BlipPredictor) -> None:
    lists = [["red"], ["blue", "green"], ["yes"], ["no", "yes"], ["a dog"]]
    found = predictor.answer(IMAGES, QUESTIONS, candidates=lists)
    assert all(answer in own for answer, own in zip(found, lists, strict=True))
    for i in range(5):
        assert predictor.answer(IMAGES[i], QUESTIONS[i], candidates=lists[i]) == found[i]


def test_questions_are_read_as_training_reads_them(predictor: BlipPredictor) -> None:
    def logprob(question: str, model: BlipPredictor = predictor) -> float:
        found: ScoredText = model.answer(IMAGES[0], question, candidates="yes", return_scores=True)
        return found.logprob

    assert logprob("What is IT: a (dog)?") == logprob("what is it a dog?") != logprob("what is it a dog")
    assert logprob("a dog " * 200) == pytest.approx(logprob("a dog " * 25), abs=1e-6)
    plain = make_predictor("vqa", encoder_token="[CLS]")
    assert logprob("a dog?", plain) != pytest.approx(logprob("a dog?"), abs=1e-3)


def test_samples_follow_their_seed_and_question(predictor: BlipPredictor) -> None:
    settings = Nucleus(max_new_tokens=8, seed=1)
    asked = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]]
    found = predictor.answer(IMAGES[0], asked, decoding=settings, return_scores=True)
    assert found[0].tokens == found[2].tokens
    other = predictor.answer(IMAGES, QUESTIONS, decoding=Nucleus(max_new_tokens=8, seed=2))
    assert other != predictor.answer(IMAGES, QUESTIONS, decoding=settings)


def test_what_cannot_be_read_or_written_is_refused(predictor: BlipPredictor) -> None:
    longest = TINY.text.max_positions
    predictor.answer(IMAGES[0], "a dog?", decoding=Greedy(max_new_tokens=longest))
    with pytest.raises(ConfigError, match=f"ask for {longest} or fewer"):
        predictor.answer(IMAGES[0], "a dog?", decoding=Greedy(max_new_tokens=longest + 1))
    with pytest.raises(ImageError, match="image 3"):
        predictor.answer([*IMAGES[:3], b"no image"], QUESTIONS[:4], batch_size=2)


def test_answers_in_half_precision(predictor: BlipPredictor, tmp_path: Any) -> None:
    predictor.save(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        half = openblip.load(tmp_path, device="cpu", dtype=dtype)
        found = half.answer(IMAGES, QUESTIONS, candidates=ANSWERS, return_scores=True)
        exact = predictor.answer(IMAGES, QUESTIONS, candidates=ANSWERS, return_scores=True)
        assert [a.logprob for a in found] == pytest.approx([a.logprob for a in exact], abs=0.5)
        assert len(half.answer(IMAGES, QUESTIONS)) == 5
