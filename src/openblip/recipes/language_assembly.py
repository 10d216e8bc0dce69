"""A language model and its vocabulary from nothing: built as a run says, and written for BLIP-2 to freeze."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from openblip.data.fields import text_field
from openblip.data.sources import Mixture
from openblip.data.transforms import Preprocessing
from openblip.errors import ConfigError, OpenBlipError
from openblip.models.language_model import LanguageModel, wrap_language_model
from openblip.recipes.assembled import Assembled
from openblip.recipes.language_run import LanguageRun, LanguageShape
from openblip.tasks.language_pretraining import LanguagePretraining, TextProcessor

MAX_VOCABULARY_TEXTS = 10_000
END_OF_LINE = "\n"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def assemble_language_model(run: LanguageRun, mixture: Mixture) -> Assembled:
    """The language model that `run` describes, with a vocabulary of the texts in `mixture`."""
    shape = run.shape
    if shape.architecture == "opt" and run.task.max_text_tokens > shape.max_positions:
        raise ConfigError(
            f"Texts of up to {run.task.max_text_tokens} tokens: the model has {shape.max_positions} "
            "positions; lower --task.max-text-tokens."
        )
    tokenizer = train_tokenizer(_some_texts(mixture), run.vocab_size, ends=shape.architecture == "t5")
    language = new_language_model(shape, tokenizer)
    preprocessing = Preprocessing(image_size=1)  # no image is decoded
    return Assembled(
        task=LanguagePretraining(run.task, language, tokenizer=None, preprocessing=preprocessing),
        processor=TextProcessor(),
        tokenizer=None,
        preprocessing=preprocessing,
        save=lambda folder: save_language_model(folder, language),
    )


def new_language_model(shape: LanguageShape, tokenizer: Any) -> LanguageModel:
    """An OPT or T5 of transformers with random weights. OPT ends what it writes with a line break."""
    import transformers

    opt_config: Any = transformers.OPTConfig  # their settings are not typed
    t5_config: Any = transformers.T5Config
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if shape.architecture == "opt":
        decoder = transformers.OPTForCausalLM(
            opt_config(
                **special,
                bos_token_id=tokenizer.eos_token_id,
                hidden_size=shape.hidden_dim,
                word_embed_proj_dim=shape.hidden_dim,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_heads,
                ffn_dim=shape.mlp_dim,
                max_position_embeddings=shape.max_positions,
                dropout=0.0,
            )
        )
        return wrap_language_model(decoder, tokenizer, end_of_text=END_OF_LINE)
    encoder_decoder = transformers.T5ForConditionalGeneration(
        t5_config(
            **special,
            decoder_start_token_id=tokenizer.pad_token_id,
            d_model=shape.hidden_dim,
            d_kv=shape.hidden_dim // shape.num_heads,
            d_ff=shape.mlp_dim,
            num_layers=shape.num_layers,
            num_decoder_layers=shape.num_layers,
            num_heads=shape.num_heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    return wrap_language_model(encoder_decoder, tokenizer)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, ends: bool) -> Any:
    """A byte-level BPE vocabulary as a tokenizer of transformers: every text can be written and read back.

    A line break is one token, and each line begins as after a blank, so a word has one form. ends: whether
    each text is closed with the end token, as T5 has it.

    Raises ConfigError without texts.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Words
    from transformers import PreTrainedTokenizerFast

    wrapped: Any = PreTrainedTokenizerFast
    words = Words(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    words.decoder = decoders.ByteLevel()
    special = [PAD, END, UNKNOWN]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # and the line break
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = [line for text in texts for line in text.split(END_OF_LINE)]
    if not lines:
        raise ConfigError("no text to train a vocabulary on: samples need the field text")
    words.train_from_iterator(lines, trainer)
    words.add_tokens([AddedToken(END_OF_LINE, normalized=False)])
    if ends:
        words.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, words.token_to_id(END))]
        )
    return wrapped(tokenizer_object=words, pad_token=PAD, eos_token=END, bos_token=END, unk_token=UNKNOWN)


def save_language_model(folder: Path, language: LanguageModel) -> None:
    """Write a Hugging Face folder, under another name until it is whole."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    language.model.save_pretrained(partial)
    language.tokenizer.save_pretrained(partial)
    os.replace(partial, folder)


def _some_texts(mixture: Mixture) -> Iterator[str]:
    """Texts of all sources, an equal share of each, at most MAX_VOCABULARY_TEXTS."""
    for source in mixture.sources:
        left = MAX_VOCABULARY_TEXTS // len(mixture.sources)
        for shard in source.shards():
            for record in source.index(shard).records[: max(left, 0)]:
                try:
                    yield text_field(record.read(), "text")
                except (OpenBlipError, OSError):  # the loader names and counts it
                    continue
                left -= 1
