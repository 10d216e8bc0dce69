"""Losses and gradients of a micro-batch never read a number from the device, which a GPU would have to catch up for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_tasks import dialogs, make_blip2, make_task, questions, statements, train_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_blip import random_batch

READING = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal", "aten.masked_select")


class Reads(TorchDispatchMode):
    """Which operations gave numbers or sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func._overloadpacket) in READING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


PAIRS = random_batch([8, 5, 7], [1, 2, 3])
CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "pretraining": (lambda: make_task("pretraining"), PAIRS),
    "filtering": (lambda: make_task("filtering"), PAIRS),
    "albef": (lambda: make_task("albef"), PAIRS),
    "prefix": (lambda: make_task("prefix"), PAIRS),
    "captioning": (lambda: make_task("captioning"), PAIRS),
    "vqa": (lambda: make_task("vqa"), questions([5, 4], [[3], [4, 3]])),
    "nlvr": (lambda: make_task("nlvr"), statements([5, 4], [0, 1])),
    "visdial": (lambda: make_task("visdial"), dialogs([5, 4], [6, 5, 4, 6])),
    "stage1": (lambda: make_blip2("stage1")[0], PAIRS),
}


@pytest.mark.parametrize("name", CASES)
def test_a_micro_batch_reads_nothing_from_the_device(name: str) -> None:
    make, batch = CASES[name]
    task = make()
    train_step(task, batch)  # what is read once may be read here
    with Reads() as reads:
        sum(task(batch, 1, torch.Generator()).values()).backward()
        task.after_step()
    assert reads.found == []
