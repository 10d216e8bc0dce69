"""A checkpoint on its device, and what turns pictures and texts into its input.

B images, S side of the prepared picture, R texts, T text tokens.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from openblip.checkpoints.native import Checkpoint
from openblip.data.images import ImageInput, read_image
from openblip.data.tokenizer import Tokens, normalize_caption
from openblip.errors import ConfigError
from openblip.generation.decoding import Decoding
from openblip.models.blip import Blip
from openblip.predictor.batching import as_list, checked_batch_size, chunks
from openblip.predictor.images import EncodedImages, Images, check_prepared, image_name, picture_seed

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

    def prepare(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Read and resize: uint8 (B, 3, S, S) on the CPU. ImageError names the picture that fails."""
        return self._prepare(as_list(images), first=0)

    def _prepare(self, images: Sequence[ImageInput], first: int) -> Tensor:
        """`first`: the place of the first of these images in the caller's list, for errors."""
        resized = []
        for i, image in enumerate(images, start=first):
            with read_image(image, name=image_name(image, i)) as picture:
                resized.append(self.preprocessing(picture))
        return torch.from_numpy(np.stack(resized)) if resized else self._no_pixels()

    @torch.inference_mode()
    def encode(self, images: Images, batch_size: int | None = None) -> EncodedImages:
        """Run the image encoder once, for any number of later calls."""
        if isinstance(images, EncodedImages):
            return images
        tokens: list[Tensor] = []
        seeds: list[int] = []
        for chunk in self._prepared_batches(images, batch_size):
            seeds.extend(picture_seed(picture) for picture in chunk)
            pixels = self.preprocessing.normalize(chunk.to(self.device))
            tokens.append(self.model.encode_image(pixels.to(self.dtype)))
        vision = self.model.config.vision
        if not tokens:
            tokens.append(torch.zeros(0, vision.num_tokens, vision.hidden_dim, device=self.device))
        return EncodedImages(torch.cat(tokens), tuple(seeds))

    def encoded_batches(
        self, images: Images, batch_size: int | None
    ) -> Iterator[tuple[slice, EncodedImages]]:
        """Batches of encoded images, each with its place among all of them."""
        size = checked_batch_size(batch_size)
        if isinstance(images, EncodedImages):
            for start in range(0, len(images), size):
                where = slice(start, min(start + size, len(images)))
                yield where, images.part(where)
            return
        start = 0
        for pixels in self._prepared_batches(images, size):
            yield slice(start, start + len(pixels)), self.encode(pixels, size)
            start += len(pixels)

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

    def _no_pixels(self) -> Tensor:
        size = self.preprocessing.image_size
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)

    def tokenize(self, texts: Sequence[str], first_id: int) -> Tokens:
        """Texts as training read them (`normalize_caption`), from `first_id` on, on the model's device."""
        normalized = [normalize_caption(text) for text in texts]
        tokens = self.tokenizer.encode(normalized, MAX_MATCH_TOKENS).to(self.device)
        tokens.ids[:, 0] = first_id
        return tokens

    def check_length(self, prompt_length: int, decoding: Decoding) -> None:
        """ConfigError when a text may grow longer than the model has positions."""
        longest = prompt_length + decoding.max_new_tokens - 1  # the last token is not read
        positions = self.model.config.text.max_positions
        if longest > positions:
            raise ConfigError(
                f"max_new_tokens {decoding.max_new_tokens} after a prompt of {prompt_length} tokens: the "
                f"model reads at most {positions}; ask for {max(positions - prompt_length + 1, 0)} or fewer."
            )
