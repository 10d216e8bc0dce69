"""Run under torchrun by test_sharded.py: the trainer over this process's half of every joint batch.

python two_trainers.py OUT whole|resumed. Writes OUT/<name>/, the folder of a run, and OUT/<name>-<rank>.pt:
how many numbers of the divided weights the process kept while training, and what it has at the end.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_frozen import loader_of, pairs_at, stage1, stage2, texts_at, trained
from torch.distributed.tensor import DTensor

from openblip.distributed import Process, process_group
from openblip.tasks.base import Task
from openblip.training.config import TrainingConfig
from openblip.training.run_folder import RunFolder
from openblip.training.trainer import Trainer

STEPS = 5
KILLED_AT = 2 * 4  # two micro-batches a step: in the fifth step, after the checkpoint of the third
# By name of a run: what differs from `settings`, and what its task is made with.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage1": ({}, {}),
    "whole": ({}, {}),
    "sharded": ({"shard_frozen": True}, {}),
    "sharded-recomputed": ({"shard_frozen": True, "activation_checkpointing": True}, {}),
    "sharded-lora": ({"shard_frozen": True, "activation_checkpointing": True}, {"lora": True}),
    "bf16": ({"precision": "bf16"}, {"dtype": torch.bfloat16, "lora": True}),
    "sharded-bf16": ({"precision": "bf16", "shard_frozen": True}, {"dtype": torch.bfloat16, "lora": True}),
}
RESUMED: tuple[dict[str, Any], dict[str, Any]] = ({"shard_frozen": True}, {"lora": True, "dropout": 0.1})


def settings(batch_size: int, **changes: Any) -> TrainingConfig:
    values = {
        "steps": STEPS,
        "batch_size": batch_size,
        "accumulation": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "clip_norm": 0.5,
        "precision": "fp32",
        "log_every": 1,
        "checkpoint_every": 3,
        "keep_checkpoints": 9,
    }
    return TrainingConfig(**{**values, **changes})


def make(name: str, **of_task: Any) -> Task:
    torch.manual_seed(0)
    return stage1() if name == "stage1" else stage2(**of_task)


def train(out: Path, name: str, process: Process, changes: Any, of_task: Any, killed: bool = False) -> dict[str, Any]:
    """A run over the rows of this process: of four, two where there are two."""
    size = 4 // process.world_size
    rows = slice(size * process.rank, size * (process.rank + 1))

    def before(number: int) -> None:
        if killed and number == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    batch_at = pairs_at if name == "stage1" else texts_at
    folder = RunFolder(out / name)
    folder.path.mkdir(parents=True, exist_ok=True)
    task = make(name, **of_task)
    trainer = Trainer(task, loader_of(batch_at, rows, before), settings(size, **changes), folder, process)
    kept = sum(p.to_local().numel() for p in task.parameters() if isinstance(p, DTensor))
    assert trainer.run()
    left = [name for name, p in task.named_parameters() if isinstance(p, DTensor)]
    return {"weights": trained(task), "kept": kept, "left": left, "state": task.state_dict()}


def main(out: Path, what: str) -> None:
    with process_group() as process:
        runs = {"killed": RESUMED}
        if what == "whole":
            runs = {**RUNS, "uninterrupted": RESUMED, "killed": RESUMED}
        for name, (changes, of_task) in runs.items():
            killed = what == "whole" and name == "killed"
            result = train(out, name, process, changes, of_task, killed)
            state = {n: value for n, value in result.pop("state").items() if not isinstance(value, DTensor)}
            torch.save({**result, "state": state}, out / f"{name}-{process.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
