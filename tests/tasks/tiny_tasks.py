"""Every training task over a tiny random model, and batches for each of them.

B batch, F frames, S image size, A answers, K answers of a dialog.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.data.batch import Batch, ImageTextBatch
from openblip.data.config import DataConfig, Preprocessing
from openblip.data.tokenizer import Tokens
from openblip.models.blip import Blip
from openblip.nn.config import Sharing
from openblip.tasks.base import Blip2Task
from openblip.tasks.catalog import TASKS
from openblip.tasks.config import (
    Blip2Stage1Config,
    Blip2Stage2Config,
    Blip2TaskConfig,
    BlipTaskConfig,
    CaptioningConfig,
    ContrastiveConfig,
    InBatchConfig,
    InstructionConfig,
    NlvrConfig,
    PrefixConfig,
    PretrainingConfig,
    PromptedAnsweringConfig,
    QuestionAnsweringConfig,
    RetrievalConfig,
    VisdialConfig,
)
from openblip.tasks.language_model import PromptedBatch
from openblip.tasks.nlvr import StatementBatch
from openblip.tasks.question_answering import QuestionBatch
from openblip.tasks.visdial import DialogBatch
from tiny_blip import SIZE, TINY, random_batch, random_tokens, randomise, tiny_tokenizer
from tiny_blip2 import tiny_blip2

TOKENIZER = tiny_tokenizer()
CONTRASTIVE = ContrastiveConfig(queue_size=7, momentum=0.9, alpha=0.4, alpha_ramp_steps=4)
SMOOTHING = 0.1
CONFIGS: dict[str, BlipTaskConfig] = {
    "pretraining": PretrainingConfig(contrastive=CONTRASTIVE),
    "filtering": RetrievalConfig(contrastive=CONTRASTIVE),
    "in-batch": PretrainingConfig(contrastive=InBatchConfig(label_smoothing=SMOOTHING), negatives="random"),
    "clip": PretrainingConfig(objectives=("itc",), contrastive=InBatchConfig()),
    "itc+lm": PretrainingConfig(objectives=("itc", "lm"), contrastive=CONTRASTIVE),
    "itm": PretrainingConfig(objectives=("itm",), negatives="random"),
    "lm": PretrainingConfig(objectives=("lm",)),
    "albef": PretrainingConfig(objectives=("itc", "itm", "mlm"), contrastive=CONTRASTIVE),
    "mlm": PretrainingConfig(objectives=("mlm",), contrastive=InBatchConfig()),
    "prefix": PrefixConfig(),
    "captioning": CaptioningConfig(prompt="a picture of "),
    "vqa": QuestionAnsweringConfig(label_smoothing=SMOOTHING),
    "nlvr": NlvrConfig(),
    "visdial": VisdialConfig(),
}
AnyBatch = TypeVar("AnyBatch", bound=Batch)


def make_task(name: str, sharing: Sharing | None = None, **text: float) -> nn.Module:
    """A task over a random model whose vocabulary is the tokenizer's."""
    # TINY's text is wider than its images, so that answers and questions cannot share cross-attention.
    own = sharing or ("none" if name == "vqa" else "all_but_sa")
    config = CONFIGS[name]
    task_class = TASKS[type(config)]
    text_config = replace(TINY.text, vocab_size=TOKENIZER.vocab_size, sharing=own, **text)
    model = Blip(replace(TINY, text=text_config, heads=task_class.heads(config)))
    randomise(model, seed=0)
    preprocessing = Preprocessing(image_size=SIZE)
    torch.manual_seed(0)
    return task_class.build(config, DataConfig(source=""), model, TOKENIZER, preprocessing)


def train_step(task: nn.Module, batch: Batch, step: int = 0) -> dict[str, Tensor]:
    """Losses and gradients of a batch, one plain update, and what follows it."""
    task.zero_grad()
    losses: dict[str, Tensor] = task(batch, step, torch.Generator().manual_seed(step))
    sum(losses.values()).backward()
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    task.after_step()
    return losses


def random_bytes(*shape: int, seed: int) -> Tensor:
    """Pixels, uint8."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(100 + seed))


def names(count: int, seed: int) -> dict[str, Any]:
    keys = [f"{seed}-{row}" for row in range(count)]
    return {"keys": keys, "shards": ["0000"] * count}


def questions(
    lengths: Sequence[int], answers: Sequence[Sequence[int]], seed: int = 0, frames: int | None = None
) -> QuestionBatch:
    """`answers`: the lengths of each question's answers, whose weights are 1, 1/2, ..."""
    count = len(lengths)
    shape = (count, 3, SIZE, SIZE) if frames is None else (count, frames, 3, SIZE, SIZE)
    return QuestionBatch(
        pixels=random_bytes(*shape, seed=seed),
        questions=random_tokens(lengths, seed),
        answers=random_tokens([length for own in answers for length in own], seed + 1),
        owners=torch.tensor([i for i, own in enumerate(answers) for _ in own]),
        weights=torch.tensor([1 / (1 + place) for own in answers for place in range(len(own))]),
        **names(count, seed),
    )


def statements(lengths: Sequence[int], labels: Sequence[int], seed: int = 0) -> StatementBatch:
    count = len(lengths)
    return StatementBatch(
        pixels=random_bytes(count, 2, 3, SIZE, SIZE, seed=seed),
        statements=random_tokens(lengths, seed),
        labels=torch.tensor(labels),
        **names(count, seed),
    )


def dialogs(captions: Sequence[int], lengths: Sequence[int], seed: int = 0) -> DialogBatch:
    """The same number of answers for each dialog, the first of them right."""
    count = len(captions)
    own = len(lengths) // count
    return DialogBatch(
        pixels=random_bytes(count, 3, SIZE, SIZE, seed=seed),
        captions=random_tokens(captions, seed),
        dialogs=random_tokens(lengths, seed + 1),
        labels=torch.tensor(([1] + [0] * (own - 1)) * count),
        **names(count, seed),
    )


def videos(lengths: Sequence[int], image_ids: Sequence[int], frames: int, seed: int = 0) -> ImageTextBatch:
    """Pairs of a video and its text."""
    pairs = random_batch(lengths, image_ids, seed)
    return replace(pairs, pixels=random_bytes(len(lengths), frames, 3, SIZE, SIZE, seed=seed))


def joined(first: AnyBatch, second: AnyBatch) -> AnyBatch:
    """The joint batch of two processes, in rank order."""
    found: dict[str, Any] = {}
    for field in fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if a is None:
            continue
        if isinstance(a, Tokens):
            found[field.name] = joined_tokens(a, b)
        elif field.name == "owners":
            found[field.name] = torch.cat([a, b + len(first)])
        else:
            found[field.name] = torch.cat([a, b]) if isinstance(a, Tensor) else a + b
    return replace(first, **found)


def joined_tokens(first: Tokens, second: Tokens) -> Tokens:
    length = max(first.ids.shape[1], second.ids.shape[1])
    pairs = ((first.ids, second.ids), (first.mask, second.mask))
    return Tokens(*(torch.cat([F.pad(x, (0, length - x.shape[1])) for x in pair]) for pair in pairs))


WORDS = ("a", "photo", "of", "small", "red", "dog", "beside", "two", "blue", "cars", "many", "cats", "it")


BLIP2_CONFIGS: dict[str, Blip2TaskConfig] = {
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
    config = BLIP2_CONFIGS[name]
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
