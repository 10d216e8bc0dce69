"""BLIP-2 of seconds around a frozen ViT and a frozen OPT, with the batches that train it.

B rows, S side of the picture.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers
from torch import nn

from openblip.data.batch import ImageTextBatch
from openblip.data.config import Preprocessing
from openblip.data.loader import LoadedBatch
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, LanguageConfig, QFormerConfig, VisionConfig
from openblip.models.language_model import LanguageModel, wrap_language_model
from openblip.tasks.base import Task
from openblip.tasks.config import Blip2Stage1Config, Blip2Stage2Config
from openblip.tasks.contrastive import Blip2Stage1
from openblip.tasks.language_model import Blip2Stage2, PromptedBatch
from tiny_blip import SIZE, random_batch, randomise, tiny_tokenizer

TEXTS = ["a dog", "two big dogs", "a small red dog left of a cat", "cats", "a cat and a big dog", "big red cats"]
VISION = VisionConfig(image_size=SIZE, patch_size=8, hidden_dim=24, num_layers=2, num_heads=3, mlp_dim=40)
TOKENIZER = tiny_tokenizer()


def tiny_opt(seed: int = 0, *, lora: bool = False, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Two layers with random weights; with `lora`, peft's adapters beside the projections of attention."""
    words = sorted({word for text in TEXTS for word in text.split()})
    vocab = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokens = Words(models.WordLevel(vocab, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.OPTConfig(
        vocab_size=len(vocab),
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


def tiny_blip2(language: LanguageModel | None, dropout: float = 0.0, **qformer: Any) -> Blip2:
    """With the heads of stage 1, or with a language model that of stage 2; both towers are frozen."""
    config = Blip2Config(
        vision=VISION,
        qformer=QFormerConfig(
            num_queries=3,
            hidden_dim=24,
            num_layers=2,
            num_heads=3,
            mlp_dim=32,
            vocab_size=TOKENIZER.vocab_size,
            max_positions=40,
            dropout=dropout,
            **qformer,
        ),
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
    return ImageTextBatch(
        pixels=whole.pixels[rows],
        tokens=type(whole.tokens)(whole.tokens.ids[rows], whole.tokens.mask[rows]),
        captions=whole.captions[rows],
        image_ids=whole.image_ids[rows],
        keys=whole.keys[rows],
        shards=whole.shards[rows],
    )


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

    return at


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """What requires gradients, by name."""
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
