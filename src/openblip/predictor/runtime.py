"""A checkpoint on its device, and what turns pictures, clips and texts into its input.

B images, F frames of a clip, S side of the prepared picture, N image tokens, Dv their width, R texts, T text
tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from openblip.data.images import ImageInput, read_image
from openblip.data.prompts import normalize_caption
from openblip.data.tokenizer import Tokenizer, Tokens
from openblip.data.transforms import Preprocessing
from openblip.data.video import read_frames
from openblip.errors import ConfigError, UnsupportedTaskError
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.config import Mode
from openblip.predictor.batching import as_list, checked_batch_size, chunks
from openblip.predictor.images import (
    ClipInput,
    EncodedImages,
    Images,
    check_prepared,
    input_name,
    is_single,
    listed,
    picture_seed,
)

DeviceName = str | torch.device | None


def chosen_device(device: DeviceName) -> torch.device:
    """The device asked for; by default the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


class Runtime(ABC):
    """What the calls of every predictor work with; a kind of model says how it reads and embeds images."""

    model: Blip | Blip2
    tokenizer: Tokenizer | None
    preprocessing: Preprocessing
    prompt: str
    device: torch.device
    dtype: torch.dtype
    """Of encoded images."""
    max_match_tokens: ClassVar[int]
    """Of a text that is matched, as it was in training."""

    @property
    @abstractmethod
    def encoder_id(self) -> int:
        """The first token of a text that is read together with an image."""

    @property
    @abstractmethod
    def max_positions(self) -> int:
        """The most tokens of a text that the model reads or writes."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int]:
        """N and Dv, as far as they are known without a picture."""

    @property
    @abstractmethod
    def embedding_shape(self) -> tuple[int, ...]:
        """Of what `embed` gives for one image."""

    @abstractmethod
    def image_kv(self, tokens: Tensor, mode: Mode) -> Any:
        """What texts that are read or written attend to, of image tokens (B, N, Dv); for `self.model`."""

    @abstractmethod
    def embed(self, encoded: EncodedImages) -> Tensor:
        """Unit vectors (B, E), or (B, Q, E) of a model with queries."""

    def require_tokenizer(self) -> Tokenizer:
        """The model's own words; UnsupportedTaskError for a BLIP-2 whose Q-Former reads no text."""
        if self.tokenizer is None:
            raise UnsupportedTaskError("The Q-Former of this checkpoint reads no text.")
        return self.tokenizer

    def prepare(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Read and resize: uint8 (B, 3, S, S) on the CPU. ImageError names the picture that fails."""
        return self._prepare(as_list(images), first=0)

    @torch.inference_mode()
    def encode(self, images: Images, batch_size: int | None = None) -> EncodedImages:
        """Run the image encoder once, for any number of later calls."""
        if isinstance(images, EncodedImages):
            return images
        found = [self._encode(pixels) for pixels in self._prepared_batches(images, batch_size)]
        return self._joined(found, num_frames=1)

    @torch.inference_mode()
    def encode_videos(
        self, clips: ClipInput | Sequence[ClipInput], num_frames: int = 8, batch_size: int | None = None
    ) -> EncodedImages:
        """Encode frames spread evenly over each clip (BLIP section 5.6); calls take the result as `images`.

        The paper takes 8 frames for retrieval and 16 for questions. batch_size: frames at a time. Raises
        VideoError for a clip that cannot be decoded, by its name, and MissingExtraError without PyAV.
        """
        if num_frames < 1:
            raise ConfigError(f"num_frames is {num_frames}; it must be at least 1.")
        found, clips = [], as_list(clips)
        for chunk in chunks(range(len(clips)), clips_per_batch(batch_size, num_frames)):
            found.append(
                self._encode(torch.stack([self._prepare_clip(clips[i], i, num_frames) for i in chunk]))
            )
        return self._joined(found, num_frames)

    def _prepare(self, images: Sequence[ImageInput], first: int) -> Tensor:
        """`first`: the place of the first of these images in the caller's list, for errors."""
        resized = [
            self.read_picture(image, input_name(image, i, "image"))
            for i, image in enumerate(images, start=first)
        ]
        size = self.preprocessing.image_size
        return torch.stack(resized) if resized else torch.zeros(0, 3, size, size, dtype=torch.uint8)

    def read_picture(self, image: ImageInput, name: str) -> Tensor:
        """uint8 (3, S, S) on the CPU; ImageError calls the picture `name`."""
        with read_image(image, name=name) as picture:
            return torch.from_numpy(self.preprocessing(picture))

    def _prepare_clip(self, clip: ClipInput, position: int, num_frames: int) -> Tensor:
        """uint8 (F, 3, S, S)."""
        source = clip if isinstance(clip, bytes) else str(clip)
        frames = read_frames(source, num_frames, name=input_name(clip, position, "clip"))
        return torch.from_numpy(np.stack([self.preprocessing(frame) for frame in frames]))

    def normalized(self, pixels: Tensor) -> Tensor:
        """uint8 (..., 3, S, S) -> what the image encoder takes, on its device."""
        return self.preprocessing.normalize(pixels.to(self.device)).to(self.dtype)

    def _encode(self, pixels: Tensor) -> EncodedImages:
        """uint8 (B, 3, S, S), or of clips (B, F, 3, S, S)."""
        seeds = tuple(picture_seed(picture) for picture in pixels)
        normalized = self.normalized(pixels)
        if pixels.dim() == 4:
            return EncodedImages(self.model.encode_image(normalized), seeds)
        frames = self.model.encode_image(normalized.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        return EncodedImages(frames.flatten(1, 2), seeds, pixels.shape[1])

    def _joined(self, parts: Sequence[EncodedImages], num_frames: int) -> EncodedImages:
        num_tokens, width = self.image_shape
        none = torch.zeros(0, num_frames * num_tokens, width, device=self.device, dtype=self.dtype)
        tokens = torch.cat([part.tokens for part in parts]) if parts else none
        return EncodedImages(tokens, tuple(seed for part in parts for seed in part.seeds), num_frames)

    def encoded_batches(
        self, images: Images, batch_size: int | None
    ) -> Iterator[tuple[slice, EncodedImages]]:
        """Batches of encoded images, each with its place among all of them; a clip counts as its frames."""
        if isinstance(images, EncodedImages):
            size = clips_per_batch(batch_size, images.num_frames)
            for start in range(0, len(images), size):
                where = slice(start, min(start + size, len(images)))
                yield where, images.part(where)
            return
        start = 0
        for pixels in self._prepared_batches(images, batch_size):
            yield slice(start, start + len(pixels)), self.encode(pixels, len(pixels))
            start += len(pixels)

    def paired_batches(
        self, images: Images, texts: Sequence[str], call: str, batch_size: int | None
    ) -> Iterator[tuple[Sequence[str], EncodedImages]]:
        """Batches of images with the texts at the same places; ConfigError unless there are as many."""
        images = listed(images)
        if len(images) != len(texts):
            raise ConfigError(
                f"{call} takes pairs, one text for each image: {len(images)} images and {len(texts)} texts "
                "were given."
            )
        for where, encoded in self.encoded_batches(images, batch_size):
            yield texts[where], encoded

    def question_batches(
        self, images: Images, questions: Sequence[str], batch_size: int | None
    ) -> Iterator[tuple[Sequence[str], EncodedImages]]:
        """Batches of questions with their images, in pairs; of several about one image that image alone."""
        if len(questions) > 1 and (
            is_single(images) or (isinstance(images, EncodedImages) and len(images) == 1)
        ):
            encoded = self.encode(images)
            for own in chunks(questions, checked_batch_size(batch_size)):
                yield own, encoded
            return
        yield from self.paired_batches(images, questions, "answer", batch_size)

    def _prepared_batches(self, images: Images, batch_size: int | None) -> Iterator[Tensor]:
        size = checked_batch_size(batch_size)
        if isinstance(images, Tensor):
            check_prepared(images, self.preprocessing.image_size)
            yield from images.split(size) if len(images) else ()
            return
        assert not isinstance(images, EncodedImages)
        first = 0
        for chunk in chunks(as_list(images), size):
            yield self._prepare(chunk, first)
            first += len(chunk)

    def tokenize(self, texts: Sequence[str], first_id: int) -> Tokens:
        """Texts as training read them (`normalize_caption`), from `first_id` on, on the model's device."""
        return self.tokens([normalize_caption(text) for text in texts], self.max_match_tokens, first_id)

    def tokens(self, texts: Sequence[str], max_length: int, first_id: int) -> Tokens:
        """Normalised texts from `first_id` on, cut to `max_length` or what the model reads; ids (R, T)."""
        limit = min(max_length, self.max_positions)
        tokens = self.require_tokenizer().encode(texts, limit).to(self.device)
        tokens.ids[:, :1] = first_id  # none in a list of no texts
        return tokens


def clips_per_batch(batch_size: int | None, num_frames: int) -> int:
    """So many that their frames are about `batch_size` pictures."""
    return max(1, checked_batch_size(batch_size) // num_frames)


def _is_one(images: Images) -> bool:
    return is_single(images) or (isinstance(images, EncodedImages) and len(images) == 1)
