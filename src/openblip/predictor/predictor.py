"""The calls of a loaded checkpoint: caption, match, search.

B images, I images, T texts, E embedding width.
"""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from openblip.checkpoints.loading import Format, save_as
from openblip.checkpoints.native import Checkpoint
from openblip.errors import UnsupportedTaskError
from openblip.generation.decoding import Beam, Decoding
from openblip.models.config import Head
from openblip.predictor import captioning, matching
from openblip.predictor.images import Images, is_single
from openblip.predictor.runtime import Runtime

_CALLS: dict[Head, tuple[str, ...]] = {
    "itc": ("similarity", "embed_images", "embed_texts"),
    "itm": ("match", "match_matrix"),
    "lm": ("caption",),
}


class Predictor(Runtime):
    """A checkpoint ready for use. Results do not depend on batch size, order or padding.

    `images` is one or a list of path, PIL.Image, encoded bytes or uint8 HxWx3 array; or what `prepare` or
    `encode` returned.
    """

    @property
    def tasks(self) -> frozenset[str]:
        """The calls that this checkpoint has weights for."""
        return frozenset(call for head in self.model.config.heads for call in _CALLS.get(head, ()))

    def caption(
        self,
        images: Images,
        prompt: str | None = None,
        decoding: Decoding = Beam(num_beams=3, max_new_tokens=20),  # noqa: B008 (frozen)
        num_captions: int = 1,
        batch_size: int | None = None,
        return_scores: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Any:
        """Captions: a string per image, or a list of `num_captions` strings if that is more than one.

        prompt: words the caption goes on from; None is the checkpoint's own, "" is none. The result is
        without it. return_scores: `ScoredText` objects instead of strings. seeds: one integer per image for
        `Nucleus`; by default they come from its seed and the picture. Raises UnsupportedTaskError.
        """
        self._require("caption")
        found = captioning.write_captions(
            self, images, prompt, decoding, num_captions=num_captions, batch_size=batch_size, seeds=seeds
        )
        several: list[list[Any]] = [
            list(captions) if return_scores else [caption.text for caption in captions] for captions in found
        ]
        results = [captions[0] for captions in several] if num_captions == 1 else several
        return results[0] if is_single(images) else results

    def match(self, images: Images, texts: str | Sequence[str], batch_size: int | None = None) -> Tensor:
        """P(match) of each pair by ITM, float32 (B,) on the CPU. ConfigError unless they pair up."""
        self._require("match")
        return matching.match_pairs(self, images, texts, batch_size)

    def match_matrix(
        self, images: Images, texts: str | Sequence[str], batch_size: int | None = None
    ) -> Tensor:
        """P(match) of every image with every text by ITM, float32 (I, T) on the CPU."""
        self._require("match_matrix")
        return matching.match_matrix(self, images, texts, batch_size)

    def similarity(self, images: Images, texts: str | Sequence[str], batch_size: int | None = None) -> Tensor:
        """ITC cosine of every image with every text, float32 (I, T) on the CPU."""
        self._require("similarity")
        return self.embed_images(images, batch_size) @ self.embed_texts(texts, batch_size).T

    def embed_images(self, images: Images, batch_size: int | None = None) -> Tensor:
        """Unit vectors, float32 (I, E) on the CPU."""
        self._require("embed_images")
        return matching.embed_images(self, images, batch_size)

    def embed_texts(self, texts: str | Sequence[str], batch_size: int | None = None) -> Tensor:
        """Unit vectors, float32 (T, E) on the CPU."""
        self._require("embed_texts")
        return matching.embed_texts(self, texts, batch_size)

    def save(self, folder: str | os.PathLike[str], format: Format = "openblip") -> None:
        """Write a checkpoint that `load` reads; "huggingface": that transformers reads as well.

        Raises CheckpointError when no model of transformers has these heads.
        """
        save_as(Checkpoint(self.model, self.tokenizer, self.preprocessing, self.prompt), folder, format)

    def _require(self, call: str) -> None:
        if call not in self.tasks:
            raise UnsupportedTaskError(
                f"This checkpoint has no weights to {call}; it can do {', '.join(sorted(self.tasks))}."
            )
