"""Linear layers whose weights are laid out for a kernel do what `nn.Linear` does."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from openblip.nn.config import TextConfig
from openblip.nn.linear import FrozenLinear, Int8Linear, PackedLinear, can_pack, replace_linear_layers
from openblip.nn.text_transformer import LanguageModelHead

CPU = torch.device("cpu")
TOLERANCE = {PackedLinear: {torch.float32: 1e-6, torch.bfloat16: 0.01}, Int8Linear: {torch.float32: 0.03}}
NEEDS_BFLOAT16 = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="no kernels for bfloat16")
CASES = [
    pytest.param(layer, dtype, marks=[NEEDS_BFLOAT16] * (layer is PackedLinear and dtype == torch.bfloat16))
    for layer, dtypes in TOLERANCE.items()
    for dtype in dtypes
]


def linear(dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 64, bias=bias).to(dtype)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, 96, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("layer", "dtype"), CASES)
def test_a_laid_out_layer_equals_the_plain_one(layer: type[FrozenLinear], dtype: torch.dtype, bias: bool) -> None:
    plain = linear(dtype, bias)
    frozen = layer(plain.weight, plain.bias)
    for shape in ((1,), (3, 5), (2, 3, 200), (0,)):
        x = rows(*shape, dtype=dtype)
        with torch.inference_mode():
            expected, found = plain(x), frozen(x)
        assert found.shape == expected.shape
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=TOLERANCE[layer][dtype], rtol=0)


@pytest.mark.parametrize("layer", [PackedLinear, Int8Linear])
def test_gradients_reach_the_input(layer: type[FrozenLinear]) -> None:
    plain = linear(torch.float32)
    frozen = layer(plain.weight, plain.bias)
    inputs = [rows(4).requires_grad_() for _ in range(2)]
    for module, x in zip((plain, frozen), inputs, strict=True):
        module(x).square().sum().backward()
    assert inputs[1].grad is not None
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=TOLERANCE[layer][torch.float32], rtol=0.05)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_the_state_is_that_of_the_plain_layer_to_the_bit() -> None:
    plain = nn.Sequential(linear(torch.float32), nn.Sequential(nn.Linear(64, 3, bias=False)))
    packed = copy.deepcopy(plain)
    replace_linear_layers(packed, PackedLinear)
    assert {type(module) for module in packed.modules()} == {nn.Sequential, PackedLinear}
    state = packed.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    assert sum(p.numel() for p in packed.parameters()) == sum(p.numel() for p in plain.parameters())
    with pytest.raises(RuntimeError, match="packed"):
        packed.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("layer", [PackedLinear, Int8Linear])
def test_copies_and_casts_are_laid_out_anew(layer: type[FrozenLinear]) -> None:
    plain = linear(torch.float32)
    frozen, x = layer(plain.weight, plain.bias), rows(7)
    with torch.inference_mode():
        for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            torch.testing.assert_close(other(x), frozen(x))
        if layer is PackedLinear and not can_pack(CPU, torch.bfloat16):
            return
        half = nn.Sequential(copy.deepcopy(frozen)).to(torch.bfloat16)
        torch.testing.assert_close(half(x.bfloat16()).float(), frozen(x), atol=0.03, rtol=0)


@pytest.mark.parametrize("layer", [PackedLinear, Int8Linear])
def test_a_look_at_the_weight_copies_nothing(layer: type[FrozenLinear]) -> None:
    """transformers' T5 asks in every pass what dtype it has."""
    frozen = layer(linear(torch.float32).weight, None)
    assert frozen.weight is frozen.packed
    assert frozen.plain_weight().shape == (64, 96)


def test_int8_rounds_each_row_by_itself() -> None:
    """A row of large values beside it does not make a row coarser."""
    plain = linear(torch.float32)
    frozen, x = Int8Linear(plain.weight, plain.bias), rows(2)
    x[1] *= 1e4
    with torch.inference_mode():
        assert torch.equal(frozen(x)[0], frozen(x[:1])[0])
        assert torch.equal(frozen(torch.zeros(1, 96))[0], plain.bias)


def test_a_head_compares_with_packed_words_until_it_is_moved() -> None:
    torch.manual_seed(0)
    config = TextConfig(vocab_size=50, hidden_dim=96, num_heads=4)
    head, words = LanguageModelHead(config), torch.randn(50, 96)
    x = rows(2, 3)
    with torch.inference_mode():
        expected = head(x, words)
        names = list(head.state_dict())
        head.pack(words)
        assert list(head.state_dict()) == names
        torch.testing.assert_close(head(x, torch.full_like(words, torch.nan)), expected)
        torch.testing.assert_close(head.to(torch.float64)(x.double(), words.double()).float(), expected)


def test_packed_words_do_not_round_logits_to_bfloat16() -> None:
    torch.manual_seed(0)
    config = TextConfig(vocab_size=50, hidden_dim=96, num_heads=4)
    head, words, x = LanguageModelHead(config).bfloat16(), torch.randn(50, 96).bfloat16(), rows(2, 3).bfloat16()
    with torch.inference_mode():
        states = head.norm(F.gelu(head.transform(x)))
        head.pack(words)
        torch.testing.assert_close(head(x, words), F.linear(states.float(), words.float(), head.bias.float()))


def test_what_can_be_packed() -> None:
    assert can_pack(CPU, torch.float32)
    assert not can_pack(CPU, torch.float16)
    assert not can_pack(torch.device("cuda"), torch.float32)
