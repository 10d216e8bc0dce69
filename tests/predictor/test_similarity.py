"""Cosines by CLIP and SigLIP models of transformers, tiny and random, against transformers' own pipeline of calls."""

import io

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from openblip.errors import CheckpointError, ConfigError
from openblip.predictor import load_scorer
from tiny_language_models import word_tokenizer
from tiny_similarity import POSITIONS, SHAPE, save_model

TEXTS = ["a small red dog", "two big blue cats left of a tree and a dog", "cats"]


def draw(seed, size=(30, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(params=["clip", "siglip"])
def folder(request, tmp_path):
    save_model(request.param, tmp_path)
    return tmp_path


def test_cosines_are_those_of_transformers(folder):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    images = [draw(0), draw(1)]
    padding = "max_length" if model.config.model_type == "siglip" else True
    inputs = processor(
        images=images, text=TEXTS, padding=padding, truncation=True, max_length=POSITIONS, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**inputs)
    cosines = output.image_embeds @ output.text_embeds.T

    with pytest.warns(UserWarning, match="1 text was longer than 8 tokens and cut"):
        scores = load_scorer(folder).score(images, [TEXTS, TEXTS])
    assert torch.tensor(scores) == pytest.approx(cosines.numpy(), abs=1e-5)


def test_scores_depend_on_neither_batch_nor_order_and_empty_texts_score_zero(folder):
    scorer = load_scorer(str(folder))
    encoded = io.BytesIO()
    draw(2).save(encoded, "PNG")
    images = [draw(0), scorer.read_image(draw(1)), encoded.getvalue()]
    texts = [["cats"], [" ", *TEXTS], []]
    scores = scorer.score(images, texts, batch_size=1)
    assert [len(each) for each in scores] == [1, 4, 0]
    assert scores[1][0] == 0.0
    assert all(0 < abs(score) <= 1 for score in scores[1][1:])
    backwards = scorer.score(images[::-1], texts[::-1])[::-1]
    assert [pytest.approx(each, abs=1e-5) for each in scores] == backwards


def test_the_fingerprint_is_that_of_what_decides_the_scores(folder, tmp_path_factory):
    scorer = load_scorer(folder)
    before = scorer.fingerprint()
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    folder.rename(moved)
    assert load_scorer(moved).fingerprint() == before
    with torch.no_grad():
        next(iter(scorer.model.parameters())).add_(1)
    assert scorer.fingerprint() != before


def test_what_is_no_similarity_model_is_refused(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SHAPE, vocab_size=40)).save_pretrained(tmp_path)
    word_tokenizer("$A").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a bert, which does not compare images with texts"):
        load_scorer(tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        load_scorer(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="int8"):
        load_scorer(tmp_path, dtype="int8")
