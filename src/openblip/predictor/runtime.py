"""A checkpoint on its device, and what turns pictures, clips and texts into its input.

B images, F frames of a clip, S side of the prepared picture, N image tokens, Dv their width, R texts, T text
tokens.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from openblip.checkpoints.native import Checkpoint
from openblip.data.images import ImageInput, read_image
from openblip.data.readings import MAX_QUESTION_TOKENS
from openblip.data.tokenizer import Tokens, normalize_caption, normalize_question
from openblip.data.video import read_frames
from openblip.errors import ConfigError
from openblip.models.blip import Blip
from openblip.predictor.batching import as_list, checked_batch_size, chunks
from openblip.predictor.images import (
    ClipInput,
    EncodedImages,
    Images,
    check_prepared,
    input_name,
    listed,
    picture_seed,
)

MAX_MATCH_TOKENS = 35  # released code: retrieval and matching


class Runtime:
    """What the calls of a `Predictor` work with."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or default)
        self.dtype = dtype or torch.float32
        self.model: Blip = checkpoint.model.to(self.device, self.dtype).eval()
        self.tokenizer = checkpoint.tokenizer
        self.preprocessing = checkpoint.preprocessing
        self.prompt = checkpoint.prompt
        self.encoder_token = checkpoint.encoder_token

    @property
    def encoder_id(self) -> int:
        """The first token of a text that is read together with an image."""
        return self.tokenizer.enc_id if self.encoder_token == "[ENC]" else self.tokenizer.cls_id

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
        if pixels.dim() == 5:
            return EncodedImages(self.model.encode_clip(normalized), seeds, pixels.shape[1])
        return EncodedImages(self.model.encode_image(normalized), seeds)

    def _joined(self, parts: Sequence[EncodedImages], num_frames: int) -> EncodedImages:
        vision = self.model.config.vision
        none = torch.zeros(
            0, num_frames * vision.num_tokens, vision.hidden_dim, device=self.device, dtype=self.dtype
        )
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
        return self.tokens([normalize_caption(text) for text in texts], MAX_MATCH_TOKENS, first_id)

    def tokenize_questions(self, questions: Sequence[str]) -> Tokens:
        """Questions as training read them (`normalize_question`), on the model's device."""
        normalized = [normalize_question(question) for question in questions]
        return self.tokens(normalized, MAX_QUESTION_TOKENS, self.encoder_id)

    def tokens(self, texts: Sequence[str], max_length: int, first_id: int) -> Tokens:
        """Normalised texts from `first_id` on, cut to `max_length` or what the model reads; ids (R, T)."""
        limit = min(max_length, self.model.config.text.max_positions)
        tokens = self.tokenizer.encode(texts, limit).to(self.device)
        tokens.ids[:, :1] = first_id  # none in a list of no texts
        return tokens


def clips_per_batch(batch_size: int | None, num_frames: int) -> int:
    """So many that their frames are about `batch_size` pictures."""
    return max(1, checked_batch_size(batch_size) // num_frames)
