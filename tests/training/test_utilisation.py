"""Counted operations against torch's counter and our formulas, the ceiling, and memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from openblip.models.flops import contrastive_step_flops
from openblip.training.sharding import recompute_activations
from openblip.training.utilisation import OperationCounter, StepOperations, matmul_ceiling, peak_memory
from tasks.tiny_tasks import make_task
from tiny_blip import random_batch

CPU = torch.device("cpu")


def compute(task: nn.Module, batch: Any) -> None:
    sum(task.train()(batch, 0, torch.Generator().manual_seed(0)).values()).backward()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_counted_as_its_formula_says_also_when_it_is_computed_twice(
    recomputed: bool, dtype: torch.dtype
) -> None:
    task, batch = make_task("pretraining", dropout=0.0), random_batch([8, 5, 7], [1, 2, 3])
    if recomputed:
        recompute_activations(task)
    with OperationCounter() as counter, torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        compute(task, batch)
    assert counter.total == contrastive_step_flops(task.model.config, 3, 8, 0)


def test_the_attention_kernel_of_cpus_counts_as_its_products() -> None:
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    with OperationCounter() as counter:
        nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()
    assert counter.total == 3 * (2 * 2 * 2 * 3 * 5 * 5 * 8)


def test_every_batch_counts_and_each_shape_is_looked_at_once() -> None:
    operations, layer, seen = StepOperations(), nn.Linear(4, 5), []
    batches = [random_batch([length] * size, range(size)) for length, size in ((6, 2), (6, 2), (8, 2), (6, 3), (6, 3))]
    for batch in batches:
        with operations.of(batch):
            seen.append(_get_current_dispatch_mode() is not None)
            layer(torch.ones(len(batch), 4))
    assert seen == [True, False, True, True, False]
    assert operations.total == 2 * 4 * 5 * (2 + 2 + 2 + 3 + 3)
    assert replace(batches[0], keys=["other", "keys"]).shape == batches[0].shape


def test_the_ceiling_is_the_speed_of_a_product() -> None:
    ceiling = matmul_ceiling(CPU, torch.float32)
    assert 1e9 < ceiling < 1e14
    assert matmul_ceiling(CPU, torch.float32) == ceiling


def test_peak_memory_is_in_gigabytes() -> None:
    before = peak_memory(CPU)
    used = torch.ones(int(before * 1e9 + 2e8) // 4)
    assert peak_memory(CPU) == pytest.approx(used.numel() * 4e-9 + before, rel=0.5)
    assert peak_memory(CPU) > before
