"""The filter at work: every text of an image scored against one encoding of the image (BLIP section 3.3).

B images, R texts, N image tokens, Q queries, E embedding width, S side of a picture.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openblip.errors import CheckpointError
from openblip.predictor import Calls, similarity_of_pairs

MAX_TEXTS_PER_CALL = 512
MAX_TEXTS_PER_IMAGE = 64
"""Texts of one image that are scored in one go; an image with more is scored in several."""


class Score(NamedTuple):
    """itm: P(match), softmax of the ITM head. itc: cosine of the ITC embeddings."""

    itm: float
    itc: float


EMPTY = Score(0.0, 0.0)
"""An empty text describes nothing: it is never shown to the filter and, at 0, never kept."""


@dataclass(frozen=True)
class _Piece:
    """Some texts of one image: `image` is its position in the batch, `rows` those of its texts in the
    result."""

    image: int
    rows: list[int]


@torch.inference_mode()
def score_texts(filter_: Calls, pixels: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Score]]:
    """Scores each image against its own texts; the image is encoded once, its keys and values projected once.

    Args:
        filter_: a checkpoint with ITM and ITC heads.
        pixels: uint8 (B, 3, S, S), prepared as the filter wants them.
        texts: B lists, of any and different lengths.

    Returns:
        Scores in the order of `texts`. Empty or blank texts score 0.

    Raises:
        CheckpointError: a score is not a number; the weights are broken.
    """
    encoded = filter_.encode(pixels, batch_size=len(pixels))
    flat = [text for own in texts for text in own]  # R
    owner = [image for image, own in enumerate(texts) for _ in own]
    scored = [row for row, text in enumerate(flat) if text.strip()]
    if not scored:
        return [[EMPTY] * len(own) for own in texts]
    image_kv = filter_.image_kv(encoded.tokens, "encode")
    itm, itc = np.zeros(len(flat), np.float32), np.zeros(len(flat), np.float32)
    for pieces in _calls(scored, owner):
        rows = [row for piece in pieces for row in piece.rows]
        tokens = filter_.tokenize([flat[row] for row in rows], filter_.encoder_id)
        images = [piece.image for piece in pieces]
        everyone = images == list(range(len(texts)))  # the usual case: no copy of keys and values
        own_kv = image_kv if everyone else image_kv.select(torch.tensor(images, device=filter_.device))
        logits = filter_.model.match_logits(tokens.ids, tokens.mask, own_kv)  # (R, 2)
        itm[rows] = logits.float().softmax(dim=1)[:, 1].cpu().numpy()
    image_vectors = filter_.embed_images(encoded)[[owner[row] for row in scored]]  # (R, E) or (R, Q, E)
    text_vectors = filter_.embed_texts([flat[row] for row in scored], MAX_TEXTS_PER_CALL)
    itc[scored] = similarity_of_pairs(image_vectors, text_vectors).numpy()
    if not (np.isfinite(itm).all() and np.isfinite(itc).all()):
        raise CheckpointError("the filter's scores are not numbers (NaN or infinite); its weights are broken")
    scores = iter(zip(itm.tolist(), itc.tolist(), strict=True))
    return [[Score(*next(scores)) for _ in own] for own in texts]


def _calls(rows: Sequence[int], owner: Sequence[int]) -> list[list[_Piece]]:
    """Groups texts for the model, which takes equally many, K, texts of each image in a call.

    Pieces of equal K go together, at most `MAX_TEXTS_PER_CALL` texts at a time. Usually all images have the
    same number of texts, and this is one call.
    """
    own_rows: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        own_rows[owner[row]].append(row)
    by_count: dict[int, list[_Piece]] = defaultdict(list)
    for image, found in own_rows.items():
        for start in range(0, len(found), MAX_TEXTS_PER_IMAGE):
            piece = _Piece(image, found[start : start + MAX_TEXTS_PER_IMAGE])
            by_count[len(piece.rows)].append(piece)
    calls = []
    for count, pieces in sorted(by_count.items()):
        step = max(1, MAX_TEXTS_PER_CALL // count)
        calls += [pieces[start : start + step] for start in range(0, len(pieces), step)]
    return calls
