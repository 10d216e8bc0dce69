"""BLIP-2 of seconds around a frozen ViT and a frozen OPT, trained over this process's share of every joint batch.

python two_trainers.py OUT whole|resumed, run under torchrun by test_sharded.py, writes OUT/<name>/, the folder of a
run, and OUT/<name>-<rank>.pt: how many numbers of the divided weights the process kept while training, and what it has
at the end.

B rows, S side of the image.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers
from torch import nn
from torch.distributed.tensor import DTensor

from generated_loader import GeneratedLoader
from openblip.data.batch import ImageTextBatch
from openblip.data.config import Preprocessing
from openblip.data.loader import LoadedBatch
from openblip.distributed import Process, process_group
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, LanguageConfig
from openblip.models.language_model import LanguageModel, wrap_language_model
from openblip.nn.config import QFormerConfig, VisionConfig
from openblip.tasks.base import Task
from openblip.tasks.config import Blip2Stage1Config, Blip2Stage2Config
from openblip.tasks.contrastive import Blip2Stage1
from openblip.tasks.language_model import Blip2Stage2, PromptedBatch
from openblip.training.config import TrainingConfig
from openblip.training.run_folder import RunFolder
from openblip.training.trainer import Trainer
from tiny_blip import SIZE, random_batch, randomise, tiny_tokenizer

TEXTS = ["a dog", "two big dogs", "a small red dog left of a cat", "cats", "a cat and a big dog", "big red cats"]
VISION = VisionConfig(image_size=SIZE, patch_size=8, hidden_dim=24, num_layers=2, num_heads=3, mlp_dim=40)
TOKENIZER = tiny_tokenizer()


def tiny_opt(seed: int = 0, *, lora: bool = False, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Two layers with random weights; with `lora`, peft's adapters beside the projections of attention."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    entries = [*special.values(), *sorted({word for text in TEXTS for word in text.split()})]
    words = Words(models.WordLevel({word: number for number, word in enumerate(entries)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    config = transformers.OPTConfig(
        vocab_size=len(entries),
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model: Any = transformers.OPTForCausalLM(config)
    randomise(model, seed)
    model = model.to(dtype)
    if lora:
        import peft

        torch.manual_seed(1)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, settings)
    return wrap_language_model(model, tokenizer)


def tiny_blip2(language: LanguageModel | None, dropout: float = 0.0) -> Blip2:
    """With the heads of stage 1, or with a language model that of stage 2; both towers are frozen."""
    shape: dict[str, Any] = {"num_queries": 3, "hidden_dim": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 32}
    config = Blip2Config(
        vision=VISION,
        qformer=QFormerConfig(**shape, vocab_size=TOKENIZER.vocab_size, max_positions=40, dropout=dropout),
        embed_dim=8,
        heads=("itc", "itm", "itg") if language is None else ("llm",),
        language=None if language is None else LanguageConfig(name="tiny", hidden_dim=language.hidden_dim),
    )
    model = Blip2(config)
    randomise(model, seed=0)
    model.language = language
    return model.freeze("vision", "language")


def stage2(*, dropout: float = 0.0, **language: Any) -> Task:
    """Stage 2 with a frozen OPT; language: as `tiny_opt` takes it."""
    model = tiny_blip2(tiny_opt(**language), dropout)
    return Blip2Stage2(Blip2Stage2Config(), model, None, Preprocessing(image_size=SIZE))


def stage1() -> Task:
    """Stage 1, without a language model."""
    return Blip2Stage1(Blip2Stage1Config(), tiny_blip2(None), TOKENIZER, Preprocessing(image_size=SIZE))


def texts_at(number: int, rows: slice) -> PromptedBatch:
    """Rows of the joint batch of four that one step, or one of its micro-batches, sees."""
    pixels = random_batch([3] * 4, [10 * number + row for row in range(4)]).pixels
    texts = [TEXTS[(number + row) % len(TEXTS)] for row in range(4)]
    names = [f"{number}-{row}" for row in range(4)]
    count = len(names[rows])
    return PromptedBatch(
        pixels=pixels[rows], keys=names[rows], shards=names[rows], prompts=[""] * count, texts=texts[rows],
        owners=torch.arange(count), weights=torch.ones(count),
    )  # fmt: skip


def pairs_at(number: int, rows: slice) -> ImageTextBatch:
    """The same of pairs with the Q-Former's tokens."""
    whole = random_batch([4, 6, 5, 7], [10 * number + row for row in range(4)], seed=number)
    fields = {name: getattr(whole, name)[rows] for name in ("pixels", "captions", "image_ids", "keys", "shards")}
    return ImageTextBatch(tokens=type(whole.tokens)(whole.tokens.ids[rows], whole.tokens.mask[rows]), **fields)


def loader_of(
    batch_at: Callable[[int, slice], Any], rows: slice, before: Callable[[int], None] = lambda number: None
) -> Callable[[dict[str, Any] | None], Any]:
    """Endless batches; the cursor is the number of the next, of which `before` is told."""

    def at(cursor: dict[str, Any] | None) -> Iterator[LoadedBatch]:
        number = 0 if cursor is None else int(cursor["next"])
        while True:
            before(number)
            yield LoadedBatch(batch_at(number, rows), {"next": number + 1, "positions": {}}, [])
            number += 1

    return lambda cursor: GeneratedLoader(at(cursor))


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """What requires gradients, by name."""
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


STEPS = 5
KILLED_AT = 2 * 4  # two micro-batches a step: in the fifth step, after the checkpoint of the third
# By name of a run: what differs from `settings`, and what its task is made with.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage1": ({}, {}),
    "stage1-bf16": ({"dtype": "bfloat16"}, {}),
    "whole": ({}, {}),
    "sharded": ({"shard_frozen": True}, {}),
    "sharded-recomputed": ({"shard_frozen": True, "activation_checkpointing": True}, {}),
    "sharded-lora": ({"shard_frozen": True, "activation_checkpointing": True}, {"lora": True}),
    "bf16": ({"dtype": "bfloat16"}, {"dtype": torch.bfloat16, "lora": True}),
    "sharded-bf16": ({"dtype": "bfloat16", "shard_frozen": True}, {"dtype": torch.bfloat16, "lora": True}),
}
RESUMED: tuple[dict[str, Any], dict[str, Any]] = ({"shard_frozen": True}, {"lora": True, "dropout": 0.1})


def settings(batch_size: int, **changes: Any) -> TrainingConfig:
    rates = {"learning_rate": 1e-2, "warmup_steps": 2, "clip_norm": 0.5, "dtype": "float32"}
    every = {"log_every": 1, "checkpoint_every": 3, "keep_checkpoints": 9}
    return TrainingConfig(**{"steps": STEPS, "batch_size": batch_size, "accumulation": 2, **rates, **every, **changes})


def make(name: str, **of_task: Any) -> Task:
    torch.manual_seed(0)
    return stage1() if name.startswith("stage1") else stage2(**of_task)


def train(out: Path, name: str, process: Process, changes: Any, of_task: Any, killed: bool = False) -> dict[str, Any]:
    """A run over the rows of this process: of four, two where there are two."""
    size = 4 // process.world_size
    rows = slice(size * process.rank, size * (process.rank + 1))

    def before(number: int) -> None:
        if killed and number == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    batch_at = pairs_at if name.startswith("stage1") else texts_at
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
