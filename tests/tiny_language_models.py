"""Language models of transformers with random weights, by architecture and by kind of tokenizer.

R rows, Q visual prompts, Dl width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from openblip.models.language_model import LanguageModel, wrap_language_model
from tiny_blip import randomise

DIM = 16
PAD, START, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SENTENCES = [
    "a small red dog left of two big blue cats",
    "Question: how many dogs are there? Answer: two",
    "a photo of a tree\nand a big dog\n\n",
]


def word_tokenizer(template: str) -> Any:
    """One token a word, numbered from 4 by the alphabet. template: where <s> and </s> stand around $A."""
    words = sorted({word for text in SENTENCES for word in text.replace("?", " ?").replace(":", " :").split()})
    vocab = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokens = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrapped(tokens, template)


def byte_tokenizer(template: str) -> Any:
    """Byte pairs as GPT-2 has them: the blank before a word belongs to the word."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokens.train_from_iterator(SENTENCES * 3, trainer)
    return wrapped(tokens, template)


def wrapped(tokens: Tokenizer, template: str) -> Any:
    tokens.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", START), ("</s>", END)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


ENDS = {"bos_token_id": START, "eos_token_id": END}
SMALL = {"hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
UNTIED = {"tie_word_embeddings": False}
# Every architecture: what its tokenizer has around a text, and its settings.
MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "opt": ("<s> $A", "OPTConfig", "OPTForCausalLM", {
        "hidden_size": DIM, "word_embed_proj_dim": DIM, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": PAD, **ENDS, **UNTIED,
    }),
    "gpt2": ("$A", "GPT2Config", "GPT2LMHeadModel", {
        "n_embd": DIM, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "bos_token_id": END, "eos_token_id": END, **UNTIED,
    }),
    "llama": ("<s> $A", "LlamaConfig", "LlamaForCausalLM", {
        **SMALL, "num_key_value_heads": 1, "max_position_embeddings": 64, **ENDS,
    }),
    "qwen2": ("$A", "Qwen2Config", "Qwen2ForCausalLM", {
        **SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": END, **UNTIED,
    }),
    "t5": ("$A </s>", "T5Config", "T5ForConditionalGeneration", {
        "d_model": DIM, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
        "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD, **UNTIED,
    }),
    "bart": ("<s> $A </s>", "BartConfig", "BartForConditionalGeneration", {
        "d_model": DIM, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
        "dropout": 0.0, "scale_embedding": True, "pad_token_id": PAD, **ENDS, "decoder_start_token_id": END,
        "forced_eos_token_id": END, **UNTIED,
    }),
}  # fmt: skip
CAUSAL, SEQ2SEQ = ("opt", "gpt2", "llama", "qwen2"), ("t5", "bart")
TOKENIZERS = {"words": word_tokenizer, "bytes": byte_tokenizer}


def untrained(name: str, vocab_size: int) -> Any:
    _, config, model, settings = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(vocab_size=vocab_size, **settings)).eval()


def tiny_language_model(name: str, words: str = "words", end_of_text: str | None = None) -> LanguageModel:
    """In eval mode, with weights that make texts differ and some of them end."""
    tokenizer = TOKENIZERS[words](MODELS[name][0])
    model = untrained(name, len(tokenizer))
    randomise(model, seed=3, scale=0.4)
    language = wrap_language_model(model, tokenizer, end_of_text)
    with torch.no_grad():
        model.get_output_embeddings().weight[language.end_id] *= 2
    return language


def visual_prompts(rows: int, count: int = 3, seed: int = 5) -> Tensor:
    """float (R, Q, Dl)."""
    return torch.randn(rows, count, DIM, generator=torch.Generator().manual_seed(seed))


def tokens_of(language: LanguageModel, ids: Sequence[int]) -> list[str]:
    """As the vocabulary spells them."""
    found: list[str] = language.tokenizer.convert_ids_to_tokens(list(ids))
    return found
