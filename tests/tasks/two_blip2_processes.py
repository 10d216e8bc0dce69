"""Run under torchrun by test_blip2_distributed.py: BLIP-2's tasks over this process's part of joint batches.

Writes OUT/<run>-<rank>.pt: losses and gradients after DDP's averaging, by step.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from tiny_blip2_tasks import make_blip2, prompted, texts
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import STEPS, part

from openblip.data.batch import Batch
from openblip.distributed import process_group
from openblip.tasks.base import Blip2Task
from tiny_blip import gradients

# By name of a run: its task, and whether the image encoder is trained too.
RUNS = {
    "stage1": ("stage1", False),
    "retrieval": ("stage1", True),
    "stage2-opt": ("stage2-opt", False),
    "stage2-t5": ("stage2-t5", False),
    "vqa": ("vqa", True),
    "instruct": ("instruct", False),
}
# Words of the texts, by step and process: one reads longer texts, more of them, or only single words.
WORDS = [([3, 8, 5], [9, 2, 6]), ([1, 1, 1], [4, 7, 7]), ([12, 3, 4], [2, 5, 9])]
ROWS = [([[2], [3, 1]], [[4, 1, 2], [1]]), ([[1, 1], [5]], [[2], [2]]), ([[3], [3]], [[1, 2, 3], [4, 4]])]


def make(name: str) -> Blip2Task:
    task_name, train_vision = RUNS[name]
    return make_blip2(task_name, train_vision=train_vision)[0].train()


def part_of(name: str, step: int, rank: int) -> Batch:
    """What one process of a run reads at a step."""
    seed = 10 * step + rank
    match RUNS[name][0]:
        case "stage1":
            return part(step, rank)
        case "vqa" | "instruct":
            return prompted(ROWS[step][rank], seed)
        case _:
            return texts(WORDS[step][rank], seed)


def measure(task: nn.Module, forward: nn.Module, batches: list[Batch]) -> list[dict[str, Any]]:
    """Losses and gradients of each batch at the same weights: updates would multiply the rounding."""
    records = []
    for step, batch in enumerate(batches):
        task.zero_grad()
        losses = forward(batch, step, torch.Generator().manual_seed(step))
        sum(losses.values()).backward()
        found = {name: grad.clone() for name, grad in gradients(task).items() if grad is not None}
        records.append({"losses": {name: loss.detach() for name, loss in losses.items()}, "gradients": found})
    return records


def main(out: Path) -> None:
    with process_group() as process:
        for name in RUNS:
            task = make(name)
            batches = [part_of(name, step, process.rank) for step in range(STEPS)]
            torch.save(measure(task, DistributedDataParallel(task), batches), out / f"{name}-{process.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
