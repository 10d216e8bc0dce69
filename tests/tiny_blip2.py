"""Tiny BLIP-2 checkpoints with random weights: our ViT or a Hugging Face tower, and a tiny OPT or T5 that is
the frozen language model.

Each build is fresh and the same: a test may change the one that it gets.
"""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer as Words
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.data.config import Preprocessing
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, Blip2Head, LanguageConfig, Projection, TowerConfig
from openblip.models.language_model import LanguageModel, wrap_language_model
from openblip.models.vision_tower import VisionTower
from openblip.nn.config import QFormerConfig
from tiny_blip import SIZE, TINY, randomise, tiny_tokenizer

Language = Literal["opt", "t5"]

QFORMER = QFormerConfig(
    num_queries=4,
    hidden_dim=32,
    num_layers=4,
    num_heads=4,
    mlp_dim=48,
    vocab_size=tiny_tokenizer().vocab_size,
    max_positions=40,
    dropout=0.0,
)
LANGUAGE_DIM, TOWER_DIM = 16, 20
PROMPT, QUESTION_PROMPT = "a photo of", "Question: {} Answer:"
SENTENCES = [
    "a photo of a small red dog beside two blue cars",
    "Question: how many cats are there? Answer: two. Question: why? Answer: yes",
    "Question: what is it? Short answer: a big green tree",
]


def tiny_blip2(
    heads: Sequence[Blip2Head] = ("itc", "itm", "itg"),
    language: Language | None = None,
    *,
    tower: bool = False,
    instructed: bool = False,
    projection: Projection = "linear",
) -> Blip2Checkpoint:
    """In eval mode. language: what head llm writes with. tower: a CLIP of Hugging Face as image encoder."""
    if language is not None:
        heads = [*heads, "llm"]
    vision = TowerConfig(name="tiny-clip", hidden_dim=TOWER_DIM) if tower else TINY.vision
    config = Blip2Config(
        vision=vision,
        qformer=QFORMER,
        language=None if language is None else LanguageConfig(name="tiny", hidden_dim=LANGUAGE_DIM),
        embed_dim=TINY.embed_dim,
        heads=tuple(heads),
        instructed=instructed,
        projection=projection,
    )
    model = Blip2(config, tiny_tower() if tower else None, None)
    randomise(model, seed=0, scale=0.3)
    model.language = None if language is None else tiny_language_model(language)
    return Blip2Checkpoint(
        model.eval(),
        tiny_tokenizer() if config.has_text_branch else None,
        Preprocessing(image_size=SIZE),
        PROMPT if language else "",
        QUESTION_PROMPT.replace("Answer", "Short answer") if language == "t5" else QUESTION_PROMPT,
    )


def tiny_tower() -> VisionTower:
    """The image side of a CLIP, read before its last layer."""
    config = transformers.CLIPVisionConfig(
        hidden_size=TOWER_DIM,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
    )
    model = transformers.CLIPVisionModel(config).eval()
    randomise(model, seed=1, scale=0.3)
    return VisionTower(model, layer=-2)


def tiny_language_model(kind: Language) -> LanguageModel:
    """With words of its own, learned from `SENTENCES`; other ASCII is spelled in characters."""
    tokenizer = copy.deepcopy(language_tokenizer(kind))
    vocab_size = len(tokenizer)
    model: Any
    if kind == "opt":
        model = transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=vocab_size,
                hidden_size=LANGUAGE_DIM,
                word_embed_proj_dim=LANGUAGE_DIM,
                ffn_dim=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
                dropout=0.0,
                pad_token_id=1,
                bos_token_id=2,
                eos_token_id=2,
                tie_word_embeddings=False,  # what has weights at random would say one word for ever
            )
        )
    else:
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=vocab_size,
                d_model=LANGUAGE_DIM,
                d_kv=8,
                d_ff=24,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
                tie_word_embeddings=False,
            )
        )
    randomise(model, seed=2, scale=0.4)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3  # so that some texts end
    return wrap_language_model(model.eval(), tokenizer)


@cache
def language_tokenizer(kind: Language) -> Any:
    """Byte pairs; texts begin with </s> for OPT and end with it for T5, as theirs do."""
    special = {"opt": ["<s>", "<pad>", "</s>"], "t5": ["<pad>", "</s>"]}[kind]
    words = Words(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=180, special_tokens=special, initial_alphabet=[*map(chr, range(33, 127)), "Ġ"], show_progress=False
    )
    words.train_from_iterator(SENTENCES, trainer)
    end = [("</s>", words.token_to_id("</s>"))]
    words.post_processor = processors.TemplateProcessing(
        single="</s> $A" if kind == "opt" else "$A </s>", special_tokens=end
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="</s>" if kind == "opt" else None
    )


def weights_of(checkpoint: Blip2Checkpoint) -> dict[str, torch.Tensor]:
    """Copies of all weights by name."""
    return {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
