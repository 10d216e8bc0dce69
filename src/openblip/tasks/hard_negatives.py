"""ITM with hard negatives out of the joint batch of all processes, for BLIP and BLIP-2.

B local batch, G joint batch of all processes, R texts, N image tokens, T text tokens, D image width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.data.tokenizer import Tokens
from openblip.distributed import gather, gather_padded, gather_with_gradient, world_size
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.objectives.matching import draw_negatives, itm_loss, negative_weights


def hard_negatives_loss(
    model: Blip | Blip2,
    texts: Tokens,
    features: Tensor,
    image_kv: Any,
    make_kv: Callable[[Tensor], Any],
    ids: Tensor,
    similarities: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """ITM over every pair as positive, one hard negative text per image and one hard negative image per text.

    The released pre-training code draws negatives from the process's own batch; with one process that is the same.

    Args:
        model: has the head itm.
        texts: (B, T), beginning as the model's `match_logits` needs them.
        features: (B, N, D), what the image encoder makes of the images.
        image_kv: `make_kv` of these features.
        make_kv: features (B, N, D) -> cross-attention keys and values.
        ids: (B,) image ids.
        similarities: over temperature, of images to texts and of texts to images of the joint batch, (B, G).
        generator: in the same state on every process.
    """
    image_to_text, text_to_image = similarities
    joint_ids = gather(ids)
    text_index, has_text = draw_negatives(negative_weights(image_to_text, ids, joint_ids), generator)
    image_index, has_image = draw_negatives(negative_weights(text_to_image, ids, joint_ids), generator)

    joint_texts = Tokens(gather_padded(texts.ids, 0), gather_padded(texts.mask, False))
    negative_texts = Tokens(joint_texts.ids[text_index], joint_texts.mask[text_index])
    of_image = interleave(texts, negative_texts)
    text_logits = model.match_logits(of_image.ids, of_image.mask, image_kv)  # (2B, 2)
    if world_size() == 1:
        negative_kv = image_kv.select(image_index)
    else:  # gradients reach the processes that hold the images
        joint_features = gather_with_gradient(features) if features.requires_grad else gather(features)
        negative_kv = make_kv(joint_features[image_index])
    image_logits = model.match_logits(texts.ids, texts.mask, negative_kv)  # (B, 2)

    labels = torch.tensor([1, 0], device=ids.device).repeat(len(ids))
    counted = torch.stack([torch.ones_like(has_text), has_text], dim=1).flatten()
    return itm_loss(
        torch.cat([text_logits, image_logits]),
        torch.cat([labels, torch.zeros_like(ids)]),
        torch.cat([counted, has_image]),
    )


def interleave(first: Tokens, second: Tokens) -> Tokens:
    """Two sets of B texts -> (2B, T): first[0], second[0], first[1], ..., padded to the longer."""
    length = max(first.ids.shape[1], second.ids.shape[1])
    ids = [F.pad(t.ids, (0, length - t.ids.shape[1])) for t in (first, second)]
    mask = [F.pad(t.mask, (0, length - t.mask.shape[1])) for t in (first, second)]
    return Tokens(torch.stack(ids, dim=1).flatten(0, 1), torch.stack(mask, dim=1).flatten(0, 1))
