"""Language modelling, LM: the caption decoder's loss (BLIP section 3.2).

R rows, T tokens, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from openblip.objectives.gather import global_mean

IGNORE = -100


def next_token_labels(ids: Tensor, mask: Tensor, prompt_length: int = 1) -> Tensor:
    """ids (R, T) and mask (R, T), True at real tokens -> labels (R, T-1) for logits[:, :-1].

    Padding and the first `prompt_length` tokens ([DEC] and the prompt) are not predicted: IGNORE.
    """
    labels = ids.masked_fill(~mask, IGNORE)[:, 1:].clone()
    labels[:, : max(prompt_length - 1, 0)] = IGNORE
    return labels


def lm_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of logits (R, T, V) against labels (R, T), the mean over the joint batch's tokens."""
    flat_labels = labels.flatten()
    per_token = F.cross_entropy(
        logits.flatten(0, 1).float(),
        flat_labels,
        ignore_index=IGNORE,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return global_mean(per_token, flat_labels != IGNORE)
