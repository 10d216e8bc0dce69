"""What all training tasks have in common, and what those of BLIP and of BLIP-2 share.

A task wraps a model and the losses that train it. Its file says which heads of the model it trains, what it takes of a
sample (a `SampleProcessor`), what its batch holds, and how its losses are computed.

B examples, R texts, F frames, S image size, N image tokens, T text tokens, D image width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from openblip.data.batch import ImageTextProcessor, SampleProcessor, pixel_reader
from openblip.data.config import DataConfig, Preprocessing
from openblip.data.tokenizer import Tokenizer, Tokens
from openblip.errors import ConfigError
from openblip.models.blip import Blip, encode_media
from openblip.models.blip2 import Blip2
from openblip.models.vision_tower import encoder_depths


class Task(nn.Module, ABC):
    """A module that holds a model and its losses. Every task has one line in `tasks.catalog`.

    config: the task's settings, its class in `tasks.config`. model: the model to train, with the task's heads.
    tokenizer: the model's own, which also makes the tokens of batches; None where the model has none. preprocessing:
    normalises pixels.
    """

    trained_heads: ClassVar[tuple[Any, ...]] = ()
    """The heads that the task trains, unless they depend on its settings."""
    needs_autocast: ClassVar[bool] = False
    """Whether training in bfloat16 leaves the choice of precision to each operation, because parts of the model have
    weights of another precision. Otherwise all trained weights are bfloat16 within a step."""
    text_model: ClassVar[str] = "model"
    """What errors call the part of the model that takes texts."""
    positions_option: ClassVar[str] = "--model.text.max-positions"
    """The option that says how many tokens a new model can take."""
    vocabulary_option: ClassVar[str] = "--tokenizer"
    """The option that gives another vocabulary for texts."""
    text_limit: ClassVar[str] = "--data.max-text-length"
    """The option that limits the tokens of texts."""

    def __init__(self, config: Any, model: Any, tokenizer: Any, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.config, self.tokenizer, self.preprocessing = config, tokenizer, preprocessing
        self.model = model

    @classmethod
    def build(cls, config: Any, data: DataConfig, model: Any, tokenizer: Any, preprocessing: Preprocessing) -> Self:
        """The task over a model; ConfigError when texts as long as `data` admits do not fit the model."""
        longest, positions = cls.longest_text(config, data, tokenizer), cls.max_positions(model)
        if positions is not None and longest > positions:
            raise ConfigError(
                f"Texts of up to {longest} tokens: the {cls.text_model} has {positions} positions (a prompt counts "
                f"too); lower --data.max-text-length, or give a new model more by {cls.positions_option}."
            )
        return cls(config, model, tokenizer, preprocessing)

    @classmethod
    def heads(cls, config: Any) -> tuple[Any, ...]:
        """The heads that the model must have, and that the task trains."""
        return cls.trained_heads

    @classmethod
    def sample_processor(cls, config: Any, data: DataConfig, question_prompt: str) -> SampleProcessor:
        """What the task takes of samples; here an image or video with one of its captions. question_prompt: how a
        question is put to a language model, with `{}` in its place.
        """
        return ImageTextProcessor(read_pixels=pixel_reader(data.num_frames), max_text_length=data.max_text_length)

    @classmethod
    def longest_text(cls, config: Any, data: DataConfig, tokenizer: Any) -> int:
        """Number of tokens of the longest text that the model is given."""
        return data.max_text_length

    @classmethod
    def max_positions(cls, model: Any) -> int | None:
        """Number of tokens that the model can take; None where `longest_text` needs no check."""
        return None

    @abstractmethod
    def forward(self, batch: Any, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Named losses of a batch, scalars with gradients, whose sum is minimised.

        batch: as the task's sample processor collates it. step: number of finished steps. generator: on the CPU and in
        the same state on every process.
        """

    def encode(self, pixels: Tensor) -> Tensor:
        """`image_features` of the task's own model and preprocessing."""
        return image_features(self.model, self.preprocessing, pixels)

    def after_step(self) -> None:
        """Called once after every optimizer step, also under gradient accumulation."""

    def frozen_parts(self) -> Sequence[nn.Module]:
        """Modules of this task that the run loads from elsewhere and never changes. Checkpoints of the run leave out
        their weights, except those that require gradients (adapters), and processes do not send them to each other. So
        weights that change in another way than by gradients, as those of a momentum model, must not be here.
        """
        return ()

    def layers_above(self) -> Mapping[str, int]:
        """For parameters of an image encoder, by name: how many layers the encoder has from there to its end. With
        layer-wise decay d a learning rate is multiplied by d to this power: for an encoder of L blocks 1 for the last,
        L for the first, L + 1 for the embeddings. Parameters that are not named have 0.
        """
        return {}


class BlipTask(Task):
    """A task over a BLIP."""

    model: Blip
    tokenizer: Tokenizer

    @classmethod
    def max_positions(cls, model: Blip) -> int:
        return model.config.text.max_positions

    def frozen_parts(self) -> Sequence[nn.Module]:
        """The image encoder, where it is frozen."""
        return self.model.frozen_parts()


class Blip2Task(Task):
    """A task over a BLIP-2, parts of which are usually frozen."""

    model: Blip2
    text_model = "Q-Former"
    positions_option = "--qformer.max-positions"

    @classmethod
    def max_positions(cls, model: Blip2) -> int | None:
        """Those of the Q-Former; the language model cuts its texts itself."""
        return model.config.qformer.max_positions if model.config.has_text_branch else None

    def frozen_parts(self) -> Sequence[nn.Module]:
        """The image encoder and the language model, where they are frozen."""
        return self.model.frozen_parts()

    def layers_above(self) -> Mapping[str, int]:
        """Those of the image encoder; Q-Former, heads and adapters learn at the full rate."""
        return {f"model.vision.{name}": depth for name, depth in encoder_depths(self.model.vision).items()}


def image_features(model: Blip | Blip2, preprocessing: Preprocessing, pixels: Tensor) -> Tensor:
    """What the image encoder makes of a batch's pixels, (B, F*N, D). pixels: uint8 images (B, 3, S, S) or videos (B, F,
    3, S, S). Float features of a cache, (B, N, D), are returned unchanged.
    """
    return pixels if pixels.is_floating_point() else encode_media(model.encode_image, preprocessing.normalize(pixels))


def replace_first(tokens: Tokens, token_id: int) -> Tokens:
    """The same texts (R, T), beginning with `token_id`."""
    ids = tokens.ids.clone()
    ids[:, 0] = token_id
    return Tokens(ids, tokens.mask)
