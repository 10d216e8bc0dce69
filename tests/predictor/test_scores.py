"""Statements about two images, answers of dialogs, and all texts of an image: only what is read decides."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_predictor import (
    IMAGES,
    TEXTS,
    TOKENIZER,
    assert_same,
    blip2_predictor,
    check_batches,
    image_tokens,
    make_predictor,
    tokens_from_enc,
)

from marks import slow
from openblip.errors import CheckpointError, ImageError, UnsupportedTaskError
from openblip.generation.decoding import Greedy
from openblip.predictor import BasePredictor, BlipPredictor, TextScore, blip
from openblip.predictor.values import MAX_TEXTS_PER_IMAGE

PAIRS = [(IMAGES[i], IMAGES[(2 * i + 1) % 5]) for i in range(5)]


@pytest.fixture(scope="module")
def judge() -> BlipPredictor:
    return make_predictor("nlvr")


def test_a_judgement_is_the_softmax_of_the_logits_after_enc(judge: BlipPredictor) -> None:
    found = judge.judge(PAIRS, TEXTS)
    assert found.shape == (5,)
    assert found.dtype == torch.float32
    for (left, right), text, probability in zip(PAIRS, TEXTS, found, strict=True):
        tokens = tokens_from_enc(text)
        both = torch.stack([image_tokens(judge, left), image_tokens(judge, right)], dim=1)
        with torch.no_grad():
            logits = judge.model.judge_logits(tokens.ids, tokens.mask, judge.model.image_kv(both, "encode"))
        assert_same(probability, logits.softmax(dim=1)[0, 1])


def test_judgements_do_not_depend_on_batches_order_or_padding(judge: BlipPredictor) -> None:
    expected = check_batches(judge.judge, PAIRS, TEXTS)
    assert expected.std() > 1e-3
    swapped = judge.judge([(right, left) for left, right in PAIRS], TEXTS)
    assert not torch.allclose(swapped, expected, atol=1e-3)


def test_one_pair_or_lists_as_pairs(judge: BlipPredictor) -> None:
    one = judge.judge(PAIRS[0], TEXTS[0])
    assert one.shape == (1,)
    assert torch.equal(judge.judge(list(PAIRS[0]), [TEXTS[0]]), one)
    assert torch.equal(judge.judge([list(PAIRS[0])], TEXTS[0]), one)
    assert judge.judge([], []).shape == (0,)
    assert judge.judge(PAIRS[0], "a dog beside " * 100).shape == (1,), "a long statement is cut, not refused"


def test_an_unreadable_image_is_named_with_its_side(judge: BlipPredictor, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"pair 2 \(right\)"):
        judge.judge([*PAIRS[:2], (IMAGES[0], b"no image")], TEXTS[:3], batch_size=2)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png \(left\)"):
        judge.judge([(broken, Image.new("RGB", (8, 8)))], TEXTS[0])


DIALOGS: list[list[Any]] = [
    ["what is it?"],
    [("is it blue?", "yes"), "how many cars?"],
    [("a", "b"), ("c", "d"), "is it big?"],
    ["is it red? no", "is it green?"],
    [("is it a tree", "yes"), "where?"],
]
CANDIDATES = [["a dog", "a cat", "tree"], ["two"], ["yes", "no, it is a small cat"], [], ["below", "beside"]]


@pytest.fixture(scope="module", params=[("visdial",), ("itc", "itm", "visdial")], ids="+".join)
def ranker(request: pytest.FixtureRequest) -> BlipPredictor:
    return make_predictor(*request.param)


def test_an_answer_is_read_behind_its_dialog_with_image_and_caption(ranker: BlipPredictor) -> None:
    found = ranker.rank_answers(IMAGES, TEXTS, DIALOGS, CANDIDATES)
    assert [len(scores) for scores in found] == [3, 1, 2, 0, 2]
    assert ranker.rank_answers([], [], [], []) == []
    turns = ["is it blue? yes", "how many cars? two"]
    ids = [word for turn in turns for word in (*TOKENIZER.prompt(turn).tolist()[1:], TOKENIZER.sep_id)]
    caption = TOKENIZER.encode([TEXTS[1]])
    model = ranker.model
    with torch.no_grad():
        kv = model.dialog_kv(image_tokens(ranker, IMAGES[1]), caption.ids, caption.mask)
        whole = torch.tensor([[TOKENIZER.enc_id, *ids]])
        logits = model.match_logits(whole, torch.ones_like(whole, dtype=torch.bool), kv)
    assert_same(found[1], logits.softmax(dim=1)[:, 1])
    assert found[1].dtype == torch.float32


def test_scores_do_not_depend_on_batches_order_or_padding(
    ranker: BlipPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = check_batches(ranker.rank_answers, IMAGES, TEXTS, DIALOGS, CANDIDATES)
    assert torch.cat(expected).std() > 1e-3
    monkeypatch.setattr(blip, "MAX_ROWS", 8)  # two answers at a time
    found = ranker.rank_answers(ranker.encode(IMAGES), TEXTS, DIALOGS, CANDIDATES)
    for scores, whole in zip(found, expected, strict=True):
        assert_same(scores, whole)


def test_candidates_are_scored_apart(ranker: BlipPredictor) -> None:
    together = ranker.rank_answers(IMAGES[0], TEXTS[0], DIALOGS[2], ["yes", "no", "a small cat"])
    assert isinstance(together, torch.Tensor)
    alone = ranker.rank_answers(IMAGES[0], TEXTS[0], DIALOGS[2], ["a small cat"])
    assert_same(together[2:], alone)


def test_a_long_dialog_loses_its_oldest_rounds(ranker: BlipPredictor) -> None:
    def score(start: str) -> torch.Tensor:
        long = [(start, "yes"), *[("is it a big red tree?", "no")] * 20, "where?"]
        found: torch.Tensor = ranker.rank_answers(IMAGES[0], "a dog", long, ["beside", "below"])
        return found

    assert torch.equal(score("is it blue?"), score("what is it?"))
    assert score("what is it?").diff().abs() > 1e-5


WORDS = ["a", "small", "red", "dog", "beside", "two", "blue", "cars", "below", "the", "big", "green", "tree"]


@pytest.fixture(scope="module", params=["blip", "blip2"])
def predictor(request: pytest.FixtureRequest) -> BasePredictor:
    return make_predictor("itc", "itm") if request.param == "blip" else blip2_predictor(("itc", "itm"))


@pytest.mark.parametrize("batch_size", [2, *slow(None)])
def test_ragged_texts_score_as_pairs_do(predictor: BasePredictor, batch_size: int | None) -> None:
    """From no text to more than one pass reads; empty ones among them."""
    rng = np.random.default_rng(0)
    counts = [2, 0, 1, MAX_TEXTS_PER_IMAGE + 6, 3]
    texts = [[" ".join(rng.choice(WORDS, 1 + n % 7)) for n in range(count)] for count in counts]
    texts[4][1] = "  "
    scores = predictor.score_texts(predictor.prepare(IMAGES), texts, batch_size)
    assert [len(image_scores) for image_scores in scores] == counts
    for image, image_texts, image_scores in zip(IMAGES, texts, scores, strict=True):
        for text, score in zip(image_texts, image_scores, strict=True):
            if text.strip():
                assert score.itm == pytest.approx(predictor.match(image, text).item(), abs=1e-5)
                assert score.itc == pytest.approx(predictor.similarity(image, text).item(), abs=1e-5)
            else:
                assert score == TextScore(itm=0.0, itc=0.0)


def test_many_texts_of_one_image_beside_one_without(predictor: BasePredictor) -> None:
    """The passes are as many as the images, but both belong to the first image."""
    texts = [" ".join(WORDS[n % 5 : n % 5 + 1 + n % 3]) for n in range(2 * MAX_TEXTS_PER_IMAGE)]
    scores, none = predictor.score_texts(IMAGES[:2], [texts, []])
    alone = {text: predictor.match(IMAGES[0], text).item() for text in set(texts)}
    assert [score.itm for score in scores] == pytest.approx([alone[text] for text in texts], abs=1e-5)
    assert none == []


def test_only_empty_texts(predictor: BasePredictor) -> None:
    assert predictor.score_texts(IMAGES[:2], [[""], []]) == [[(0.0, 0.0)], []]
    assert predictor.score_texts([], []) == []


def test_broken_weights_are_an_error() -> None:
    predictor = make_predictor("itc", "itm")
    with torch.no_grad():
        predictor.model.itm_head.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not numbers"):
        predictor.score_texts(IMAGES[0], [["a dog"]])


@pytest.mark.parametrize("head", ["itc", "itm"])
def test_both_heads_are_needed(head: str) -> None:
    with pytest.raises(UnsupportedTaskError, match="it can do"):
        make_predictor(head).score_texts(IMAGES[0], [["a dog"]])  # type: ignore[arg-type]


def test_a_given_caption_has_the_logprob_that_it_had_when_it_was_written() -> None:
    predictor = make_predictor("lm")
    written = predictor.caption(IMAGES, decoding=Greedy(max_new_tokens=4), return_scores=True)
    scores = predictor.score_captions(IMAGES, [[caption.text, "a dog"] for caption in written])
    for caption, (own, other) in zip(written, scores, strict=True):
        assert own.logprob != pytest.approx(other.logprob)
        if caption.tokens[-1] == "[SEP]" and own.num_tokens == len(caption.tokens):  # it was not cut off
            assert own.logprob == pytest.approx(caption.logprob, abs=1e-4)
    short = predictor.score_captions(IMAGES[0], ["a dog"])[0][0]
    tokens = TOKENIZER.encode(["a dog"])
    start = TOKENIZER.prompt(predictor.prompt)
    ids = torch.cat([start, tokens.ids[0, 1:]])[None]
    kv = predictor.model.image_kv(image_tokens(predictor, IMAGES[0]), "decode")
    with torch.no_grad():
        logprobs = predictor.model.decode(ids[:, :-1], kv).log_softmax(dim=2)[0, len(start) - 1 :]
    expected = sum(float(row[i]) for row, i in zip(logprobs, tokens.ids[0, 1:], strict=True))
    assert short == (pytest.approx(expected, abs=1e-4), len(tokens.ids[0]) - 1)


@pytest.mark.parametrize("kind", ["blip", "itg", "opt", "t5"])
def test_logprobs_of_captions_do_not_depend_on_batches_or_padding(kind: str) -> None:
    languages: dict[str, Any] = {"itg": {}, "opt": {"heads": (), "language": "opt"}, "t5": {"language": "t5"}}
    predictor = make_predictor("lm") if kind == "blip" else blip2_predictor(**languages[kind])
    lists = [[TEXTS[1], "a dog"], [], ["the cat"], [TEXTS[3], "a dog", ""], ["tree"]]
    whole = predictor.score_captions(IMAGES, lists)
    assert [len(scores) for scores in whole] == [2, 0, 1, 3, 1]
    alone = [predictor.score_captions([image], [texts])[0] for image, texts in zip(IMAGES, lists, strict=True)]
    for one, other in zip(chain(*whole), chain(*alone), strict=True):
        assert one.num_tokens == other.num_tokens
        assert one.logprob == pytest.approx(other.logprob, abs=2e-4)
    assert all(score.logprob < 0 for score in chain(*whole))
    assert predictor.score_captions([], []) == []
    long = predictor.score_captions(IMAGES[0], ["a dog beside " * 200])[0][0]
    assert long.logprob < 0, "a long text is cut, not refused"
