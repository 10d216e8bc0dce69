"""Token scores before a token is chosen: repetition penalty and minimum length.

R rows, T generated tokens so far, V vocabulary.
"""

import torch
from torch import Tensor

from openblip.generation.decoding import Decoding


def adjust_scores(scores: Tensor, generated: Tensor, decoding: Decoding, eos_id: int) -> Tensor:
    """Scores (R, V) with the repetition penalty and the minimum length of `decoding` applied.

    `scores` are logits (greedy, nucleus) or log-probabilities (beam), float32; `generated` (R, T) are the
    tokens written so far, without the prompt. The order, and what the penalty is applied to, are those of
    transformers, except that transformers also penalises the tokens of the prompt.
    """
    penalty = decoding.repetition_penalty
    if penalty != 1.0 and generated.shape[1] > 0:
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, generated, True)
        # Dividing a negative score would make it more likely: arXiv 1909.05858 leaves the sign open.
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if generated.shape[1] < decoding.min_new_tokens:
        end = torch.arange(scores.shape[1], device=scores.device) == eos_id
        scores = scores.masked_fill(end, -torch.inf)
    return scores
