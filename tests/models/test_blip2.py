"""BLIP-2: its heads by hand, its fast paths against masked passes, what freezing freezes, its size.

B images, R rows of text, Q queries, T text tokens, N image tokens.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.errors import ConfigError, UnsupportedTaskError
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus
from openblip.models.blip import CrossKV
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, LanguageConfig, TowerConfig
from openblip.nn.config import QFormerConfig, VisionConfig
from openblip.nn.qformer import generation_mask, matching_mask, without_padding
from tiny_blip import (
    SIZE,
    TINY,
    check_cached_decoding,
    contrastive_mask,
    gradients,
    random_pixels,
    random_tokens,
    randomise,
)

QUERIES, CLS, DEC, EOS = 4, 2, 58, 3
CONFIG = Blip2Config(
    vision=replace(TINY.vision, output_norm=False),
    qformer=QFormerConfig(
        num_queries=QUERIES, hidden_dim=32, num_layers=4, num_heads=4, mlp_dim=48, vocab_size=60,
        max_positions=40, dropout=0.0,
    ),
    embed_dim=12,
)  # fmt: skip


def blip2(scale: float = 0.15, **changes: Any) -> Blip2:
    model = Blip2(replace(CONFIG, **changes))
    randomise(model, seed=0, scale=scale)
    return model.eval()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def image_kv(model: Blip2, count: int) -> CrossKV:
    dtype = model.vision_norm.weight.dtype
    return model.image_kv(model.encode_image(random_pixels(count).to(dtype)))


@torch.no_grad()
def test_embeddings_are_projected_queries_and_the_projected_first_token() -> None:
    model, tokens = blip2(), random_tokens([5, 8, 3])
    kv = image_kv(model, 3)
    mask = without_padding(contrastive_mask(QUERIES, 8), tokens.mask)
    joint = model.qformer(tokens.ids, kv.layers, mask=mask)
    images = model.embed_image(model.encode_queries(kv).queries)
    close(images, F.normalize(model.vision_proj(joint[:, :QUERIES]), dim=-1))
    texts = model.embed_text(tokens.ids, tokens.mask)
    close(texts, F.normalize(model.text_proj(joint[:, QUERIES]), dim=-1))
    assert images.shape == (3, QUERIES, 12)
    close(images.norm(dim=-1), torch.ones(3, QUERIES))


@torch.no_grad()
def test_a_match_is_the_mean_of_what_every_query_says() -> None:
    model, tokens = blip2(), random_tokens([5, 8, 3])
    kv = image_kv(model, 3)
    mask = without_padding(matching_mask(QUERIES, 8), tokens.mask)
    queries = model.qformer(tokens.ids, kv.layers, mask=mask)[:, :QUERIES]
    by_query = torch.stack([model.itm_head(queries[:, i]) for i in range(QUERIES)])
    close(model.match_logits(tokens.ids, tokens.mask, kv), by_query.mean(dim=0))
    close(model.encode_multimodal(tokens.ids, tokens.mask, kv), queries)


@torch.no_grad()
def test_several_texts_of_an_image_are_matched_at_once() -> None:
    model, tokens = blip2(), random_tokens([5, 8, 3, 4, 6, 7])
    kv = image_kv(model, 2)
    together = model.match_logits(tokens.ids, tokens.mask, kv)
    for row, length in enumerate([5, 8, 3, 4, 6, 7]):
        own = kv.select(torch.tensor([row // 3]))
        ids = tokens.ids[row : row + 1, :length]
        close(together[row], model.match_logits(ids, torch.ones_like(ids, dtype=torch.bool), own)[0])
    close(kv.select(torch.tensor([1, 0, 1])).layers[2].value, kv.layers[2].value[[1, 0, 1]])
    with pytest.raises(ValueError, match="3 rows of text do not divide over 2 images"):
        model.match_logits(tokens.ids[:3], tokens.mask[:3], kv)


@pytest.mark.parametrize("joint", [True, False])
def test_captions_in_training_are_the_masked_pass(joint: bool) -> None:
    """Three losses over one reading of the images, with every gradient (and twice over the same reading)."""
    results = []
    for fast in (False, True):
        model, ids = blip2().train().double(), random_tokens([6, 6], first=DEC).ids
        kv = image_kv(model, 2)
        if fast:
            read = model.encode_queries(kv)
            logits, again = model.caption_logits(ids, read), model.caption_logits(ids, read)
            assert torch.equal(logits, again)
            queries = read.queries
        else:
            logits = model.decode(ids, kv)
            queries = model.qformer(ids, kv.layers, mask=contrastive_mask(QUERIES, 6))[:, :QUERIES]
        loss = logits.sin().sum() + (model.embed_image(queries).sin().sum() if joint else 0.0)
        loss.backward()
        results.append({"logits": logits.detach(), **gradients(model)})
    for name, expected in results[0].items():
        # ITG alone does not use what the last layer makes of queries
        last = "qformer.layers.3.query_feed_forward"
        unused = ("text_proj", "itm_head", "log_temperature", *([] if joint else ["vision_proj", last]))
        assert (expected is not None and bool(expected.any())) != name.startswith(unused), name
        if expected is not None and results[1][name] is not None:
            torch.testing.assert_close(results[1][name], expected, atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(("samples", "beams"), [(2, 1), (1, 2)])
def test_captions_step_by_step_are_the_masked_pass(samples: int, beams: int) -> None:
    """Of two images with two texts each, which the queries are read for once."""
    model, ids = blip2(), random_tokens([6] * 4, first=DEC).ids
    ids[:, :2] = torch.tensor([DEC, 9])
    kv = image_kv(model, 2)
    joint = model.decode(ids, kv)
    states = model.qformer(ids, kv.layers, mask=generation_mask(QUERIES, 6))[:, QUERIES:]
    assert torch.equal(joint, model.qformer.predict_words(states))
    decoder, first = model.begin_texts(kv, ids[0, :2], 2, samples=samples, beams=beams, max_new_tokens=5)
    parents = torch.arange(2).expand(2, 2) if beams > 1 else None
    logits = [first.repeat_interleave(2, dim=0), *(decoder.step(ids[:, i], parents) for i in range(2, 6))]
    close(torch.stack(logits, dim=1), joint[:, 1:], 2e-6)  # of logits up to 3; states agree to 1e-6 in test_qformer.py
    limit = model.config.qformer.max_positions
    with pytest.raises(ValueError, match=f"A text of {limit + 1} tokens: the model has {limit} positions"):
        model.begin_texts(kv, ids[0, :2], 2, samples=1, beams=1, max_new_tokens=limit)


@torch.no_grad()
@pytest.mark.parametrize(
    ("decoding", "num_captions"),
    [(Greedy(), 1), (Beam(num_beams=4, min_new_tokens=3), 4), (Nucleus(seed=2, repetition_penalty=1.1), 3)],
)
def test_cached_decoding_writes_what_the_uncached_model_writes(decoding: Decoding, num_captions: int) -> None:
    model = blip2(scale=0.4)
    kv, prompt = image_kv(model, 5), torch.tensor([DEC, 7])
    model.qformer.lm_head.bias[EOS] += 6.0  # so that texts end at different times
    check_cached_decoding(model, kv, prompt, decoding, num_captions, EOS)


@torch.no_grad()
def test_features_are_normed_before_the_queries_read_them() -> None:
    model = blip2(vision_norm_eps=0.1)
    features = model.encode_image(random_pixels(2))
    normed = F.layer_norm(features, (24,), model.vision_norm.weight, model.vision_norm.bias, 0.1)
    expected = model.qformer.layers[2].cross_attention.branch.project(normed)
    found = model.image_kv(features).layers
    close(found[2].key, expected.key)
    assert [kv is None for kv in found] == [False, True, False, True]
    close(features, model.vision(random_pixels(2)))
    assert model.encode_image(random_pixels(1, size=2 * SIZE)).shape == (1, 17, 24)  # any size is read


@torch.no_grad()
def test_an_instructed_model_reads_the_question_and_projects_its_queries() -> None:
    language = LanguageConfig(name="x", hidden_dim=20)
    model, tokens = blip2(heads=("llm",), language=language, instructed=True), random_tokens([5, 4])
    kv = image_kv(model, 2)
    queries = model.encode_multimodal(tokens.ids, tokens.mask, kv)
    close(model.visual_prompts(queries), model.language_proj(queries))
    assert not torch.allclose(queries, model.encode_queries(kv).queries, atol=1e-2)


@pytest.mark.parametrize(
    ("heads", "call", "message"),
    [
        (("itm",), lambda m: m.embed_image(torch.zeros(1, QUERIES, 32)), "no itc head; it has itm"),
        (("itm",), lambda m: m.embed_text(None, None), "no itc head"),
        (("itm",), lambda m: m.temperature, "no itc head"),
        (("itc", "itg"), lambda m: m.match_logits(None, None, None), "no itm head; it has itc, itg"),
        (("itm",), lambda m: m.caption_logits(None, None), "no itg head"),
        (("itm",), lambda m: m.decode(None, None), "no itg head"),
        (("itm",), lambda m: m.visual_prompts(None), "no llm head"),
        (("itm",), lambda m: m.require_language(), "no language model; it has the heads itm"),
    ],
)
def test_what_a_checkpoint_cannot_do_is_named(heads: Any, call: Any, message: str) -> None:
    with pytest.raises(UnsupportedTaskError, match=message):
        call(blip2(heads=heads))


def test_a_foreign_image_encoder_must_be_given() -> None:
    tower = TowerConfig(name="openai/clip", hidden_dim=24)
    with pytest.raises(ConfigError, match="image encoder openai/clip must be given"):
        Blip2(replace(CONFIG, vision=tower))


def millions(model: Blip2, of_vision: bool) -> float:
    """Parameters of the image encoder, or of what is trained."""
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith("vision.") == of_vision) / 1e6


CLIP_L = VisionConfig(
    patch_size=14, hidden_dim=1024, num_layers=23, num_heads=16, mlp_dim=4096, activation="quick_gelu",
    input_norm=True, output_norm=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("vision", "language_dim", "expected", "paper"),
    [
        (Blip2Config().vision, None, 186.7, 188),
        (Blip2Config().vision, 2560, 107.1, 107),
        (Blip2Config().vision, 2048, 106.7, 107),
        (CLIP_L, 2560, 103.6, 104),
    ],
    ids=["stage-1", "opt-2.7b", "flan-t5-xl", "vit-l-opt-2.7b"],
)
def test_what_is_trained_is_as_large_as_in_the_paper(
    vision: VisionConfig, language_dim: int | None, expected: float, paper: float
) -> None:
    """BLIP-2 section 3.1 (188M, with BERT's own count of what it replaces) and Table 2."""
    config = Blip2Config(vision=vision)
    if language_dim is not None:
        language = LanguageConfig(name="x", hidden_dim=language_dim)
        config = replace(config, heads=("llm",), language=language)
    with torch.device("meta"):
        found = millions(Blip2(config), of_vision=False)
    assert found == pytest.approx(expected, abs=0.05)
    assert found == pytest.approx(paper, abs=0.5 if language_dim else 1.5)


def test_image_encoders_are_as_large_as_the_released_ones() -> None:
    with torch.device("meta"):
        for config, expected in ((Blip2Config(), 985.9), (Blip2Config(vision=CLIP_L), 290.6)):
            assert millions(Blip2(config), of_vision=True) == pytest.approx(expected, abs=0.05)
