"""The text transformer: its two readings, padding, and what activation checkpointing leaves equal."""

from dataclasses import replace

import pytest
import torch

from openblip.nn.attention import CrossAttention, PairCrossAttention
from openblip.nn.text_transformer import TextTransformer
from tiny_blip import DEC, ENC, TINY, gradients, random_tokens, randomise


def transformer(
    modes: tuple[str, ...] = ("encode", "decode"), images_per_text: int = 1, **changes: object
) -> TextTransformer:
    model = TextTransformer(
        replace(TINY.text, **changes), context_dims=TINY.context_dims, images_per_text=images_per_text, modes=modes
    )
    randomise(model, seed=0)
    return model.eval()


def image_tokens(count: int) -> torch.Tensor:
    return torch.randn(count, 5, TINY.vision.hidden_dim, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("mode", ["encode", "decode"])
@pytest.mark.parametrize("with_image", [False, True])
def test_padding_does_not_change_a_text(mode: str, with_image: bool) -> None:
    model, lengths = transformer(), [5, 9, 3]
    kv = model.context_kv(image_tokens(3), mode) if with_image else None
    together = random_tokens(lengths, first=ENC)
    padded = model(together.ids, mode, mask=together.mask, context_kv=kv)
    for row, length in enumerate(lengths):
        own = None if kv is None else [pair.select(torch.tensor([row])) for pair in kv]
        alone = model(together.ids[row : row + 1, :length], mode, context_kv=own)
        torch.testing.assert_close(padded[row, :length], alone[0], atol=1e-5, rtol=1e-5)
    other = model(together.ids.masked_fill(~together.mask, 11), mode, mask=together.mask, context_kv=kv)
    torch.testing.assert_close(padded[together.mask], other[together.mask], atol=0, rtol=0)


def test_encode_sees_both_ways_and_decode_only_back() -> None:
    model, ids = transformer(), random_tokens([6], first=DEC).ids
    changed = ids.clone()
    changed[0, -1] = 7
    assert not torch.allclose(model(ids, "encode")[:, 0], model(changed, "encode")[:, 0], atol=1e-3)
    torch.testing.assert_close(model(ids, "decode")[:, :-1], model(changed, "decode")[:, :-1], atol=0, rtol=0)
    # word order matters
    first, second = model(torch.tensor([[2, 7, 8]]), "encode"), model(torch.tensor([[2, 8, 7]]), "encode")
    assert not torch.allclose(first[:, 0], second[:, 0], atol=1e-3)


def test_what_the_model_cannot_do_is_named() -> None:
    with pytest.raises(KeyError, match=r"cannot decode; it has encode"):
        transformer(modes=("encode",))(torch.tensor([[2]]), "decode")
    with pytest.raises(KeyError, match="no decoder"):
        transformer(modes=("encode",)).predict_words(torch.zeros(1, 1, 32))


def test_more_tokens_than_positions_are_refused_by_number() -> None:
    model = transformer()
    ids = torch.full((1, 41), 7)
    with pytest.raises(ValueError, match="41 tokens: the model has 40 positions"):
        model(ids, "encode")


@pytest.mark.parametrize(("num_layers", "merged"), [(12, 6), (4, 2), (3, 2), (1, 1)])
def test_over_two_images_the_upper_half_of_the_layers_learns_to_merge(num_layers: int, merged: int) -> None:
    """BLIP section 5.4: the mean in the first six of twelve layers."""
    model = transformer(("encode",), images_per_text=2, num_layers=num_layers)
    branches = [layer.cross_attention["encode"].branch for layer in model.layers]
    assert all(isinstance(branch, PairCrossAttention) for branch in branches)
    assert [branch.merge is not None for branch in branches] == [False] * (num_layers - merged) + [True] * merged


def test_readings_of_contexts_of_different_widths() -> None:
    """Questions read images, answers read questions."""
    config = replace(TINY.text, sharing="none")
    model = TextTransformer(config, context_dims={"encode": 24, "decode": 32}, modes=("encode", "decode")).eval()
    randomise(model, seed=0)
    cross = model.layers[0].cross_attention
    assert isinstance(cross["encode"].branch, CrossAttention)
    assert cross["encode"].branch.key_value.in_features == 24
    assert cross["decode"].branch.key_value.in_features == 32
    question, answer = random_tokens([5, 3], first=ENC), random_tokens([4, 4], first=DEC)
    states = model(question.ids, "encode", question.mask, model.context_kv(image_tokens(2), "encode"))
    read = model(answer.ids, "decode", None, model.context_kv(states, "decode", question.mask))
    alone = model(question.ids[1:, :3], "encode", None, model.context_kv(image_tokens(2)[1:], "encode"))
    expected = model(answer.ids[1:], "decode", None, model.context_kv(alone, "decode"))
    torch.testing.assert_close(read[1:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mode", "images_per_text"), [("encode", 1), ("decode", 1), ("encode", 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_activation_checkpointing_changes_nothing_but_memory(mode: str, images_per_text: int, masked: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = transformer((mode,), images_per_text, dropout=0.3, activation_checkpointing=checkpointing).train()
        context = image_tokens(2)
        if images_per_text == 2:
            context = torch.stack([context, context.flip(0)], dim=1)
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]) if masked and images_per_text == 1 else None
        tokens = random_tokens([5, 9])
        torch.manual_seed(4)
        kv = model.context_kv(context.requires_grad_(), mode, mask)
        hidden = model(tokens.ids, mode, mask=tokens.mask, context_kv=kv)
        hidden.square().sum().backward()
        results.append({"hidden": hidden.detach(), "context": context.grad, **gradients(model)})
    torch.testing.assert_close(*results, atol=0, rtol=0)
