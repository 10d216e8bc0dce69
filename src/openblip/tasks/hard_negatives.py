"""ITM over a batch with its hard negatives: what BLIP and BLIP-2 share.

B local batch, G joint batch of all processes, R texts, T text tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openblip.data.tokenizer import Tokens
from openblip.distributed import gather, gather_padded
from openblip.objectives.matching import draw_negatives, itm_loss, negative_weights
from openblip.tasks.tokens import interleave


def hard_negatives_loss(
    match_logits: Callable[[Tensor, Tensor, Any], Tensor],
    texts: Tokens,
    image_kv: Any,
    negative_kv: Callable[[Tensor], Any],
    ids: Tensor,
    similarities: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Every pair as positive, with one hard negative text per image and one hard negative image per text.

    match_logits: ids (R, T) and mask over B images -> (R, 2). texts (B, T), as it reads them; image_kv of
    their images; negative_kv: that of the images which (B,) names in the joint batch. ids: (B,) image ids.
    similarities: over temperature, of images to texts and of texts to images of the joint batch, (B, G).
    """
    image_to_text, text_to_image = similarities
    joint_ids = gather(ids)
    text_index, has_text = draw_negatives(negative_weights(image_to_text, ids, joint_ids), generator)
    image_index, has_image = draw_negatives(negative_weights(text_to_image, ids, joint_ids), generator)

    joint_texts = Tokens(gather_padded(texts.ids, 0), gather_padded(texts.mask, False))
    with_own_image = interleave(texts, Tokens(joint_texts.ids[text_index], joint_texts.mask[text_index]))
    own_logits = match_logits(with_own_image.ids, with_own_image.mask, image_kv)  # (2B, 2)
    image_logits = match_logits(texts.ids, texts.mask, negative_kv(image_index))  # (B, 2)

    positive = torch.ones_like(has_text)
    labels = torch.tensor([1, 0], device=ids.device).repeat(len(ids))
    counted = torch.stack([positive, has_text], dim=1).flatten()
    return itm_loss(
        torch.cat([own_logits, image_logits]),
        torch.cat([labels, torch.zeros_like(ids)]),
        torch.cat([counted, has_image]),
    )
