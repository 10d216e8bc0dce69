"""Explanations by gradient-weighted cross-attention: a patch counts where a word looks at it and looking more would
raise the score (Grad-CAM, arXiv 1610.02391; on cross-attention as in ALBEF, arXiv 2107.07651).

The map of a head is attention * relu(d score / d attention); heads are averaged and the class token is left out, as
LAVIS does for the matching head. Here any layer, resolution and number of heads will do, and captions and answers are
explained, too. The predictors run their models; this file turns what they recorded into maps.

W words, K of them at a time, Q text tokens or queries that attend, T text tokens, L tokens of a written text, N image
tokens, G patches a side, H heads, V vocabulary.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openblip.errors import ConfigError, UnsupportedTaskError
from openblip.predictor.results import Explanation


class Words(NamedTuple):
    """The words of a text, and for each the positions of its pieces among the tokens of the text."""

    words: tuple[str, ...]
    positions: list[list[int]]


def join_pieces(pieces: Sequence[str]) -> Words:
    """The words of pieces of WordPiece, where "##s" continues the word before; ConfigError for no pieces."""
    words: list[str] = []
    positions: list[list[int]] = []
    for position, piece in enumerate(pieces):
        if piece.startswith("##") and words:
            words[-1] += piece.removeprefix("##")
            positions[-1].append(position)
        else:
            words.append(piece)
            positions.append([position])
    if not words:
        raise ConfigError("explain shows where words look: the text has no words.")
    return Words(tuple(words), positions)


def join_language_pieces(tokenizer: Any, ids: Sequence[int]) -> Words:
    """The words of token ids of a tokenizer of transformers, where a mark ("Ġ", "▁") begins a word.

    Special tokens belong to no word. Raises ConfigError when there are no words.
    """
    pieces: list[list[str]] = []
    positions: list[list[int]] = []
    for position, piece in enumerate(tokenizer.convert_ids_to_tokens(list(ids))):
        if ids[position] in tokenizer.all_special_ids:
            continue
        if piece.startswith(("Ġ", "▁")) or not pieces:
            pieces.append([])
            positions.append([])
        pieces[-1].append(piece)
        positions[-1].append(position)
    words = [tokenizer.convert_tokens_to_string(word_pieces).strip() for word_pieces in pieces]
    if not any(words):
        raise ConfigError("explain shows where words look: nothing was written.")
    kept = [i for i, word in enumerate(words) if word]
    return Words(tuple(words[i] for i in kept), [positions[i] for i in kept])


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


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (K, L, V) and the tokens (L,) that they should predict -> log-probabilities (K, L)."""
    index = targets.expand(len(logits), -1)[..., None]
    return logits.gather(2, index).squeeze(2) - logits.logsumexp(dim=-1)


def explain_read_text(text: str, score: float, words: Words, maps: Tensor) -> Explanation:
    """The explanation of a text that was read, from maps (T, G, G) of all its tokens, first and last too."""
    heat = torch.stack([maps[1:-1][positions].mean(dim=0) for positions in words.positions])
    return Explanation(text=text, score=score, words=words.words, heat=heat, overall=maps.mean(dim=0))


def explain_written_text(text: str, score: float, words: Words, heat: Tensor) -> Explanation:
    """The explanation of a text that was written, from maps (W, G, G) of its words."""
    return Explanation(text=text, score=score, words=words.words, heat=heat, overall=heat.mean(dim=0))
