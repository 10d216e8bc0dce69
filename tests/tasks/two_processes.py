"""Run under torchrun by test_distributed.py: every task over this process's part of the joint batches.

Writes OUT/<task>-<rank>.pt: losses, gradients after DDP's averaging, and the queue, by step.
"""

import sys
from pathlib import Path

import torch
from test_objectives_together import make_task
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from openblip.data.batch import Batch
from openblip.training.distributed import process_group
from tiny_blip import gradients, random_batch

STEPS = 3
PER_PROCESS = 3
# Two parts per step. Texts of one part are longer than those of the other, one part shows the same image
# throughout, and ids repeat across parts and steps.
LENGTHS = [([4, 7, 5], [12, 9, 3]), ([6, 5, 4], [3, 3, 3]), ([4, 4, 10], [5, 9, 6])]
IDS = [([1, 2, 3], [2, 4, 1]), ([5, 1, 6], [7, 7, 7]), ([7, 7, 7], [7, 7, 7])]


def part(step: int, rank: int) -> Batch:
    """What one process reads at a step."""
    return random_batch(LENGTHS[step][rank], IDS[step][rank], seed=10 * step + rank)


def follow(task: nn.Module, forward: nn.Module, batches: list[Batch]) -> list[dict[str, object]]:
    """Train over the batches with plain SGD, and record each step."""
    records = []
    for step, batch in enumerate(batches):
        task.zero_grad()
        losses = forward(batch, step, torch.Generator().manual_seed(step))
        sum(losses.values()).backward()
        found = {name: grad.clone() for name, grad in gradients(task).items() if grad is not None}
        with torch.no_grad():
            for parameter in task.parameters():
                if parameter.grad is not None:
                    parameter -= 0.02 * parameter.grad
        task.after_step()
        queue = []
        if hasattr(task, "contrastive_matching"):
            queue = [x.clone() for x in task.contrastive_matching.queue.content()]
        values = {name: loss.detach() for name, loss in losses.items()}
        records.append({"losses": values, "gradients": found, "queue": queue})
    return records


def main(out: Path) -> None:
    with process_group() as process:
        for name in ("pretraining", "filtering", "captioning"):
            task = make_task(name).train()
            batches = [part(step, process.rank) for step in range(STEPS)]
            records = follow(task, DistributedDataParallel(task), batches)
            torch.save(records, out / f"{name}-{process.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
