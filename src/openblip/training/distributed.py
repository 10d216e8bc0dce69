"""Processes of one run, as torchrun starts them. Without torchrun everything here is one process."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist


class Process(NamedTuple):
    """This process among the run's."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(timeout_minutes: int = 10) -> Iterator[Process]:
    """Join torchrun's group: NCCL with GPUs, gloo without. A lost process ends the run by the timeout."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Process(rank, world_size, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        yield Process(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def everywhere(condition: bool, process: Process) -> bool:
    """Whether the condition holds on every process."""
    if process.world_size == 1:
        return condition
    flag = torch.tensor(int(condition), device=process.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def sum_everywhere(values: Sequence[float], process: Process) -> list[float]:
    """The sum over processes of each value; every process gives as many."""
    if process.world_size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=process.device)
    dist.all_reduce(sums)
    return [float(total) for total in sums]


def gather_texts(text: str, process: Process) -> list[str]:
    """What every process says, by rank."""
    texts = [text] * process.world_size
    if process.world_size > 1:
        dist.all_gather_object(texts, text)
    return texts


def wait_for_all(process: Process) -> None:
    """A barrier; nothing for one process."""
    if process.world_size > 1:
        dist.barrier()
