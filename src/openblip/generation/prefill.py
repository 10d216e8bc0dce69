"""The start of every decoding: the prompt is read once per image, then the rows fan out.

B images, K rows per image, P prompt tokens, V vocabulary.
"""

from typing import Any

from torch import Tensor

from openblip.generation.interface import DecoderContext, TextDecoder


def prefill(
    model: TextDecoder,
    context_kv: DecoderContext,
    prompt_ids: Tensor,
    num_images: int,
    rows_per_image: int,
    max_new_tokens: int,
) -> tuple[Tensor, Any]:
    """Logits for the first new token, float32 (B * K, V), and the cache with the prompt for B * K rows."""
    cache = model.new_cache(len(prompt_ids) + max_new_tokens)
    ids = prompt_ids.expand(num_images, -1)  # (B, P)
    logits = model.decode(ids, context_kv, cache)[:, -1].float()  # (B, V)
    if rows_per_image > 1:
        cache.repeat(rows_per_image)
        logits = logits.repeat_interleave(rows_per_image, dim=0)
    return logits, cache


def worth_compacting(num_open: int, num_images: int) -> bool:
    """Whether dropping finished images pays.

    Selecting images copies their cross-attention K and V, which costs about what one decoding step reads
    anyway; it pays once a quarter of the images is finished, and happens only a few times then.
    """
    return num_open <= 0.75 * num_images
