"""Image-text contrastive loss, ITC (BLIP section 3.2; ALBEF section 3.2 for momentum and soft targets).

B local batch, K keys (momentum batch of all processes, then the queue), E embedding width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.distributed import global_mean

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # released code; the paper names no bounds


class ContrastiveKeys(NamedTuple):
    """What queries are compared with: the momentum batch of all processes, then the queue."""

    image: Tensor
    """(K, E) unit vectors, no gradient."""
    text: Tensor
    """(K, E) unit vectors, no gradient."""
    ids: Tensor
    """(K,) int64 image ids."""


def positive_targets(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """(B,) and (K,) image ids -> (B, K): equal shares over all keys of the same image.

    The released pre-training code counts only a pair's own caption as positive, which makes other captions
    of the same image negatives; its retrieval fine-tuning does it as here.
    """
    same = (query_ids[:, None] == key_ids[None, :]).float()
    return same / same.sum(dim=1, keepdim=True).clamp_min(1.0)


def soft_targets(momentum_query: Tensor, keys: Tensor, hard: Tensor, temperature: Tensor, alpha: float) -> Tensor:
    """(B, E), (K, E) and hard targets (B, K) -> (B, K): alpha * softmax(sim_m / t) + (1 - alpha) * hard."""
    with torch.no_grad():
        momentum_similarity = momentum_query @ keys.T / temperature
        return alpha * F.softmax(momentum_similarity, dim=1) + (1.0 - alpha) * hard


def contrastive_loss(query: Tensor, keys: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    """Cross-entropy of query (B, E) over keys (K, E) against targets (B, K): the joint batch's mean."""
    return similarity_loss(query @ keys.T / temperature, targets)


def similarity_loss(similarity: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of similarities over temperature, (B, K), against targets (B, K): the joint mean."""
    log_probabilities = F.log_softmax(similarity, dim=1)
    per_query = -(targets * log_probabilities).sum(dim=1)
    return global_mean(per_query, torch.ones_like(per_query))


def itc_loss(
    image: Tensor,
    text: Tensor,
    momentum_image: Tensor,
    momentum_text: Tensor,
    ids: Tensor,
    keys: ContrastiveKeys,
    temperature: Tensor,
    alpha: float,
) -> Tensor:
    """The mean of the image-to-text and the text-to-image loss, a scalar.

    image, text: (B, E) unit vectors with gradients; momentum_image, momentum_text: the same pairs through
    the momentum encoders; ids: (B,) int64; alpha: weight of the soft targets, 0 to 1.
    """
    hard = positive_targets(ids, keys.ids)
    with torch.autocast(image.device.type, enabled=False):  # bf16 similarities over 0.07 are too coarse
        image_targets = soft_targets(momentum_image, keys.text, hard, temperature, alpha)
        text_targets = soft_targets(momentum_text, keys.image, hard, temperature, alpha)
        image_to_text = contrastive_loss(image, keys.text, image_targets, temperature)
        text_to_image = contrastive_loss(text, keys.image, text_targets, temperature)
    return (image_to_text + text_to_image) / 2


def in_batch_itc_loss(
    image_to_text: Tensor, text_to_image: Tensor, ids: Tensor, joint_ids: Tensor, label_smoothing: float
) -> Tensor:
    """ITC without momentum and queue (BLIP-2 section 3.2), the mean of both directions, a scalar.

    Similarities over temperature of the B local images to the texts of the joint batch and of the B local texts to its
    images, both (B, G); ids (B,) and joint_ids (G,). All keys of the same image are positive; the released code does so
    in retrieval only; in stage 1 it counts the other captions of an image as negatives.
    """
    hard = positive_targets(ids, joint_ids)
    targets = (1.0 - label_smoothing) * hard + label_smoothing / hard.shape[1]
    return (similarity_loss(image_to_text, targets) + similarity_loss(text_to_image, targets)) / 2


def alpha_at(step: int, alpha: float, ramp_steps: int) -> float:
    """The weight of soft targets: linear from 0 over `ramp_steps`, then constant (released code)."""
    return alpha if ramp_steps <= 0 else alpha * min(1.0, step / ramp_steps)


@torch.no_grad()
def clamp_temperature(log_temperature: Tensor) -> None:
    """Keep the learnable temperature in its bounds, by its logarithm and in place; after each step."""
    log_temperature.clamp_(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
