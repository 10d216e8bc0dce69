"""The MED model: its sizes, what its readings share, and its modes against their plain forms."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from openblip.errors import UnsupportedTaskError
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig, Head
from openblip.nn.config import Sharing, TextConfig
from tiny_blip import DEC, ENC, TINY, random_pixels, random_tokens, tiny_blip

PARTS = ("embeddings", "self_attention", "cross_attention", "feed_forward")
VARIANTS: dict[Sharing, set[str]] = {
    "all": set(PARTS),
    "all_but_ca": {"embeddings", "self_attention", "feed_forward"},
    "all_but_sa": {"embeddings", "cross_attention", "feed_forward"},
    "none": set(),
}


@pytest.mark.parametrize(
    ("sharing", "millions"), [("all", 224), ("all_but_ca", 252), ("all_but_sa", 252), ("none", 361)]
)
def test_sizes_of_table_3(sharing: Sharing, millions: int) -> None:
    """Parameters of ViT-B/16 and the text transformer, as BLIP Table 3 counts them."""
    with torch.device("meta"):
        model = Blip(BlipConfig(text=TextConfig(sharing=sharing)))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


def parts_of(model: Blip, mode: str) -> dict[str, list[nn.Module]]:
    layers = {part: [getattr(layer, part)[mode] for layer in model.text.layers] for part in PARTS[1:]}
    return {"embeddings": [model.text.embeddings[mode]], **layers}


@pytest.mark.parametrize("sharing", VARIANTS)
def test_what_the_readings_share_are_the_same_modules(sharing: Sharing) -> None:
    model = tiny_blip(sharing=sharing)
    encode, decode = parts_of(model, "encode"), parts_of(model, "decode")
    same = {part for part in PARTS if all(a is b for a, b in zip(encode[part], decode[part], strict=True))}
    some = {part for part in PARTS if any(a is b for a, b in zip(encode[part], decode[part], strict=True))}
    assert same == some == VARIANTS[sharing]
    assert model.shares_cross_attention == ("cross_attention" in VARIANTS[sharing])
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)  # every weight has one name


@pytest.mark.parametrize("sharing", VARIANTS)
def test_separate_readings_have_separate_weights(sharing: Sharing) -> None:
    """Training the decoder alone moves exactly the shared parts of the encoder."""
    model = tiny_blip(sharing=sharing)
    kv = model.image_kv(model.encode_image(random_pixels(1)), "decode")
    model.decode(random_tokens([5], first=DEC).ids, kv).square().sum().backward()
    moved = {
        part
        for part, modules in parts_of(model, "encode").items()
        for module in modules
        if any(parameter.grad is not None for parameter in module.parameters())
    }
    assert moved == VARIANTS[sharing]


@pytest.mark.parametrize("sharing", VARIANTS)
@pytest.mark.parametrize(
    ("heads", "absent"),
    [
        (("lm",), ("encode", "itm_head", "vision_proj", "text_proj", "temperature")),
        (("itc", "itm"), ("decode", "lm_head")),
        (("itc",), ("decode", "lm_head", "itm_head", "cross_attention")),
        (("itm",), ("decode", "lm_head", "vision_proj", "text_proj", "temperature")),
    ],
)
def test_a_model_has_only_what_its_heads_need(
    heads: tuple[Head, ...], absent: tuple[str, ...], sharing: Sharing
) -> None:
    whole, part = tiny_blip(sharing=sharing).state_dict(), tiny_blip(heads, sharing=sharing).state_dict()
    assert part.keys() < whole.keys()  # a subset of the same names: heads can be cut off and weights kept
    assert not [name for name in part if any(word in name for word in absent)]


@pytest.mark.parametrize(
    ("heads", "call"),
    [
        (("itm", "lm"), lambda m, t, i: m.embed_text(t.ids, t.mask)),
        (("itm", "lm"), lambda m, t, i: m.embed_image(i)),
        (("itc", "lm"), lambda m, t, i: m.match_logits(t.ids, t.mask, m.image_kv(i, "encode"))),
        (("itc", "itm"), lambda m, t, i: m.decode(t.ids, m.image_kv(i, "encode"))),
        (("itc", "itm", "lm"), lambda m, t, i: m.question_kv(t.ids, t.mask, m.image_kv(i, "encode"))),
        (("itc", "itm", "lm"), lambda m, t, i: m.dialog_kv(i, t.ids, t.mask)),
        (("itc", "itm", "lm"), lambda m, t, i: m.judge_logits(t.ids, t.mask, m.image_kv(i, "encode"))),
        (("vqa",), lambda m, t, i: m.match_logits(t.ids, t.mask, m.image_kv(i, "encode"))),
        (("nlvr",), lambda m, t, i: m.embed_image(i)),
    ],
)
def test_a_missing_head_is_named(heads: tuple[Head, ...], call: Callable[..., Tensor]) -> None:
    model = tiny_blip(heads, "none")
    with pytest.raises(UnsupportedTaskError, match=f"it has {', '.join(heads)}"):
        call(model, random_tokens([4]), model.encode_image(random_pixels(1)))


def encoded(model: Blip, count: int, mode: str = "decode", seed: int = 0) -> tuple[Tensor, object]:
    tokens = model.encode_image(random_pixels(count, seed))
    return tokens, model.image_kv(tokens, mode)


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["all_but_sa", "none"])
@pytest.mark.parametrize(("samples", "beams"), [(1, 1), (3, 1), (1, 3)])
def test_cached_decoding_equals_uncached(samples: int, beams: int, sharing: Sharing) -> None:
    """Also when beams change places, and when images are dropped, of two images."""
    model = tiny_blip(("lm",), sharing)
    _, kv = encoded(model, 2)
    prompt, rows = random_tokens([3], first=DEC).ids[0], 2 * samples * beams
    decoder, logits = model.begin_texts(kv, prompt, 2, samples=samples, beams=beams, max_new_tokens=6)
    ids = prompt.expand(rows, -1)
    torch.testing.assert_close(logits, model.decode(prompt.expand(2, -1), kv)[:, -1], atol=1e-5, rtol=1e-5)
    for step, parents in enumerate(([0, 1, 2], [2, 0, 2], [1, 1, 1], [0, 2, 1], None)):
        if step == 3:
            decoder, kv, ids = decoder.select(torch.tensor([1])), kv.select(torch.tensor([1])), ids[rows // 2 :]
        new = random_tokens([2] * len(ids), seed=step).ids[:, 0]
        moved = None
        if beams > 1 and parents is not None:
            moved = torch.tensor([parents, parents[::-1]][: len(ids) // 3])
            ids = ids[(3 * torch.arange(len(moved))[:, None] + moved).flatten()]
        ids = torch.cat([ids, new[:, None]], dim=1)
        expected = model.decode(ids, kv)[:, -1]
        torch.testing.assert_close(decoder.step(new, moved), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_part_of_a_decoder_is_a_view_of_it() -> None:
    """A slice has the same memory, of the first images, so that a graph of fewer images needs none of its own."""
    model = tiny_blip(("lm",))
    _, kv = encoded(model, 3)
    prompt = random_tokens([2], first=DEC).ids[0]
    decoder, _ = model.begin_texts(kv, prompt, 3, samples=2, beams=1, max_new_tokens=4)
    part = decoder.select(slice(2))
    for whole, view in zip(decoder.tensors(), part.tensors(), strict=True):
        assert view.data_ptr() == whole.data_ptr()
        assert len(view) * 3 == len(whole) * 2 or len(view) == len(whole) == 1
    ids = random_tokens([2] * 6, seed=1).ids[:, 0]
    text = torch.cat([prompt.expand(4, -1), ids[:4, None]], dim=1)
    expected = model.decode(text, kv.select(slice(2)))[:, -1]
    torch.testing.assert_close(part.step(ids[:4]), expected, atol=1e-5, rtol=1e-5)


def test_texts_longer_than_the_positions_are_refused() -> None:
    model = tiny_blip(("lm",))
    _, kv = encoded(model, 1)
    settings = {"samples": 1, "beams": 1}
    model.begin_texts(kv, torch.tensor([DEC, 7]), 1, max_new_tokens=39, **settings)  # the last token is not read
    with pytest.raises(ValueError, match="A text of 41 tokens: the model has 40 positions"):
        model.begin_texts(kv, torch.tensor([DEC, 7]), 1, max_new_tokens=40, **settings)


@pytest.mark.parametrize("reading", ["match", "decode"])
def test_texts_of_one_image_equal_texts_of_its_copies_gradients_included(reading: str) -> None:
    model = tiny_blip()
    texts = random_tokens([4, 7, 5, 6, 3, 7], first=ENC if reading == "match" else DEC)
    weights, results = None, []
    for copies in (1, 3):
        model.zero_grad()
        pixels = random_pixels(2).requires_grad_()
        tokens = model.encode_image(pixels).repeat_interleave(copies, dim=0)
        if reading == "match":
            output = model.match_logits(texts.ids, texts.mask, model.image_kv(tokens, "encode"))
        else:
            output = model.decode(texts.ids, model.image_kv(tokens, "decode"), mask=texts.mask)
        weights = torch.randn_like(output) if weights is None else weights
        (output * weights).sum().backward()
        results.append([output, pixels.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for folded, repeated in zip(*results, strict=True):
        torch.testing.assert_close(folded, repeated, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_scores_do_not_depend_on_padding() -> None:
    model, lengths = tiny_blip(), [4, 9, 6]
    _, kv = encoded(model, 3, "encode")
    texts = random_tokens(lengths, first=ENC)
    together = model.match_logits(texts.ids, texts.mask, kv)
    embedded = model.embed_text(texts.ids, texts.mask)
    for vectors in (embedded, model.embed_image(model.encode_image(random_pixels(3)))):
        assert vectors.shape == (3, 12)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    for row, length in enumerate(lengths):
        ids, mask = texts.ids[row : row + 1, :length], texts.mask[row : row + 1, :length]
        alone = model.match_logits(ids, mask, kv.select(torch.tensor([row])))
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(embedded[row], model.embed_text(ids, mask)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_before_a_prompt_can_be_masked() -> None:
    """Only positions shift, so rows must be compared with the same shift."""
    model, ids = tiny_blip(("lm",)), random_tokens([6], first=DEC).ids
    _, kv = encoded(model, 1)
    mask = torch.tensor([[False, False, True, True, True, True]])
    first, second = (model.decode(x, kv, mask=mask) for x in (ids, ids.masked_fill(~mask, 30)))
    torch.testing.assert_close(first[:, 2:], second[:, 2:], atol=0, rtol=0)


@torch.no_grad()
def test_shared_cross_attention_serves_both_readings() -> None:
    model = tiny_blip()
    tokens, _ = encoded(model, 2)
    encode, decode = (model.image_kv(tokens, mode).layers for mode in ("encode", "decode"))
    torch.testing.assert_close([kv.key for kv in encode], [kv.key for kv in decode], atol=0, rtol=0)
    separate = tiny_blip(sharing="all_but_ca")
    encode, decode = (separate.image_kv(tokens, mode).layers[0].key for mode in ("encode", "decode"))
    assert not torch.allclose(encode, decode)


def test_a_new_model_starts_calm() -> None:
    """Fresh weights: logits near zero, so the first LM loss is near log V and ITM near log 2."""
    torch.manual_seed(0)
    model = Blip(replace(TINY, text=replace(TINY.text, vocab_size=1000))).eval()
    _, kv = encoded(model, 2)
    texts = random_tokens([6, 6])
    assert model.decode(texts.ids, kv).std() < 0.5
    assert model.match_logits(texts.ids, texts.mask, kv).abs().max() < 0.7
    assert model.temperature.item() == pytest.approx(0.07)
