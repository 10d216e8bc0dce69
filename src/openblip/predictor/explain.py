"""Explanations by gradient-weighted cross-attention: a patch counts where a word looks at it and looking more would
raise the score (Grad-CAM, arXiv 1610.02391; on cross-attention as in ALBEF, arXiv 2107.07651).

The map of a head is attention * relu(d score / d attention); heads are averaged and the class token is left out, as
LAVIS does for the matching head. Here any layer, resolution and number of heads will do, and captions and answers are
explained, too. The predictors run their models; this file turns what they recorded into maps, and draws them.

W words, Q text tokens or queries that attend, T text tokens, L tokens of a written text, N image
tokens, G patches a side, H heads, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openblip.data.images import ImageInput, read_image
from openblip.errors import ConfigError, UnsupportedTaskError

# Red, green and blue from cold to hot, at even steps of heat.
_RAMP = np.array([(30, 40, 130), (20, 150, 190), (90, 200, 90), (250, 210, 50), (225, 40, 30)], np.float32)
_OPACITY = 0.75  # of the hottest patch; cold patches keep the image's own colours


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

        The hottest patch is red. word: one of `words` (where it occurs several times, the first), or its position.
        Raises ConfigError for another word and ImageError for an image that cannot be read.
        """
        heat = self.overall
        if word is not None:
            position = self.words.index(word) if isinstance(word, str) and word in self.words else word
            if isinstance(position, str) or not -len(self.words) <= position < len(self.words):
                raise ConfigError(
                    f"The explanation has no word {word!r}; it has {', '.join(self.words)}, at positions 0 to "
                    f"{len(self.words) - 1}."
                )
            heat = self.heat[position]
        decoded, peak = read_image(image), float(heat.max())
        if peak <= 0:
            return decoded.copy()
        scaled = Image.fromarray((heat / peak).numpy().astype(np.float32))
        smooth = np.asarray(scaled.resize(decoded.size, Image.Resampling.BICUBIC)).clip(0.0, 1.0)  # (height, width)
        steps = np.linspace(0.0, 1.0, len(_RAMP))
        colours = np.stack([np.interp(smooth, steps, channel) for channel in _RAMP.T], axis=-1)  # (height, width, 3)
        share = _OPACITY * smooth[..., None]
        blended = (1.0 - share) * np.asarray(decoded, np.float32) + share * colours
        return Image.fromarray((blended + 0.5).astype(np.uint8))


class Words(NamedTuple):
    """The words of a text, and for each the positions of its pieces among the tokens of the text."""

    words: tuple[str, ...]
    positions: list[list[int]]


def join_pieces(pieces: Sequence[str]) -> Words:
    """The words of pieces of WordPiece, where "##s" continues the word before; ConfigError for no pieces."""
    positions = _group_positions({i: not piece.startswith("##") for i, piece in enumerate(pieces)})
    if not positions:
        raise ConfigError("explain shows where words look: the text has no words.")
    words = [pieces[first] + "".join(pieces[i].removeprefix("##") for i in others) for first, *others in positions]
    return Words(tuple(words), positions)


def join_language_pieces(tokenizer: Any, ids: Sequence[int]) -> Words:
    """The words of token ids of a tokenizer of transformers, where a mark ("Ġ", "▁") begins a word.

    Special tokens belong to no word. Raises ConfigError when there are no words.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    ordinary = [i for i, token in enumerate(ids) if token not in tokenizer.all_special_ids]
    positions = _group_positions({i: pieces[i].startswith(("Ġ", "▁")) for i in ordinary})
    words = [tokenizer.convert_tokens_to_string([pieces[i] for i in group]).strip() for group in positions]
    if not any(words):
        raise ConfigError("explain shows where words look: nothing was written.")
    kept = [i for i, word in enumerate(words) if word]
    return Words(tuple(words[i] for i in kept), [positions[i] for i in kept])


def _group_positions(begins_word: Mapping[int, bool]) -> list[list[int]]:
    """The positions of each word's pieces, from whether the piece at each position begins one; the first does."""
    groups: list[list[int]] = []
    for position, begins in begins_word.items():
        if begins or not groups:
            groups.append([])
        groups[-1].append(position)
    return groups


def patch_maps(score: Tensor, weights: Tensor, retain_graph: bool = False) -> Tensor:
    """Attention weights (1, H, Q, N) that score depends on -> maps (Q, G, G), float32 on the CPU.

    Raises UnsupportedTaskError when the image tokens are no square of patches.
    """
    (gradient,) = torch.autograd.grad(score, weights, retain_graph=retain_graph)
    maps = (weights.detach() * gradient.clamp(min=0.0)).mean(dim=1)[0]  # (Q, N)
    side = isqrt(maps.shape[1])
    if side**2 + 1 == maps.shape[1]:
        maps = maps[:, 1:]  # without the class token
    elif side**2 != maps.shape[1]:
        raise UnsupportedTaskError(
            "Explanations need an image encoder whose tokens are a square of patches, with a class token "
            f"before it or none; this one has {maps.shape[1]} tokens."
        )
    patches: Tensor = maps.unflatten(1, (side, side))
    return patches.float().cpu()


def target_logprobs(logits: Tensor, targets: Sequence[int]) -> Tensor:
    """Logits (1, L, V) and the L tokens that they should predict -> log-probabilities (L,)."""
    index = torch.tensor(targets, device=logits.device)[None, :, None]
    return (logits.gather(2, index).squeeze(2) - logits.logsumexp(dim=-1))[0]


def explain_read_text(text: str, score: float, words: Words, maps: Tensor) -> Explanation:
    """The explanation of a text that was read, from maps (T, G, G) of all its tokens, first and last too."""
    heat = torch.stack([maps[1:-1][positions].mean(dim=0) for positions in words.positions])
    return Explanation(text=text, score=score, words=words.words, heat=heat, overall=maps.mean(dim=0))


def explain_written_text(text: str, ids: Sequence[int], words: Words, logits: Tensor, weights: Tensor) -> Explanation:
    """The explanation of a text that was written, through the log-probability of each of its words.

    logits (1, L, V) of its L tokens with the end, attention weights (1, H, Q, N) that they depend on. A word's map is
    the sum of those of all Q, by a backward pass for every word.
    """
    logprobs = target_logprobs(logits.float(), ids)
    maps = [patch_maps(logprobs[pieces].sum(), weights, retain_graph=True).sum(dim=0) for pieces in words.positions]
    heat = torch.stack(maps)
    score = float(logprobs.detach().sum())
    return Explanation(text=text, score=score, words=words.words, heat=heat, overall=heat.mean(dim=0))
