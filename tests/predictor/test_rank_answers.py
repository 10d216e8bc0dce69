"""Ranking answers of a dialog: the text that the model reads, and nothing else, decides."""

from typing import Any

import pytest
import torch
from tiny_predictor import IMAGES, ORDER, TOKENIZER, image_tokens, make_predictor

from openblip.errors import ConfigError
from openblip.predictor import BlipPredictor, blip

CAPTIONS = ["a dog", "two blue cars beside a tree", "the cat", "a small green bird", "tree"]
DIALOGS: list[list[Any]] = [
    ["what is it?"],
    [("is it blue?", "yes"), "how many cars?"],
    [("a", "b"), ("c", "d"), "is it big?"],
    ["is it red? no", "is it green?"],
    [("is it a tree", "yes"), "where?"],
]
CANDIDATES = [["a dog", "a cat", "tree"], ["two"], ["yes", "no, it is a small cat"], [], ["below", "beside"]]


@pytest.fixture(scope="module", params=[("visdial",), ("itc", "itm", "visdial")], ids="+".join)
def predictor(request: pytest.FixtureRequest) -> BlipPredictor:
    return make_predictor(*request.param)


def test_an_answer_is_read_behind_its_dialog_with_image_and_caption(predictor: BlipPredictor) -> None:
    found = predictor.rank_answers(IMAGES, CAPTIONS, DIALOGS, CANDIDATES)
    assert [len(scores) for scores in found] == [3, 1, 2, 0, 2]
    turns = ["is it blue? yes", "how many cars? two"]
    ids = [word for turn in turns for word in (*TOKENIZER.prompt(turn).tolist()[1:], TOKENIZER.sep_id)]
    caption = TOKENIZER.encode([CAPTIONS[1]])
    model = predictor.model
    with torch.no_grad():
        kv = model.dialog_kv(image_tokens(predictor, IMAGES[1]), caption.ids, caption.mask)
        whole = torch.tensor([[TOKENIZER.enc_id, *ids]])
        logits = model.match_logits(whole, torch.ones_like(whole, dtype=torch.bool), kv)
    torch.testing.assert_close(found[1], logits.softmax(dim=1)[:, 1], atol=1e-5, rtol=1e-5)
    assert found[1].dtype == torch.float32


def test_scores_do_not_depend_on_batches_order_or_padding(
    predictor: BlipPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predictor.rank_answers(IMAGES, CAPTIONS, DIALOGS, CANDIDATES)
    assert torch.cat(expected).std() > 1e-3
    shuffled: list[list[Any]] = [[of[i] for i in ORDER] for of in (IMAGES, CAPTIONS, DIALOGS, CANDIDATES)]
    for batch_size in (1, 2, None):
        found = predictor.rank_answers(*shuffled, batch_size=batch_size)
        for i, scores in zip(ORDER, found, strict=True):
            torch.testing.assert_close(scores, expected[i], atol=1e-5, rtol=1e-5)
    encoded = predictor.encode(IMAGES)
    monkeypatch.setattr(blip, "MAX_ROWS", 8)  # two answers at a time
    found = predictor.rank_answers(encoded, CAPTIONS, DIALOGS, CANDIDATES)
    for scores, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(scores, whole, atol=1e-5, rtol=1e-5)


def test_candidates_are_scored_apart(predictor: BlipPredictor) -> None:
    together = predictor.rank_answers(IMAGES[0], CAPTIONS[0], DIALOGS[2], ["yes", "no", "a small cat"])
    assert isinstance(together, torch.Tensor)
    alone = predictor.rank_answers(IMAGES[0], CAPTIONS[0], DIALOGS[2], ["a small cat"])
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=1e-5)


def test_a_long_dialog_loses_its_oldest_rounds(predictor: BlipPredictor) -> None:
    def score(start: str) -> torch.Tensor:
        long = [(start, "yes"), *[("is it a big red tree?", "no")] * 20, "where?"]
        found: torch.Tensor = predictor.rank_answers(IMAGES[0], "a dog", long, ["beside", "below"])
        return found

    assert torch.equal(score("is it blue?"), score("what is it?"))
    assert score("what is it?").diff().abs() > 1e-5


def test_nothing_in_nothing_out(predictor: BlipPredictor) -> None:
    assert predictor.rank_answers([], [], [], []) == []


@pytest.mark.parametrize("left_out", range(4))
def test_lists_of_different_lengths_are_refused(predictor: BlipPredictor, left_out: int) -> None:
    given: list[list[Any]] = [IMAGES, CAPTIONS, DIALOGS, CANDIDATES]
    given = [each[:4] if i == left_out else each for i, each in enumerate(given)]
    with pytest.raises(ConfigError, match="equally many images, captions, dialogs and candidates"):
        predictor.rank_answers(*given)


@pytest.mark.parametrize("dialog", [[], "what is it?", [("what is it?", "a dog")]], ids=str)
def test_a_dialog_without_an_open_question_is_refused(predictor: BlipPredictor, dialog: Any) -> None:
    with pytest.raises(ConfigError, match="dialog 1 is no list that ends with the open question"):
        predictor.rank_answers(IMAGES[:2], CAPTIONS[:2], [DIALOGS[0], dialog], CANDIDATES[:2])
