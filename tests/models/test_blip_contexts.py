"""What texts are read with beside one image: questions, clips, dialogs and pairs, against their plain forms.

B images, K rows of text for each, F frames, N image tokens, T text tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.data.tokenizer import Tokens
from openblip.models.blip import Blip, CrossKV, encode_media
from openblip.models.config import Head
from openblip.nn.attention import PairCrossAttention
from openblip.nn.config import Sharing
from tiny_blip import CLS, DEC, ENC, TINY, random_pixels, random_tokens, randomise, tiny_blip

QUESTION_LENGTHS = [5, 9, 3]
SHARINGS: list[Sharing] = ["none", "all_but_ca"]  # TINY's text is wider than its images


def narrow_blip(head: Head) -> Blip:
    """Image and text of one width, as the paper's ViT-B and BERT."""
    vision = replace(TINY.vision, hidden_dim=32, num_heads=4)
    model = Blip(replace(TINY, vision=vision, heads=(head,)))
    randomise(model, seed=0)
    return model.eval()


def one(tokens: Tokens, row: int) -> Tensor:
    """A row without its padding, (1, T)."""
    return tokens.ids[row : row + 1, : int(tokens.mask[row].sum())]


def question_kv(model: Blip, image_tokens: Tensor, questions: Tokens) -> CrossKV:
    return model.question_kv(questions.ids, questions.mask, model.image_kv(image_tokens, "encode"))


def assert_equal_with_gradients(
    model: nn.Module, folded: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], pixels: Tensor
) -> None:
    """Two ways from pixels to an output give the same values and the same gradients."""
    results = []
    for way in (folded, plain):
        model.zero_grad()
        leaf = pixels.clone().requires_grad_()
        output = way(leaf)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
        (output * weights).sum().backward()
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"output": output.detach(), "pixels": leaf.grad, **named})
    assert results[0].keys() == results[1].keys()
    for name, found in results[0].items():
        torch.testing.assert_close(found, results[1][name], atol=5e-4, rtol=2e-4, msg=name)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_answers_are_decoded_as_from_each_question_alone_gradients_included(sharing: Sharing) -> None:
    model = tiny_blip(("vqa",), sharing)
    questions, answers = random_tokens(QUESTION_LENGTHS, first=ENC), random_tokens([4, 6, 6], 1, first=DEC)

    def together(pixels: Tensor) -> Tensor:
        return model.decode(answers.ids, question_kv(model, model.encode_image(pixels), questions))

    def alone(pixels: Tensor) -> Tensor:
        rows = []
        for row in range(3):
            image_kv = model.image_kv(model.encode_image(pixels[row : row + 1]), "encode")
            ids = one(questions, row)
            kv = model.question_kv(ids, torch.ones_like(ids, dtype=torch.bool), image_kv)
            rows.append(model.decode(answers.ids[row : row + 1], kv))
        return torch.cat(rows)

    assert_equal_with_gradients(model, together, alone, random_pixels(3))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_answers_of_one_question_equal_answers_of_its_copies_gradients_included(sharing: Sharing) -> None:
    """Several answers of a question read it once, in any of the three ways that there are."""
    model = tiny_blip(("vqa",), sharing)
    questions, answers = random_tokens(QUESTION_LENGTHS, first=ENC), random_tokens([6] * 6, 1, first=DEC)
    owners = torch.arange(3).repeat_interleave(2)

    def folded(pixels: Tensor) -> Tensor:
        return model.decode(answers.ids, question_kv(model, model.encode_image(pixels), questions))

    def selected(pixels: Tensor) -> Tensor:
        kv = question_kv(model, model.encode_image(pixels), questions)
        return model.decode(answers.ids, kv.select(owners))

    def copied(pixels: Tensor) -> Tensor:
        copies = Tokens(questions.ids[owners], questions.mask[owners])
        return model.decode(answers.ids, question_kv(model, model.encode_image(pixels)[owners], copies))

    for way in (folded, selected):
        assert_equal_with_gradients(model, way, copied, random_pixels(3))


@torch.no_grad()
def test_a_questions_answers_depend_on_its_words_and_on_its_image() -> None:
    model = tiny_blip(("vqa",), "none")
    questions, answers = random_tokens([5, 5], first=ENC), random_tokens([4, 4], 1, first=DEC)
    image_tokens = model.encode_image(random_pixels(2))
    plain = model.decode(answers.ids, question_kv(model, image_tokens, questions))
    other_words = Tokens(questions.ids.flip(0), questions.mask)
    for changed in (question_kv(model, image_tokens, other_words), question_kv(model, image_tokens.flip(0), questions)):
        assert not torch.allclose(model.decode(answers.ids, changed), plain, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_cached_decoding_over_questions_equals_uncached(beams: int) -> None:
    """Questions can be dropped while decoding."""
    model = tiny_blip(("vqa",), "none")
    kv = question_kv(model, model.encode_image(random_pixels(3)), random_tokens(QUESTION_LENGTHS, first=ENC))
    ids = random_tokens([6] * 3 * beams, 1, first=DEC).ids
    decoder, _ = model.begin_texts(kv, ids[0, :1], 3, samples=1, beams=beams, max_new_tokens=6)
    for length in range(2, 7):
        if length == 4:
            kept = torch.tensor([2, 1])
            decoder, kv, ids = decoder.select(kept), kv.select(kept), ids.unflatten(0, (3, -1))[kept].flatten(0, 1)
        expected = model.decode(ids[:, :length], kv)[:, -1]
        torch.testing.assert_close(decoder.step(ids[:, length - 1]), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("head", ["vqa", "visdial"])
def test_every_layers_mask_is_selected_with_its_context(head: Head) -> None:
    model = tiny_blip((head,), "none")
    texts, image_tokens = random_tokens(QUESTION_LENGTHS, first=ENC), model.encode_image(random_pixels(3))
    dialog_kv = partial(model.dialog_kv, image_tokens, texts.ids, texts.mask)
    kv = question_kv(model, image_tokens, texts) if head == "vqa" else dialog_kv()
    index = torch.tensor([2, 2, 0])
    for layer, chosen in zip(kv.layers, kv.select(index).layers, strict=True):
        torch.testing.assert_close(tuple(chosen), tuple(part[index] for part in layer), atol=0, rtol=0)


@torch.no_grad()
def test_a_clip_is_its_frames_one_after_the_other() -> None:
    model, pixels = tiny_blip(), random_pixels(6).unflatten(0, (2, 3))
    tokens = encode_media(model.encode_image, pixels)
    for clip in range(2):
        frames = [model.encode_image(pixels[clip, frame][None])[0] for frame in range(3)]
        torch.testing.assert_close(tokens[clip], torch.cat(frames), atol=1e-5, rtol=1e-5)
    # a pair is its left and its right image
    tokens = model.encode_pair(pixels[:, :2])
    for side in range(2):
        torch.testing.assert_close(tokens[:, side], model.encode_image(pixels[:, side]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pooled", [False, True])
def test_a_clips_embedding_is_the_mean_of_its_frames_then_made_a_unit_vector(pooled: bool) -> None:
    model = Blip(replace(TINY, heads=("itc",), pooled=pooled))
    randomise(model, seed=0)
    model.eval()
    pixels = random_pixels(6).unflatten(0, (2, 3))
    projected = []
    for clip in range(2):
        class_tokens = [model.encode_image(pixels[clip, frame][None])[0, 0] for frame in range(3)]
        if pooled:  # transformers normalises the class token a second time
            class_tokens = [model.vision.norm(token) for token in class_tokens]
        projected.append(sum(map(model.vision_proj, class_tokens)) / 3)
    expected = torch.stack([vector / vector.norm() for vector in projected])
    found = model.embed_image(encode_media(model.encode_image, pixels), num_frames=3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    single = model.embed_image(model.encode_image(pixels[:, 0]))
    one_frame = model.embed_image(encode_media(model.encode_image, pixels[:, :1]), num_frames=1)
    torch.testing.assert_close(single, one_frame, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(single, found, atol=1e-2)


@torch.no_grad()
def test_pooled_texts_go_through_a_tanh_and_projections_have_no_bias() -> None:
    model = Blip(replace(TINY, heads=("itc",), pooled=True))
    randomise(model, seed=0)
    model.eval()
    assert model.vision_proj.bias is None
    assert model.text_proj.bias is None
    texts = random_tokens([4, 7])
    first = model.text(texts.ids, "encode", mask=texts.mask)[:, 0]
    pooled = torch.tanh(first @ model.text_pooler.weight.T + model.text_pooler.bias)
    expected = F.normalize(pooled @ model.text_proj.weight.T, dim=-1)
    torch.testing.assert_close(model.embed_text(texts.ids, texts.mask), expected, atol=1e-6, rtol=1e-5)
    names = tiny_blip(("itc",)).state_dict().keys()
    assert "vision_proj.bias" in names
    assert not [name for name in names if "pooler" in name]


CAPTION_LENGTHS = [4, 8]


def dialog_logits(model: Blip, image_tokens: Tensor, captions: Tokens, dialogs: Tokens) -> Tensor:
    kv = model.dialog_kv(image_tokens, captions.ids, captions.mask)
    return model.match_logits(dialogs.ids, dialogs.mask, kv)


@pytest.mark.parametrize("widths", ["unequal", "equal"])
def test_dialogs_read_the_image_and_their_own_caption_without_its_padding(widths: str) -> None:
    model = tiny_blip(("visdial",)) if widths == "unequal" else narrow_blip("visdial")
    assert hasattr(model, "caption_proj") == (widths == "unequal")
    captions, dialogs = random_tokens(CAPTION_LENGTHS, first=CLS), random_tokens([9, 5, 7, 6], 1, first=ENC)

    def together(pixels: Tensor) -> Tensor:
        return dialog_logits(model, model.encode_image(pixels), captions, dialogs)

    def alone(pixels: Tensor) -> Tensor:
        """One dialog at a time; its context is put together token by token."""
        rows = []
        for row in range(4):
            image = row // 2
            image_tokens = model.encode_image(pixels[image : image + 1])
            states = model.text(one(captions, image), "encode")
            if widths == "unequal":
                states = states @ model.caption_proj.weight.T + model.caption_proj.bias
            context = torch.cat([image_tokens, states], dim=1)
            hidden = model.text(one(dialogs, row), "encode", context_kv=model.text.context_kv(context, "encode"))
            rows.append(model.itm_head(hidden[:, 0]))
        return torch.cat(rows)

    assert_equal_with_gradients(model, together, alone, random_pixels(2))


@torch.no_grad()
def test_what_stands_in_a_captions_padding_does_not_matter() -> None:
    model, image_tokens = tiny_blip(("visdial",)), tiny_blip(("visdial",)).encode_image(random_pixels(2))
    captions, dialogs = random_tokens(CAPTION_LENGTHS), random_tokens([6, 6], 1, first=ENC)
    other = Tokens(captions.ids.masked_fill(~captions.mask, 17), captions.mask)
    plain = dialog_logits(model, image_tokens, captions, dialogs)
    torch.testing.assert_close(dialog_logits(model, image_tokens, other, dialogs), plain, atol=0, rtol=0)
    caption_matters = dialog_logits(model, image_tokens, Tokens(captions.ids.flip(0), captions.mask), dialogs)
    image_matters = dialog_logits(model, image_tokens.flip(0), captions, dialogs)
    for changed in (caption_matters, image_matters):
        assert not torch.allclose(changed, plain, atol=1e-2)


def test_statements_about_a_pair_are_judged_as_one_at_a_time_gradients_included() -> None:
    model = tiny_blip(("nlvr",))
    statements = random_tokens([5, 8, 3], first=ENC)

    def together(pixels: Tensor) -> Tensor:
        kv = model.image_kv(model.encode_pair(pixels), "encode")
        return model.judge_logits(statements.ids, statements.mask, kv)

    def alone(pixels: Tensor) -> Tensor:
        rows = []
        for row in range(3):
            kv = model.image_kv(model.encode_pair(pixels[row : row + 1]), "encode")
            ids = one(statements, row)
            rows.append(model.judge_logits(ids, torch.ones_like(ids, dtype=torch.bool), kv))
        return torch.cat(rows)

    assert_equal_with_gradients(model, together, alone, random_pixels(6).unflatten(0, (3, 2)))


@torch.no_grad()
def test_a_new_models_learned_merge_is_the_mean() -> None:
    """So the two branches of a pre-trained model begin as reading one image twice does."""
    torch.manual_seed(0)
    model = Blip(replace(TINY, heads=("nlvr",), text=replace(TINY.text, num_layers=4))).eval()
    branches = [layer.cross_attention["encode"].branch for layer in model.text.layers]
    merges = [isinstance(branch, PairCrossAttention) and branch.merge is not None for branch in branches]
    assert merges == [False, False, True, True]
    texts, kv = random_tokens([6, 4], first=ENC), model.image_kv(torch.randn(2, 2, 5, 24), "encode")
    merged = model.judge_logits(texts.ids, texts.mask, kv)
    for branch in branches:
        branch.merge = None  # the mean
    torch.testing.assert_close(merged, model.judge_logits(texts.ids, texts.mask, kv), atol=1e-5, rtol=1e-5)
