"""What the neighbours of an image and of a text say about whether the two belong together.

LEMoN (Zhang et al. 2024, "LEMoN: Label Error Detection using Multimodal Neighbors", section 3) sums the distances of a
text to the texts of the nearest images, and of an image to the images of the nearest texts. Each neighbour counts the
less, the further away it is (tau_1) and the worse its own image and text fit (tau_2). Here the sums are weighted means
of cosines, so that higher is better, and an isolated pair is not taken for a good one.

I images, T texts, K neighbours, E embedding width; those of the references have an r.
"""

from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

TAU_NEIGHBOUR = 0.1  # the paper's fixed values
TAU_PAIR = 5.0
Vectors = np.ndarray[Any, Any]
_MANY = 1 << 25  # cosines that are in memory at once


class Neighbourhood(NamedTuple):
    """Cosines (T,) of each text with the texts of the images nearest to its own, and of its image with the images of
    the texts nearest to it. NaN where there are none.
    """

    images: Tensor
    texts: Tensor


class ReferencePairs(NamedTuple):
    """Pairs of a run, chosen by hash, on the device where neighbours are looked for."""

    image_numbers: Tensor  # int64 (Ir,), of the images in the run
    images: Tensor  # (Ir, E)
    texts: Tensor  # (Tr, E)
    owners: Tensor  # int64 (Tr,), of each text the position of its image among the references
    weights: Tensor  # (Tr,), how well each text fits its image
    image_texts: Tensor  # (Ir, E), the weighted sum of the texts of each image
    image_weights: Tensor  # (Ir,), that of their weights

    @classmethod
    def build(
        cls,
        image_numbers: Vectors,
        images: Vectors,
        texts: Vectors,
        owners: Vectors,
        itc: Vectors,
        device: torch.device,
    ) -> Self:
        """ReferencePairs from what embedding and caption files hold."""
        vectors, of_texts = (torch.from_numpy(each.astype(np.float32)).to(device) for each in (images, texts))
        positions = torch.from_numpy(owners.astype(np.int64)).to(device)
        distance = 1.0 - torch.from_numpy(itc.astype(np.float32)).to(device)
        weights = torch.exp(-TAU_PAIR * distance)
        sums = torch.zeros_like(vectors).index_add_(0, positions, weights[:, None] * of_texts)
        totals = torch.zeros(len(vectors), device=device).index_add_(0, positions, weights)
        numbers = torch.from_numpy(image_numbers.astype(np.int64)).to(device)
        return cls(numbers, vectors, of_texts, positions, weights, sums, totals)

    def look_around(
        self, image_numbers: Vectors, images: Vectors, texts: Vectors, owners: Vectors, count: int
    ) -> Neighbourhood:
        """What the `count` nearest references say of texts (T, E) and the images (I, E) that own them. An image and its
        texts are no neighbours of their own. float32 on the CPU.
        """
        device = self.images.device
        numbers = torch.from_numpy(image_numbers.astype(np.int64)).to(device)
        vectors, of_texts = (torch.from_numpy(each.astype(np.float32)).to(device) for each in (images, texts))
        positions = torch.from_numpy(owners.astype(np.int64)).to(device)
        results = Neighbourhood(torch.full((len(texts),), torch.nan), torch.full((len(texts),), torch.nan))
        step = max(1, _MANY // max(1, len(self.texts), count * images.shape[1]))
        for start in range(0, len(texts), step):
            rows = slice(start, start + step)
            own, text, owner = (
                numbers[positions[rows]],
                of_texts[rows],
                vectors[positions[rows]],
            )  # (T,), (T, E), (T, E)
            results.images[rows] = self._by_images(own, owner, text, count).cpu()
            results.texts[rows] = self._by_texts(own, owner, text, count).cpu()
        return results

    def _by_images(self, own: Tensor, images: Tensor, texts: Tensor, count: int) -> Tensor:
        """(T,), of texts and their images (T, E), which have the numbers `own`."""
        nearest, found = (images @ self.images.T).topk(min(count + 1, len(self.images)), dim=1)  # (T, K + 1)
        near = _nearness(nearest, self.image_numbers[found] == own[:, None], count)
        agreement = torch.einsum("tke,te->tk", self.image_texts[found], texts)
        return (near * agreement).sum(dim=1) / (near * self.image_weights[found]).sum(dim=1)

    def _by_texts(self, own: Tensor, images: Tensor, texts: Tensor, count: int) -> Tensor:
        most_own = int(self.owners.bincount().max()) if len(self.owners) else 0
        nearest, found = (texts @ self.texts.T).topk(min(count + most_own, len(self.texts)), dim=1)  # (T, K + most)
        owners = self.owners[found]
        near = _nearness(nearest, self.image_numbers[owners] == own[:, None], count) * self.weights[found]
        agreement = torch.einsum("tke,te->tk", self.images[owners], images)
        return (near * agreement).sum(dim=1) / near.sum(dim=1)


def _nearness(cosines: Tensor, is_own: Tensor, count: int) -> Tensor:
    """How much each of the nearest counts, (T, K), sorted by cosine: of those that are not their own, `count` do."""
    is_counted = ~is_own & ((~is_own).cumsum(dim=1) <= count)
    return torch.exp(-TAU_NEIGHBOUR * (1.0 - cosines)) * is_counted
