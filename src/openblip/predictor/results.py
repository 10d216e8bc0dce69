"""What a predictor returns: texts with their log-probabilities, scores of texts, features, explanations.

I images, T texts, B pairs, F frames, N image tokens, L text tokens, Q queries, Dv and D their widths, E embedding
width, W words, G patches a side, H and W height and width of an image in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from openblip.data.images import ImageInput, read_image
from openblip.errors import ConfigError
from openblip.generation.search import Generated


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A caption or an answer with its log-probability under the model (natural logarithm)."""

    text: str
    logprob: float
    """Of the whole text: the sum of `token_logprobs`."""
    tokens: tuple[str, ...]
    """The word pieces as the vocabulary has them. The last one is the end ([SEP]), unless the text was cut off at its
    greatest length. In BLIP "##s" continues a word; language models have marks of their own ("Ġdog", "▁dog")."""
    token_logprobs: tuple[float, ...]
    """Of each of `tokens`, given those before it; `math.exp` turns one into a probability."""
    ids: tuple[int, ...]
    """The positions of `tokens` in the vocabulary."""


def scored_text(
    generated: Generated, text: str, end_id: int, pieces: Callable[[Sequence[int]], Sequence[str]]
) -> ScoredText:
    """What decoding returned, with its text and its word pieces (`pieces` finds them by their ids)."""
    ended = len(generated.token_logprobs) > len(generated.ids)
    ids = (*generated.ids, end_id) if ended else tuple(generated.ids)
    logprobs, tokens = generated.token_logprobs, tuple(pieces(ids))
    return ScoredText(text=text, logprob=generated.logprob, tokens=tokens, token_logprobs=logprobs, ids=ids)


def as_asked(texts: Sequence[ScoredText], return_scores: bool, single: bool) -> Any:
    """The texts with their scores, or as strings; the first alone where `single`."""
    results = list(texts) if return_scores else [text.text for text in texts]
    return results[0] if single else results


class TextScore(NamedTuple):
    """How well a text describes its image."""

    itm: float
    """P(match) of the ITM head."""
    itc: float
    """Cosine of the ITC embeddings."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """States of the model, float32 on the CPU; None for what was not asked for or the model does not have.

    The first token stands for the whole image, and for the whole text. A text that is shorter than the longest is
    padded with zeros.
    """

    image: Tensor | None = None
    """(I, N, Dv), for videos (I, F * N, Dv): the class token, then the patches row by row."""
    queries: Tensor | None = None
    """BLIP-2: (I, Q, D), the output of the queries, which the language model reads after a projection."""
    image_projected: Tensor | None = None
    """(I, N, E), unit vectors in the space of ITC; the first is what `embed_images` returns. For BLIP-2 those of the
    queries, (I, Q, E), which are all that `embed_images` returns."""
    text: Tensor | None = None
    """(T, L, D), of texts that are read alone."""
    text_projected: Tensor | None = None
    """(T, L, E), unit vectors in the space of ITC; the first is what `embed_texts` returns."""
    text_mask: Tensor | None = None
    """bool (T, L), True at real tokens."""
    multimodal: Tensor | None = None
    """(B, L, D), each text read together with its image; for BLIP-2 the queries that read it, (B, Q, D)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """How much each patch of the image spoke for a result, through each of its words."""

    text: str
    """The text that was matched, the caption, or the answer."""
    score: float
    """What was explained: P(match), or the log-probability of the caption or the answer with its end."""
    words: tuple[str, ...]
    """The words of the text or caption, or of the question that was answered (for BLIP-2: of the answer); word pieces
    are joined."""
    heat: Tensor
    """(W, G, G) float32 on the CPU, not negative, row by row as in the image; without unit."""
    overall: Tensor
    """(G, G), the mean over all words. For a text that was read and not written, its first token, which stands for the
    whole, and its end count as words here."""

    def overlay(self, image: ImageInput, word: str | int | None = None) -> Image.Image:
        """The image with the heat of a word, or of all words, drawn over it: RGB, as large as the image.

        word: one of `words` (where it occurs several times, the first), or its position. Raises ConfigError for another
        word and ImageError for an image that cannot be read.
        """
        heat = self.overall if word is None else self.heat[self._position(word)]
        return _draw_heat(read_image(image), heat)

    def _position(self, word: str | int) -> int:
        if isinstance(word, str) and word in self.words:
            return self.words.index(word)
        if isinstance(word, int) and -len(self.words) <= word < len(self.words):
            return word
        raise ConfigError(
            f"The explanation has no word {word!r}; it has {', '.join(self.words)}, at positions 0 to "
            f"{len(self.words) - 1}."
        )


# Red, green and blue from cold to hot, at even steps of heat.
_RAMP = np.array([(30, 40, 130), (20, 150, 190), (90, 200, 90), (250, 210, 50), (225, 40, 30)], np.float32)
_OPACITY = 0.75  # of the hottest patch; cold patches keep the image's own colours


def _draw_heat(image: Image.Image, heat: Tensor) -> Image.Image:
    """The image (RGB, W x H) with heat (G, G), not negative, over it: the hottest patch is red."""
    peak = float(heat.max())
    if peak <= 0:
        return image.copy()
    scaled = Image.fromarray((heat / peak).numpy().astype(np.float32))
    smooth = np.asarray(scaled.resize(image.size, Image.Resampling.BICUBIC)).clip(0.0, 1.0)  # (H, W)
    steps = np.linspace(0.0, 1.0, len(_RAMP))
    colours = np.stack([np.interp(smooth, steps, channel) for channel in _RAMP.T], axis=-1)  # (H, W, 3)
    share = _OPACITY * smooth[..., None]
    blended = (1.0 - share) * np.asarray(image, np.float32) + share * colours
    return Image.fromarray((blended + 0.5).astype(np.uint8))
