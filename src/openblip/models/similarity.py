"""ITC cosines of embeddings: of BLIP one vector per image, of BLIP-2 one per query, the best of which counts.

I images, T texts, R pairs, Q queries, E embedding width.
"""

import torch
from torch import Tensor

IMAGES_AT_ONCE = 64


def similarity_matrix(images: Tensor, texts: Tensor) -> Tensor:
    """Unit vectors (I, E) or (I, Q, E), and (T, E) -> the cosine of every image with every text, (I, T).

    BLIP-2 section 3.2: of an image's queries the one that fits best counts.
    """
    if images.dim() == 2:
        return images @ texts.T
    return torch.cat([(part @ texts.T).amax(dim=1) for part in images.split(IMAGES_AT_ONCE)])


def similarity_of_pairs(images: Tensor, texts: Tensor) -> Tensor:
    """Unit vectors (R, E) or (R, Q, E), and (R, E) -> the cosine of each pair, (R,)."""
    if images.dim() == 2:
        return (images * texts).sum(dim=1)
    return (images * texts[:, None]).sum(dim=2).amax(dim=1)
