"""The device that this process computes on, the processes of one run, as torchrun starts them, and sums and rows across
them.

Without a process group every function works on one process, so that objectives and evaluations are written once.

B local batch, W processes, G = W * B joint batch.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather as all_gather_with_gradient
from torch.nn import functional

from openblip.errors import ConfigError

Item = TypeVar("Item")


def find_device(device: torch.device | str | int | None = None) -> torch.device:
    """A device of this machine; None takes the best there is: a CUDA GPU, then Apple's (mps), then the CPU.

    Raises ConfigError for one that torch does not know, or that is not here or cannot be used.
    """
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    device = there[0] if device is None else device
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # also says no to "meta", where nothing is computed
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"device is {device}: torch cannot compute there on this machine; choose {' or '.join(there)}."
        ) from error
    return found


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without them it may take twenty times as long as float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


class Process(NamedTuple):
    """This process among the run's."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def training_device() -> torch.device:
    """Where this process trains: on its own GPU, or on the CPU."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")


@contextmanager
def process_group() -> Iterator[Process]:
    """Join torchrun's group: NCCL with GPUs, gloo without. A lost process ends the run after 10 minutes."""
    device = training_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    process = Process(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)
    if process.world_size == 1:
        yield process
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield process
    except BaseException:
        fails_first()  # before the others can notice that this process leaves
        raise
    finally:
        dist.destroy_process_group()


@cache
def fails_first() -> bool:
    """Whether no process of the run has failed before this one, which fails; it alone is to say why.

    The others fail for the same reason, or because this one has left. The store of torchrun counts; where there is
    none, every process fails first.
    """
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = cast(Any, dist).TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return bool(store.add(f"openblip/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1)
    except (KeyError, RuntimeError):
        return True


def world_size() -> int:
    """Number of processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_true(condition: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the condition holds on every process. device: where the backend communicates."""
    return all_reduce_sum([not condition], device) == [0]


def all_reduce_sum(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """The sum over processes of each value; every process gives equally many."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return [float(total) for total in sums]


def gather_objects(items: Sequence[Item]) -> list[Item]:
    """The lists of all processes one after the other, of anything that pickles."""
    if world_size() == 1:
        return list(items)
    parts: list[list[Item]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def gather(x: Tensor) -> Tensor:
    """(B, ...) of every process, the same shape everywhere -> (G, ...) in rank order. No gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(x: Tensor) -> Tensor:
    """Like `gather`, but what other processes do with a row flows back to the process that made it."""
    if world_size() == 1:
        return x
    joint = torch.cat(list(all_gather_with_gradient(x.contiguous())))
    if joint.requires_grad:  # torch exchanges gradients as if they were contiguous, without looking
        joint.register_hook(lambda gradient: gradient.contiguous())
    return joint


def gather_padded(x: Tensor, fill: int | bool) -> Tensor:
    """(B, T) with T different by process -> (G, max T), padded on the right with `fill`. No gradient."""
    if world_size() == 1:
        return x.detach()
    longest = int(gather(x.new_tensor([x.shape[1]], dtype=torch.int64)).max())
    return gather(functional.pad(x, (0, longest - x.shape[1]), value=fill))


def global_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean over all processes of local values and weights of one shape, as a local scalar.

    Scaled so that the average which DDP takes over processes has the gradient of the mean over the joint batch, also
    when processes hold different numbers of counted tokens. Zero when nothing counts.
    """
    total = weights.sum().to(values.dtype)
    if world_size() > 1:
        dist.all_reduce(total)
    return world_size() * (values * weights).sum() / total.clamp_min(torch.finfo(values.dtype).tiny)


def local_rows(x: Tensor, local_size: int) -> Tensor:
    """This process's rows of something (G, ...) that every process holds."""
    return x[rank() * local_size :][:local_size]
