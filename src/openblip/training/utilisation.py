"""How well a training uses its machine: counted operations, the ceiling that they are a share of, and memory."""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from openblip.data.batch import Batch

LARGEST_PRODUCT = 8192
ENOUGH_SECONDS = 0.015


@cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest product of two square matrices on a device, measured once in a process.

    The sizes grow until a product takes long enough that starting it does not count.
    """
    best, size, seconds = 0.0, 512, 0.0
    while seconds < ENOUGH_SECONDS and size <= LARGEST_PRODUCT:
        left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        seconds = min(_seconds(partial(torch.matmul, left, right), device) for _ in range(4))
        best, size = max(best, 2 * size**3 / seconds), 2 * size
    return best


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, with the work that it starts on a GPU."""
    started = time.perf_counter()
    result = call()
    if device.type != "cpu":
        assert isinstance(result, Tensor)
        result[0, 0].item()
    return time.perf_counter() - started


def _of_attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _of_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return 2 * _of_attention(query, key, value)  # torch counts the scores that the kernels compute again, too


def _formulas() -> dict[Any, Callable[..., int]]:
    """From an operation to a function of its arguments: torch's, and those of the kernels of attention."""
    formulas: dict[Any, Callable[..., int]] = dict(flop_registry)
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        formulas[getattr(torch.ops.aten, f"_scaled_dot_product_{kind}")] = _of_attention
        formulas[getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_backward")] = _of_attention_backward
    return formulas


class OperationCounter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention, as torch's FlopCounterMode
    does, but also in the CPU's attention kernel, and not what activation checkpointing computes again: that is what a
    backward pass records for gradients.
    """

    formulas: ClassVar[dict[Any, Callable[..., int]]] = _formulas()

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            in_backward = torch._C._current_graph_task_id() != -1
            if not (in_backward and torch.is_grad_enabled()):
                self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


class StepOperations:
    """The operations of all micro-batches so far. They are counted in one batch of each shape: counting takes time."""

    def __init__(self) -> None:
        self.total = 0
        self._by_shape: dict[Any, int] = {}

    @contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """Within this context the losses and gradients of a batch are computed."""
        shape = batch.shape
        if shape in self._by_shape:
            yield
        else:
            with OperationCounter() as counter:
                yield
            self._by_shape[shape] = counter.total
        self.total += self._by_shape[shape]


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used, in GB: on its GPU, or else of RAM (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return 0.0
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step.

    Otherwise it returns the activations of every step to the system, which clears the memory anew: an eighth of a
    pre-training step of BLIP-base on a CPU. Other C libraries stay as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # nothing is trimmed
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
