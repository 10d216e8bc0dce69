"""Sums and rows across processes, so that W processes of B samples train as one of W * B.

Without a process group every function is the identity, so objectives are written once.
B local batch, W processes, G = W * B global batch.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather as all_gather_with_gradient

Item = TypeVar("Item")


def world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


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
    longest = torch.tensor(x.shape[1], device=x.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    padded = x.new_full((x.shape[0], int(longest)), fill)
    padded[:, : x.shape[1]] = x
    return gather(padded)


def global_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean over all processes of local values and weights of one shape, as a local scalar.

    Scaled so that the average which DDP takes over processes has the gradient of the mean over the joint
    batch, also when processes hold different numbers of counted tokens. Zero when nothing counts.
    """
    total = weights.sum().to(values.dtype)
    if world_size() > 1:
        dist.all_reduce(total)
    return world_size() * (values * weights).sum() / total.clamp_min(torch.finfo(values.dtype).tiny)


def local_rows(x: Tensor, local_size: int) -> Tensor:
    """This process's rows of something (G, ...) that every process holds."""
    start = rank() * local_size
    return x[start : start + local_size]


def gather_objects(items: list[Item]) -> list[Item]:
    """The lists of all processes one after the other, of anything that pickles."""
    if world_size() == 1:
        return items
    parts: list[list[Item]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
