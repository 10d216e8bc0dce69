"""A training of BLIP-2: its settings, and how a Q-Former is put between the models that they name."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from openblip.errors import ConfigError
from openblip.models.config import Blip2Config, LanguageConfig, LoraSettings, QFormerConfig
from openblip.recipes.run import Run, check_text_start
from openblip.tasks.config import Blip2TaskConfig

if TYPE_CHECKING:
    from openblip.checkpoints.checkpoint import Blip2Checkpoint, ImageEncoder
    from openblip.data.batch import SampleProcessor
    from openblip.data.sources import Mixture
    from openblip.models.language_model import LanguageModel

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ImageEncoderSource:
    """An image encoder that somebody else has trained."""

    source: str
    """An OpenBLIP checkpoint, whose ViT is taken; a Hugging Face vision model by folder or hub name."""
    layer: int | None = None
    """The layer whose output is taken: -2 is the second last, -1 the last. None is the paper's choice: the
    second last, or the last of an encoder that was cut there already."""
    dtype: Precision = "float32"


@dataclass(frozen=True, kw_only=True)
class LanguageModelSource:
    """A language model that somebody else has trained."""

    source: str | None = None
    """A causal or sequence-to-sequence model of Hugging Face, by folder or hub name."""
    end_of_text: str | None = None
    """What ends a text; None is the tokenizer's own end. BLIP-2 ends OPT's texts with a line break."""
    dtype: Precision = "float32"
    quantization: Literal["8bit", "4bit"] | None = None
    max_text_tokens: int = 32
    """Budget of a text and its prompt, the end included."""
    lora: LoraSettings | None = None
    """Adapters that are trained in a language model which is frozen otherwise; None trains nothing of it."""


@dataclass(frozen=True, kw_only=True)
class Blip2Run(Run):
    """A training of a Q-Former from its data to its final weights."""

    init: str | None = None
    """BLIP-2 checkpoint to start from, for stage 2 that of stage 1; None starts from a new Q-Former."""
    vision: ImageEncoderSource | None = None
    """The image encoder; None takes the checkpoint's."""
    language: LanguageModelSource | None = None
    """The language model of a generative task; None takes the checkpoint's."""
    qformer: QFormerConfig | None = None
    """The shape of a new Q-Former; None takes the checkpoint's."""
    vocab_size: int = 30524
    """Size of the WordPiece vocabulary trained on the captions when there is no checkpoint or tokenizer."""
    tokenizer: str | None = None
    """Tokenizer of the Q-Former instead of a trained one: a folder, or a name on the Hugging Face hub."""
    task: Blip2TaskConfig
    embed_dim: int = 256
    """Width of the space in which ITC compares queries and texts."""
    text_init: str | None = None
    """BERT to start a new Q-Former from: a Hugging Face folder or hub name; needs that BERT's `tokenizer`."""
    text_branch: str | None = None
    """BLIP-2 checkpoint whose Q-Former gives the weights that read text to a model that is to read
    instructions: stage 2 has dropped them. Name that of stage 1; None where `init` still has its own."""
    train_vision: bool = False
    """Also train the image encoder, as the paper does in fine-tuning; its weights become float32."""
    frozen_dtype: Precision | None = None
    """Precision of the checkpoint's image encoder and language model where they are frozen; None: float32."""
    max_text_tokens: int | None = None
    """Budget of a text and its prompt; None keeps that of the checkpoint or of `language`."""
    image_size: int | None = None
    """Resolution of the images; None keeps the image encoder's own."""
    prompt: str = "a photo of"
    """Text that the trained model's captions continue, unless the caller says otherwise."""
    question_prompt: str = "Question: {} Answer:"
    """How the trained model puts a question to its language model."""
    feature_cache: str | None = None
    """Folder for the features of the frozen image encoder, computed once and then reused; None computes them
    at every step. Without augmentation only."""

    @property
    def instructed(self) -> bool:
        """Whether the Q-Former is to read questions or instructions for its language model."""
        return bool(getattr(self.task, "instructed", False))

    def check(self) -> None:
        super().check()
        if self.init is None and self.qformer is None and self.vision is None:
            raise ConfigError(f"The recipe {self.recipe} starts from a BLIP-2 checkpoint: name one with --init.")
        if self.init is None and (self.qformer is None or self.vision is None):
            raise ConfigError("A new Q-Former needs its shape and an image encoder: --qformer and --vision.source.")
        if self.init is not None and self.text_init is not None:
            raise ConfigError("--init brings all weights: leave out --text-init, or --init.")
        check_text_start(self.init, self.text_init, self.tokenizer)
        if self.text_branch is not None and (self.init is None or not self.instructed):
            raise ConfigError("--text-branch is for a checkpoint whose Q-Former is to read instructions.")
        if self.vision is not None and not self.vision.source:
            raise ConfigError("Name the image encoder with --vision.source.")
        if self.language is not None and not self.language.source:
            raise ConfigError("Name the language model with --language.source.")

    def initialize(self, mixture: "Mixture") -> "Blip2Checkpoint":
        from openblip.checkpoints.backbones import init_qformer
        from openblip.checkpoints.checkpoint import Blip2Checkpoint
        from openblip.models.blip2 import Blip2
        from openblip.recipes.initialize import freeze_unused, make_tokenizer, take_weights

        heads = self.task_class.heads(self.task)
        start = None if self.init is None else load_blip2_checkpoint(self.init)
        encoder = self._image_encoder(start)
        language, language_config = self._language_model(start) if "llm" in heads else (None, None)
        text_branch = start if self.text_branch is None else load_blip2_checkpoint(self.text_branch)
        if start is None or text_branch is None:
            assert self.qformer is not None  # `check` has seen to it
            config = Blip2Config(qformer=self.qformer, embed_dim=self.embed_dim)
        else:  # a checkpoint's shape stays, and its text branch may come from another
            texts = text_branch.model.config.qformer
            qformer = start.model.config.qformer
            qformer = replace(qformer, vocab_size=texts.vocab_size, max_positions=texts.max_positions)
            config = replace(start.model.config, qformer=qformer)
        config = replace(
            config, vision=encoder.config, language=language_config, heads=heads, instructed=self.instructed
        )
        tokenizer = None
        if config.has_text_branch and text_branch is not None:
            if not text_branch.model.config.has_text_branch:
                raise self._no_text_branch()
            tokenizer = text_branch.tokenizer
        elif config.has_text_branch:
            tokenizer = make_tokenizer(self.tokenizer, self.vocab_size, mixture)
            # [ENC], the last token of our vocabularies, does not exist in BLIP-2.
            config = replace(config, qformer=replace(config.qformer, vocab_size=tokenizer.vocab_size - 1))
        model = Blip2(config, encoder.model, language)
        if start is not None and text_branch is not None:
            take_weights(model, start.model, text_branch.model)
        elif self.text_init is not None:
            init_qformer(model.qformer, self.text_init)
        model.freeze(*(["language"] if self.train_vision else ["vision", "language"]))
        if self.train_vision:
            freeze_unused(model, encoder.preprocessing.image_size)
        prompt = getattr(self.task, "prompt", "") or self.prompt
        return Blip2Checkpoint(model, tokenizer, encoder.preprocessing, prompt, self.question_prompt)

    def sample_processor(self, checkpoint: "Blip2Checkpoint", mixture: "Mixture") -> "SampleProcessor":
        processor = self.task_class.sample_processor(self.task, self.data, self.question_prompt)
        if self.feature_cache is None:
            return processor
        from openblip.recipes.feature_cache import cached_features

        features = cached_features(self.feature_cache, checkpoint, self.data, mixture)
        return replace(processor, read_pixels=features)

    def _image_encoder(self, start: "Blip2Checkpoint | None") -> "ImageEncoder":
        from openblip.checkpoints.backbones import resize_encoder
        from openblip.checkpoints.checkpoint import ImageEncoder
        from openblip.checkpoints.loading import load_image_encoder

        if self.vision is not None:
            # Trained in half precision the encoder would soon be NaN (LAVIS issue 409).
            dtype = as_dtype(None if self.train_vision else self.vision.dtype)
            return load_image_encoder(
                self.vision.source, layer=self.vision.layer, image_size=self.image_size, dtype=dtype
            )
        assert start is not None  # `check` has seen to it
        encoder = ImageEncoder(start.model.vision, start.model.config.vision, start.preprocessing)
        if self.image_size is not None:
            encoder = resize_encoder(encoder, self.image_size)
        encoder.model.to(as_dtype(None if self.train_vision else self.frozen_dtype))
        return encoder

    def _language_model(self, start: "Blip2Checkpoint | None") -> "tuple[LanguageModel, LanguageConfig]":
        from openblip.checkpoints.backbones import load_language_model
        from openblip.models.language_model import with_lora

        if self.language is not None:
            settings = self.language
            assert settings.source is not None  # `check` has seen to it
            dtype = as_dtype(settings.dtype)
            model = load_language_model(
                settings.source, end_of_text=settings.end_of_text, dtype=dtype, quantization=settings.quantization
            )
            if settings.lora is not None:
                with_lora(model, settings.lora)
            config = LanguageConfig(
                name=settings.source,
                hidden_dim=model.hidden_dim,
                end_of_text=settings.end_of_text,
                max_text_tokens=settings.max_text_tokens,
            )
        elif start is None or start.model.language is None or start.model.config.language is None:
            raise ConfigError(f"The recipe {self.recipe} needs a language model: name it with --language.source.")
        else:
            model, config = start.model.language, start.model.config.language
            model.to(as_dtype(self.frozen_dtype))
        if self.max_text_tokens is not None:
            config = replace(config, max_text_tokens=self.max_text_tokens)
        return model, config

    def _no_text_branch(self) -> ConfigError:
        if self.text_branch is not None:
            return ConfigError(
                f"The Q-Former of {self.text_branch} reads no text: name one of stage 1 with --text-branch."
            )
        if self.instructed:
            return ConfigError(
                f"The Q-Former is to read questions, and that of {self.init} has dropped the weights which "
                "read text: name the checkpoint of stage 1 with --text-branch, or add --task.no-instructed."
            )
        return ConfigError(
            f"The Q-Former of {self.init} reads no text, and {self.recipe} trains it on texts: start from stage 1."
        )


def load_blip2_checkpoint(source: str) -> "Blip2Checkpoint":
    """The checkpoint of BLIP-2 that `source` names; ConfigError for one of BLIP."""
    from openblip.checkpoints.checkpoint import Blip2Checkpoint
    from openblip.checkpoints.loading import load_checkpoint

    checkpoint = load_checkpoint(source)
    if not isinstance(checkpoint, Blip2Checkpoint):
        raise ConfigError(f"{source} is no checkpoint of BLIP-2; name one with --init.")
    return checkpoint


def as_dtype(precision: Precision | None) -> Any:
    """torch's type of that name; float32 for None."""
    import torch

    return getattr(torch, precision or "float32")
