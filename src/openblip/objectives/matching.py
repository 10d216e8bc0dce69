"""Image-text matching, ITM, with hard negatives (BLIP section 3.2).

B local batch, G global batch, R rows of pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.distributed import global_mean, local_rows

EPSILON = 1e-4  # released pre-training code: keeps every negative possible


def negative_weights(similarity: Tensor, row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """Sampling weights (B, G): softmax(similarity) + epsilon, zero where the ids are equal.

    similarity: (B, G), already divided by the temperature. The released code zeroes the diagonal only, so
    that other captions of the same image were drawn as negatives; its retrieval code leaves out epsilon and
    fails when a row has no mass.
    """
    weights = F.softmax(similarity.detach().float(), dim=1) + EPSILON
    return weights.masked_fill(row_ids[:, None] == column_ids[None, :], 0.0)


def draw_negatives(weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One column per row of (B, G) by its weights -> indices (B,) int64 and (B,) bool: there was a choice.

    Rows without any negative give index 0 and False. Every process draws for the joint batch from the same
    generator state and keeps its own rows, so that W processes draw what one would. By inverse CDF, since
    torch.multinomial refuses rows without mass.
    """
    local_size = weights.shape[0]
    joint_size = weights.shape[1]
    uniform = local_rows(torch.rand(joint_size, generator=generator, dtype=torch.float64), local_size)
    cumulative = weights.double().cumsum(dim=1)
    total = cumulative[:, -1]
    threshold = uniform.to(weights.device) * total
    index = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
    last_possible = weights.shape[1] - 1 - (weights.flip(1) > 0).int().argmax(dim=1)
    possible = total > 0
    return torch.where(possible, torch.minimum(index, last_possible), 0), possible


def itm_loss(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy of logits (R, 2) against labels (R,) in {0, 1}, over the rows `counted` (R,) names."""
    per_row = F.cross_entropy(logits.float(), labels, reduction="none")
    return global_mean(per_row, counted)
