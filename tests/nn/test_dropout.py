"""Dropout against its definition, with its gradient; torch's generator decides it."""

import pytest
import torch

from openblip.nn.dropout import Dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_zeroes_a_share_and_scales_the_rest(dtype: torch.dtype, probability: float) -> None:
    torch.manual_seed(0)
    x = torch.full((201, 333), 3.0, dtype=dtype, requires_grad=True)  # no multiple of four
    y = dropout(x, probability)
    assert y.dtype == dtype
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(1 - probability, abs=0.01)
    assert kept.float().mean(dim=0).std().item() < 0.05  # neither rows nor columns stick together
    torch.testing.assert_close(
        y[kept].float(), torch.full_like(y[kept].float(), 3 / (1 - probability)), rtol=1e-2, atol=0
    )
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.float(), kept / (1 - probability), rtol=1e-2, atol=0)


def test_the_generator_decides_what_is_dropped() -> None:
    x, draws = torch.ones(5, 7), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_nothing_is_dropped_in_eval_mode_and_all_at_one() -> None:
    x = torch.ones(40, 50)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not torch.equal(Dropout(0.5)(x), x)
    assert torch.equal(dropout(x, 1.0), torch.zeros_like(x))
