"""Weights of float32 with which a step computes in bfloat16."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn


@contextmanager
def bfloat16_weights(module: nn.Module, kept: Iterable[Tensor] = ()) -> Iterator[None]:
    """Within this context, in which losses and gradients are computed, a module has its float32 weights in bfloat16.

    They are cast once, and gradients reach the float32 weights. Activations are bfloat16 as well, where autocast casts
    at many places and, on a GPU, computes norms in float32. Single numbers, such as a temperature, stay as they are,
    and so do the weights `kept`. Backward passes belong into the context: activation checkpointing computes forward
    passes again there.
    """
    left_alone = {id(weight) for weight in kept}
    casts: dict[int, Tensor] = {}
    changed: list[tuple[nn.Module, str, nn.Parameter]] = []
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is None or not weight.ndim or weight.dtype != torch.float32 or id(weight) in left_alone:
                continue
            changed.append((part, name, weight))
            if id(weight) not in casts:
                casts[id(weight)] = weight.bfloat16()
    try:
        for part, name, weight in changed:
            part._parameters[name] = cast(nn.Parameter, casts[id(weight)])
        yield
    finally:
        for part, name, weight in changed:
            part._parameters[name] = weight
