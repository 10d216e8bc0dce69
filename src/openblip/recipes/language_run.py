"""A training of a language model on text alone: its settings, its vocabulary and its random weights.

BLIP-2 freezes such a model; model/ of the run is a folder of Hugging Face.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from openblip.data.config import Preprocessing
from openblip.errors import ConfigError
from openblip.files import atomic_folder
from openblip.models.config import check_heads_divide
from openblip.recipes.run import Run
from openblip.tasks.config import LanguagePretrainingConfig

if TYPE_CHECKING:
    from pathlib import Path

    from openblip.data.sources import Mixture
    from openblip.models.language_model import LanguageModel

MAX_VOCABULARY_TEXTS = 10_000
END_OF_LINE = "\n"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True, kw_only=True)
class LanguageShape:
    """The shape of a language model that starts from random weights."""

    architecture: Literal["opt", "t5"]
    """opt: a decoder. t5: an encoder-decoder, as T5 1.1 and FlanT5."""
    hidden_dim: int = 128
    num_layers: int = 4
    """Layers of the decoder; for t5 the encoder has as many."""
    num_heads: int = 4
    mlp_dim: int = 512
    max_positions: int = 160
    """Visual prompts and tokens together; t5 knows only distances and has no limit."""

    def __post_init__(self) -> None:
        check_heads_divide("shape", self.hidden_dim, self.num_heads)


class LanguageCheckpoint(NamedTuple):
    """A language model in the form in which a run takes the checkpoints of BLIP and BLIP-2."""

    model: "LanguageModel"
    tokenizer: None = None  # the model has its own
    preprocessing: Preprocessing = Preprocessing(image_size=1)  # no image is decoded


@dataclass(frozen=True, kw_only=True)
class LanguageRun(Run):
    """A training of a language model from random weights."""

    shape: LanguageShape
    vocab_size: int
    """Size of the vocabulary (byte-level BPE) trained on the texts."""
    task: LanguagePretrainingConfig

    def check(self) -> None:
        super().check()
        longest, positions = self.task.max_text_tokens, self.shape.max_positions
        if self.shape.architecture == "opt" and longest > positions:
            raise ConfigError(
                f"Texts of up to {longest} tokens: the model has {positions} positions; lower --task.max-text-tokens."
            )

    def initialize(self, mixture: "Mixture") -> LanguageCheckpoint:
        from openblip.data.reader import read_texts
        from openblip.data.texts import text_field
        from openblip.distributed import gather_objects, rank

        trained = []
        if rank() == 0:
            texts = read_texts(mixture, lambda sample: [text_field(sample, "text")], MAX_VOCABULARY_TEXTS)
            trained.append(train_tokenizer(texts, self.vocab_size, ends=self.shape.architecture == "t5"))
        return LanguageCheckpoint(new_language_model(self.shape, gather_objects(trained)[0]))

    def save(self, checkpoint: LanguageCheckpoint, folder: "Path") -> None:
        with atomic_folder(folder) as partial:
            checkpoint.model.model.save_pretrained(partial)
            checkpoint.model.tokenizer.save_pretrained(partial)


def new_language_model(shape: LanguageShape, tokenizer: Any) -> "LanguageModel":
    """An OPT or T5 of transformers with random weights. OPT ends what it writes with a line break."""
    import transformers

    from openblip.models.language_model import wrap_language_model

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

    A line break is one token, and each line begins as after a space, so a word has one form. `ends`: whether
    each text is closed with the end token, as T5 has it. Raises ConfigError without texts.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    wrapped: Any = PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # one entry is left for the line break
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = [line for text in texts for line in text.split(END_OF_LINE)]
    if not lines:
        raise ConfigError("no text to train a vocabulary on: samples need the field text")
    bpe.train_from_iterator(lines, trainer)
    bpe.add_tokens([AddedToken(END_OF_LINE, normalized=False)])
    if ends:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, bpe.token_to_id(END))]
        )
    return wrapped(tokenizer_object=bpe, pad_token=PAD, eos_token=END, bos_token=END, unk_token=UNKNOWN)
