"""BLIP-2's other promises: what it can do, matching, search, features, videos, and checkpoints.

I images, T texts, Q queries, E embedding width.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_predictor import IMAGES, TEXTS, blip2_predictor, make_predictor, random_video

import openblip
from openblip.errors import CheckpointError, ConfigError, UnsupportedTaskError
from openblip.generation.decoding import Greedy
from openblip.predictor import Blip2Predictor
from tiny_blip import tiny_tokenizer
from tiny_blip2 import tiny_blip2

SEARCH = {"similarity", "embed_images", "embed_texts"}
MATCH = {"match", "match_matrix"}
SHORT = Greedy(max_new_tokens=4)


@pytest.fixture(scope="module", params=[False, True], ids=["vit", "tower"])
def predictor(request: pytest.FixtureRequest) -> Blip2Predictor:
    return blip2_predictor(tower=request.param)


def test_scores_are_those_of_the_heads(predictor: Blip2Predictor) -> None:
    """Texts from [CLS]; ITM the mean over queries of the logits, ITC the best query's cosine."""
    tokens = tiny_tokenizer().encode(["a dog"])
    pixels = predictor.preprocessing.normalize(predictor.prepare(IMAGES[0]))
    model = predictor.model
    with torch.no_grad():
        image_kv = model.image_kv(model.encode_image(pixels))
        logits = model.itm_head(model.encode_multimodal(tokens.ids, tokens.mask, image_kv))  # (1, Q, 2)
        queries = model.encode_queries(image_kv).queries
        image = torch.nn.functional.normalize(model.vision_proj(queries), dim=-1)[0]  # (Q, E)
        text = model.embed_text(tokens.ids, tokens.mask)[0]  # (E,)
    expected = logits.mean(dim=1).softmax(dim=1)[:, 1]
    torch.testing.assert_close(predictor.match(IMAGES[0], "a dog"), expected, atol=1e-5, rtol=1e-5)
    matrix = predictor.match_matrix([IMAGES[1], IMAGES[0]], ["two cars", "a dog"])
    torch.testing.assert_close(matrix[1, 1:], expected, atol=1e-5, rtol=1e-5)
    best = max(float(query @ text) for query in image)
    assert predictor.similarity(IMAGES[0], "a dog").item() == pytest.approx(best, abs=1e-5)


def test_embeddings_are_unit_vectors_of_every_query(predictor: Blip2Predictor) -> None:
    images, texts = predictor.embed_images(IMAGES, batch_size=2), predictor.embed_texts(TEXTS, batch_size=2)
    assert images.shape == (5, 4, 12)
    assert texts.shape == (5, 12)
    torch.testing.assert_close(images.norm(dim=2), torch.ones(5, 4))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(5))
    assert predictor.embed_images([]).shape == (0, 4, 12)
    assert predictor.match_matrix([], TEXTS).shape == predictor.similarity([], TEXTS).shape == (0, 5)


def test_frames_of_a_video_stand_one_after_the_other(predictor: Blip2Predictor) -> None:
    videos = [random_video(1), random_video(2)]
    encoded = predictor.encode_videos(videos, num_frames=3, batch_size=3)
    assert encoded.tokens.shape[:2] == (2, 15)
    alone = predictor.encode_videos(videos[1], num_frames=1)
    assert alone.tokens.shape[1] == 5
    matrix = predictor.match_matrix(encoded, TEXTS[:2])
    torch.testing.assert_close(predictor.match(encoded, TEXTS[:2]), matrix.diagonal(), atol=1e-5, rtol=1e-5)
    first, second = predictor.caption(encoded, decoding=SHORT, return_scores=True)
    assert first.logprob != pytest.approx(second.logprob, abs=1e-3)


def test_features_are_the_states_before_the_heads(predictor: Blip2Predictor) -> None:
    features = predictor.features(IMAGES, TEXTS, batch_size=2)
    assert features.image is not None
    assert features.queries is not None
    assert features.text is not None
    assert features.text_projected is not None
    assert features.multimodal is not None
    torch.testing.assert_close(features.image, predictor.encode(IMAGES).tokens)
    torch.testing.assert_close(features.image_projected, predictor.embed_images(IMAGES))
    torch.testing.assert_close(features.text_projected[:, 0], predictor.embed_texts(TEXTS))
    with torch.no_grad():
        logits = predictor.model.itm_head(features.multimodal).mean(dim=1)
        projected = predictor.model.embed_image(features.queries)
    torch.testing.assert_close(logits.softmax(dim=1)[:, 1], predictor.match(IMAGES, TEXTS))
    torch.testing.assert_close(projected, features.image_projected)
    texts = predictor.features(None, TEXTS[:1]).text
    assert texts is not None
    alone = texts[0]
    torch.testing.assert_close(features.text[0, : len(alone)], alone, atol=1e-5, rtol=1e-5)
    assert features.text[0, len(alone) :].abs().sum() == 0


def test_features_without_a_text_branch_are_those_of_images() -> None:
    predictor = blip2_predictor((), "opt")
    features = predictor.features(IMAGES[:2])
    assert features.queries is not None
    assert features.queries.shape == (2, 4, 32)
    assert features.image_projected is features.text is None
    with pytest.raises(UnsupportedTaskError, match="itm head; this checkpoint has llm"):
        predictor.features(IMAGES[:2], TEXTS[:2])


@pytest.mark.parametrize(("language", "tower"), [("opt", False), ("t5", True)])
def test_a_saved_checkpoint_loads_and_says_the_same(tmp_path: Path, language: Any, tower: bool) -> None:
    predictor = blip2_predictor(("itc", "itm", "itg"), language, tower=tower)
    predictor.save(tmp_path)
    loaded = openblip.load(tmp_path, device="cpu")
    assert isinstance(loaded, Blip2Predictor)
    assert openblip.Blip2Predictor is Blip2Predictor
    assert loaded.settings == predictor.settings
    assert loaded.caption(IMAGES, decoding=SHORT) == predictor.caption(IMAGES, decoding=SHORT)
    assert loaded.answer(IMAGES[0], "why?") == predictor.answer(IMAGES[0], "why?")
    torch.testing.assert_close(loaded.match(IMAGES, TEXTS), predictor.match(IMAGES, TEXTS))
    with pytest.raises(ConfigError, match=r"\[CLS\] only"):
        openblip.load(tmp_path, encoder_token="[ENC]")
    with pytest.raises(ConfigError, match="which is for a BLIP; of a BLIP-2 the language model"):
        openblip.load(tmp_path, device="cpu", dtype="int8")


def test_queries_may_be_projected_by_two_layers(tmp_path: Path) -> None:
    predictor = blip2_predictor((), "opt", projection="mlp")
    first, _, second = predictor.model.language_proj
    queries = torch.randn(2, 3, first.in_features)
    expected = second(torch.nn.functional.gelu(first(queries)))
    torch.testing.assert_close(predictor.model.visual_prompts(queries), expected)
    predictor.save(tmp_path / "native")
    loaded = openblip.load(tmp_path / "native", device="cpu")
    assert loaded.answer(IMAGES, "why?") == predictor.answer(IMAGES, "why?")
    with pytest.raises(CheckpointError, match="or a projection of two layers"):
        predictor.save(tmp_path / "theirs", format="huggingface")
    with pytest.raises(CheckpointError, match="or a projection of two layers"):
        predictor.save(tmp_path / "theirs.pth", format="original")
    values = {name: value for name, value in predictor.model.config.to_dict().items() if name != "projection"}
    assert type(predictor.model.config).from_dict(values).projection == "linear"  # of an earlier version


def test_float16_is_for_the_frozen_parts() -> None:
    half = Blip2Predictor(tiny_blip2(("itc", "itm", "itg"), "t5"), device="cpu", dtype=torch.float16)
    dtypes = {name.split(".")[0]: tensor.dtype for name, tensor in half.model.named_parameters()}
    assert dtypes.pop("vision") == dtypes.pop("language") == torch.float16
    assert set(dtypes.values()) == {torch.float32}


def test_bfloat16_is_for_all_parts() -> None:
    whole = blip2_predictor(("itc", "itm", "itg"), "t5")
    half = Blip2Predictor(tiny_blip2(("itc", "itm", "itg"), "t5"), device="cpu", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.model.parameters()} == {torch.bfloat16}
    encoded = half.encode(IMAGES)
    assert encoded.tokens.dtype == half.encode([]).tokens.dtype == torch.bfloat16
    found = half.match(encoded, TEXTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole.match(IMAGES, TEXTS), atol=0.05, rtol=0.05)
    assert len(half.answer(IMAGES, ["why?"] * 5, decoding=SHORT)) == 5
    assert half.explain(IMAGES[0], "a dog").heat.dtype == torch.float32
    images, texts = half.embed_images(IMAGES), half.embed_texts(TEXTS)
    features = half.features(IMAGES, TEXTS)
    assert images.dtype == texts.dtype == torch.float32
    assert features.queries is not None
    torch.testing.assert_close(features.queries.float(), whole.features(IMAGES).queries, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("language", ["opt", "t5"])
def test_a_language_model_in_fewer_bits(tmp_path: Path, language: Any, bits: Any) -> None:
    pytest.importorskip("bitsandbytes")
    predictor = blip2_predictor((), language)
    predictor.save(tmp_path)
    quantized = openblip.load(tmp_path, device="cpu", quantization=bits)
    layers = {type(module).__name__ for module in quantized.model.language.modules()}  # type: ignore[union-attr]
    assert {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[bits] in layers
    if bits == "4bit":
        return  # the CPU kernel of bitsandbytes wants wider layers than these
    exact = predictor.answer(IMAGES[0], "why?", candidates=["a dog"], return_scores=True)
    answer = quantized.answer(IMAGES[0], "why?", candidates=["a dog"], return_scores=True)
    assert answer.logprob == pytest.approx(exact.logprob, rel=0.2)
    assert answer.logprob != exact.logprob
    assert isinstance(quantized.caption(IMAGES[0]), str)
    with pytest.raises(ConfigError, match="choose one of 8bit, 4bit"):
        openblip.load(tmp_path, device="cpu", quantization="2bit")  # type: ignore[arg-type]


def test_without_a_language_model_nothing_is_quantised(tmp_path: Path) -> None:
    blip2_predictor(("itc",)).save(tmp_path / "blip2")
    with pytest.raises(UnsupportedTaskError, match="no language model"):
        openblip.load(tmp_path / "blip2", device="cpu", quantization="8bit")
    make_predictor("lm").save(tmp_path / "blip")
    with pytest.raises(ConfigError, match="only the language model of a BLIP-2"):
        openblip.load(tmp_path / "blip", device="cpu", quantization="8bit")


def test_tokens_are_counted_in_the_vocabulary_that_reads_the_texts() -> None:
    both, language_only = blip2_predictor(("itc", "itm", "itg"), "t5"), blip2_predictor((), "opt")
    texts = ["a dog", "two blue cars beside a tree"]
    own = [len(tiny_tokenizer().prompt(text)) + 1 for text in texts]
    assert both.count_tokens(texts, "embed_texts") == own
    for predictor in (both, language_only):
        language = predictor.model.require_language()
        assert predictor.count_tokens(texts, "answer") == [len(language.tokenizer(text).input_ids) for text in texts]
    assert both.count_tokens(texts, "answer") != own
    assert both.count_tokens("a dog " * 600, "match") == [both._max_positions]
    with pytest.raises(UnsupportedTaskError, match="embed_texts"):
        language_only.count_tokens(texts, "embed_texts")
