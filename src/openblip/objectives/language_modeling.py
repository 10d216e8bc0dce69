"""Language modelling, LM: the caption decoder's loss (BLIP section 3.2).

R rows, T tokens, A answers, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from openblip.distributed import global_mean

IGNORE_INDEX = -100


def next_token_labels(ids: Tensor, mask: Tensor, prompt_length: int = 1) -> Tensor:
    """ids (R, T) and mask (R, T), True at real tokens -> labels (R, T-1) for logits[:, :-1].

    Padding and the first `prompt_length` tokens ([DEC] and the prompt) are not predicted: IGNORE_INDEX.
    """
    labels = ids.masked_fill(~mask, IGNORE_INDEX)[:, 1:].clone()
    labels[:, : max(prompt_length - 1, 0)] = IGNORE_INDEX
    return labels


def lm_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of logits (R, T, V) against labels (R, T), the mean over the joint batch's tokens."""
    per_token = token_losses(logits, labels, label_smoothing).flatten()
    return global_mean(per_token, labels.flatten() != IGNORE_INDEX)


def answer_loss(logits: Tensor, labels: Tensor, weights: Tensor, num_questions: int, label_smoothing: float) -> Tensor:
    """Sum over answers of weight * cross-entropy, a question's share (BLIP section 5.3, released code).

    logits (A, T, V), labels (A, T), weights (A,); an answer's cross-entropy is the sum over its tokens, and
    the sum over answers is divided by the number of questions.
    """
    per_answer = token_losses(logits, labels, label_smoothing).sum(dim=1)  # (A,)
    return (weights * per_answer).sum() / num_questions


def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of every token, (R, T), zero where labels are IGNORE_INDEX."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view(labels.shape)
