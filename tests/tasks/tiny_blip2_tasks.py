"""Every training task of BLIP-2 over a tiny random model, and batches for each of them.

B images, R rows of text.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tiny_tasks import names, random_bytes

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.data.config import DataConfig
from openblip.data.tokenizer import Tokens
from openblip.tasks.base import Blip2Task
from openblip.tasks.catalog import TASKS
from openblip.tasks.config import (
    Blip2Stage1Config,
    Blip2Stage2Config,
    Blip2TaskConfig,
    InstructionConfig,
    PromptedAnsweringConfig,
)
from openblip.tasks.language_model import PromptedBatch
from tiny_blip import SIZE, random_tokens
from tiny_blip2 import tiny_blip2

WORDS = ("a", "photo", "of", "small", "red", "dog", "beside", "two", "blue", "cars", "many", "cats", "it")


CONFIGS: dict[str, Blip2TaskConfig] = {
    "stage1": Blip2Stage1Config(),
    "stage2-opt": Blip2Stage2Config(),
    "stage2-t5": Blip2Stage2Config(),
    "vqa": PromptedAnsweringConfig(),
    "vqa-uninstructed": PromptedAnsweringConfig(instructed=False),
    "instruct": InstructionConfig(),
}


def make_blip2(name: str, *, train_vision: bool = False) -> tuple[Blip2Task, Blip2Checkpoint]:
    """A task by name: stage1, stage2-opt, stage2-t5, vqa, vqa-uninstructed or instruct."""
    if name == "stage1":
        checkpoint = tiny_blip2()
    else:
        language = "t5" if name.endswith("t5") else "opt"
        checkpoint = tiny_blip2((), language, instructed=name in ("vqa", "instruct"))
    model, preprocessing = checkpoint.model, checkpoint.preprocessing
    model.freeze(*(["language"] if train_vision else ["vision", "language"]))
    config = CONFIGS[name]
    data = DataConfig(source="")
    task = TASKS[type(config)].build(config, data, model, checkpoint.tokenizer, preprocessing)
    assert isinstance(task, Blip2Task)
    return task, checkpoint


def sentence(length: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator))


def texts(lengths: Sequence[int], seed: int = 0, prompt: str = "") -> PromptedBatch:
    """One text of so many words for each image, after a prompt that all have in common."""
    return PromptedBatch(
        pixels=random_bytes(len(lengths), 3, SIZE, SIZE, seed=seed),
        prompts=[prompt] * len(lengths),
        texts=[sentence(length, 10 * seed + row) for row, length in enumerate(lengths)],
        owners=torch.arange(len(lengths)),
        weights=torch.ones(len(lengths)),
        **names(len(lengths), seed),
    )


def prompted(lengths: Sequence[Sequence[int]], seed: int = 0, instructed: bool = True) -> PromptedBatch:
    """The lengths in words of each image's texts; weights are 1, 1/2, ..."""
    flat = [length for own in lengths for length in own]
    count = len(lengths)
    fields: dict[str, Any] = {
        "prompts": [f"Question: {sentence(1 + row % 4, 99 * seed + row)}? Answer:" for row in range(len(flat))],
        "texts": [sentence(length, 10 * seed + row) for row, length in enumerate(flat)],
        "owners": torch.tensor([i for i, own in enumerate(lengths) for _ in own]),
        "weights": torch.tensor([1 / (1 + place) for own in lengths for place in range(len(own))]),
    }
    instructions: Tokens | None = None
    if instructed:
        instructions = random_tokens([3 + (row + seed) % 5 for row in range(len(flat))], seed)
    return PromptedBatch(
        pixels=random_bytes(count, 3, SIZE, SIZE, seed=seed), instructions=instructions, **fields, **names(count, seed)
    )
