"""Run under torchrun by test_distributed.py: every task over this process's part of the joint batches.

Writes OUT/<task>-<rank>.pt: losses, gradients after DDP's averaging, and the queue, by step; and
OUT/run, a run of the trainer.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_tasks import dialogs, make_blip2, make_task, prompted, questions, statements, texts, videos
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from generated_loader import GeneratedLoader
from openblip.data.batch import Batch, ImageTextBatch
from openblip.data.loader import LoadedBatch
from openblip.data.sample import Reject
from openblip.distributed import Process, process_group
from openblip.training.config import TrainingConfig
from openblip.training.run_folder import RunFolder
from openblip.training.trainer import Trainer
from tiny_blip import gradients, random_batch

STEPS = 3
PER_PROCESS = 3
# Two parts per step. Texts of one part are longer than those of the other, one part shows the same image
# throughout, and ids repeat across parts and steps.
LENGTHS = [([4, 7, 5], [12, 9, 3]), ([6, 5, 4], [3, 3, 3]), ([4, 4, 10], [5, 9, 6])]
IDS = [([1, 2, 3], [2, 4, 1]), ([5, 1, 6], [7, 7, 7]), ([7, 7, 7], [7, 7, 7])]


# By name of a run: its task; some pairs have videos in place of images.
RUNS = {
    "pretraining": "pretraining", "filtering": "filtering", "captioning": "captioning", "video-retrieval": "filtering",
    "in-batch": "in-batch", "albef": "albef", "prefix": "prefix", "vqa": "vqa", "nlvr": "nlvr", "visdial": "visdial",
}  # fmt: skip
# Of BLIP-2: its task, and whether the image encoder is trained too.
BLIP2_RUNS = {
    "blip2-stage1": ("stage1", False), "blip2-retrieval": ("stage1", True), "blip2-stage2-opt": ("stage2-opt", False),
    "blip2-stage2-t5": ("stage2-t5", False), "blip2-vqa": ("vqa", True), "blip2-instruct": ("instruct", False),
}  # fmt: skip
# Words of BLIP-2's texts, by step and process: one reads longer texts, more of them, or only single words.
WORDS = [([3, 8, 5], [9, 2, 6]), ([1, 1, 1], [4, 7, 7]), ([12, 3, 4], [2, 5, 9])]
ROWS = [([[2], [3, 1]], [[4, 1, 2], [1]]), ([[1, 1], [5]], [[2], [2]]), ([[3], [3]], [[1, 2, 3], [4, 4]])]


def make(name: str) -> nn.Module:
    """The task of a run, in training mode."""
    if name in RUNS:
        return make_task(RUNS[name]).train()
    task_name, train_vision = BLIP2_RUNS[name]
    return make_blip2(task_name, train_vision=train_vision)[0].train()


def part(step: int, rank: int) -> ImageTextBatch:
    """The pairs that one process reads at a step."""
    return random_batch(LENGTHS[step][rank], IDS[step][rank], seed=10 * step + rank)


def part_of(name: str, step: int, rank: int) -> Batch:
    """What one process of a run reads at a step; of answers, one may read many more than the other."""
    lengths, seed = LENGTHS[step][rank], 10 * step + rank
    match name:
        case "video-retrieval":
            return videos(lengths, IDS[step][rank], 2, seed)
        case "vqa":
            return questions(lengths, [[3], [4, 6, 3][: 1 + 2 * rank], [5]], seed)
        case "nlvr":
            return statements(lengths, [step % 2, rank, 1], seed)
        case "visdial":
            return dialogs(lengths, [length for length in lengths for _ in range(2)], seed)
        case "blip2-vqa" | "blip2-instruct":
            return prompted(ROWS[step][rank], seed)
        case "blip2-stage2-opt" | "blip2-stage2-t5":
            return texts(WORDS[step][rank], seed)
        case _:
            return part(step, rank)


def follow(name: str, forward: nn.Module, task: nn.Module, batches: list[Batch]) -> list[dict[str, object]]:
    """Train over the batches with plain SGD, and record each step; BLIP-2 keeps its weights, because updates would
    multiply the rounding.
    """
    records, rate = [], 0.02 if name in RUNS else 0.0
    for step, batch in enumerate(batches):
        task.zero_grad()
        losses = forward(batch, step, torch.Generator().manual_seed(step))
        sum(losses.values()).backward()
        found = {name: grad.clone() for name, grad in gradients(task).items() if grad is not None}
        with torch.no_grad():
            for parameter in task.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
        task.after_step()
        queue = []
        if hasattr(task, "queue"):
            queue = [x.clone() for x in task.queue.content()]
        values = {name: loss.detach() for name, loss in losses.items()}
        records.append({"losses": values, "gradients": found, "queue": queue})
    return records


def train(out: Path, process: Process, batch_at: Callable[[int], ImageTextBatch], rejecting: bool) -> None:
    """A run of the trainer with two micro-batches per step; the third skips a sample where `rejecting`."""

    def loader(cursor: dict[str, Any] | None) -> Iterator[LoadedBatch]:
        number = 0
        while True:
            rejects = [Reject("0000", "bad", "no image")] if rejecting and number == 2 else []
            yield LoadedBatch(batch_at(number % STEPS), {"next": number + 1, "positions": {}}, rejects)
            number += 1

    out.mkdir(exist_ok=True)
    config = TrainingConfig(
        steps=3, batch_size=PER_PROCESS, accumulation=2, dtype="float32", log_every=1, clip_norm=1.0
    )
    task = make_task("pretraining")
    Trainer(task, lambda cursor: GeneratedLoader(loader(cursor)), config, RunFolder(out), process).run()  # type: ignore[arg-type]


def main(out: Path) -> None:
    with process_group() as process:
        train(out / "run", process, lambda number: part(number, process.rank), rejecting=process.rank == 1)
        for name in [*RUNS, *BLIP2_RUNS]:
            task = make(name).to(process.device)
            batches = [part_of(name, step, process.rank).to(process.device) for step in range(STEPS)]
            records = follow(name, DistributedDataParallel(task), task, batches)
            torch.save(records, out / f"{name}-{process.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
