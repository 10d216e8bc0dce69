"""What a recipe of BLIP-2 returns: a complete run, as data. No torch here: `--help` reads it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from openblip.data.config import DataConfig
from openblip.models.config import LoraSettings, QFormerConfig
from openblip.tasks.config import Blip2TaskConfig
from openblip.training.config import TrainingConfig

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ImageEncoderSource:
    """An image encoder that somebody else has trained."""

    source: str
    """An OpenBLIP checkpoint, whose ViT is taken; a Hugging Face vision model by folder or hub name."""
    layer: int | None = None
    """Whose output is taken: -2 is the second-last layer's, -1 the last's. None is the paper's choice: the
    second-last, of an encoder that was cut there already the last."""
    dtype: Precision = "float32"


@dataclass(frozen=True, kw_only=True)
class LanguageModelSource:
    """A language model that somebody else has trained."""

    source: str
    """A causal or sequence-to-sequence model of Hugging Face, by folder or hub name."""
    end_of_text: str | None = None
    """What ends a text; None is the tokenizer's own end. BLIP-2 ends OPT's texts with a line break."""
    dtype: Precision = "float32"
    quantization: Literal["8bit", "4bit"] | None = None
    max_text_tokens: int = 32
    """Budget of a text and its prompt, the end included."""
    lora: LoraSettings | None = None
    """Adapters that are trained in a language model which else stays frozen; None trains nothing of it."""


@dataclass(frozen=True, kw_only=True)
class Blip2Run:
    """A training of a Q-Former from its data to its final weights."""

    recipe: str
    """The recipe this run began as."""
    init: str | None
    """BLIP-2 checkpoint to start from, for stage 2 that of stage 1; None starts from a new Q-Former."""
    vision: ImageEncoderSource | None
    """The image encoder; None takes the checkpoint's."""
    language: LanguageModelSource | None
    """The language model of a generative task; None takes the checkpoint's."""
    qformer: QFormerConfig | None
    """The shape of a new Q-Former; None takes the checkpoint's."""
    vocab_size: int
    """Size of the WordPiece vocabulary trained on the captions when there is no checkpoint or tokenizer."""
    tokenizer: str | None
    """Tokenizer of the Q-Former instead of a trained one: a folder, or a name on the Hugging Face hub."""
    data: DataConfig
    task: Blip2TaskConfig
    training: TrainingConfig
    out: str
    """Folder of the run."""
    embed_dim: int = 256
    """Width of the space in which ITC compares queries and texts."""
    text_init: str | None = None
    """BERT to start a new Q-Former from: a Hugging Face folder or hub name; needs that BERT's `tokenizer`."""
    text_branch: str | None = None
    """BLIP-2 checkpoint from whose Q-Former the weights are taken that read text, for a model that is to read
    instructions: stage 2 has dropped them. That of stage 1; None where `init` still has its own."""
    train_vision: bool = False
    """Also train the image encoder, as the paper does in fine-tuning; its weights become float32."""
    frozen_dtype: Precision | None = None
    """Of those of the checkpoint's image encoder and language model that stay frozen; None keeps float32."""
    max_text_tokens: int | None = None
    """Budget of a text and its prompt; None keeps that of the checkpoint or of `language`."""
    image_size: int | None = None
    """Resolution of the pictures; None keeps the image encoder's own."""
    prompt: str = "a photo of"
    """What the trained model's captions go on from, unless the caller says otherwise."""
    question_prompt: str = "Question: {} Answer:"
    """How the trained model puts a question to its language model."""
    feature_cache: str | None = None
    """Folder for the features of the frozen image encoder, computed once and then reused; None: computed at
    every step. Without augmentation only."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return asdict(self)
