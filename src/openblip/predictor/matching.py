"""How well images and texts fit: ITM reads them together, ITC compares their embeddings.

B pairs, I images, T texts, R rows of text, Q queries, E embedding width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openblip.data.tokenizer import Tokens
from openblip.predictor.batching import DEFAULT_BATCH_SIZE, as_list, checked_batch_size, chunks
from openblip.predictor.images import Images
from openblip.predictor.runtime import Runtime


@torch.inference_mode()
def match_pairs(
    runtime: Runtime, images: Images, texts: str | Sequence[str], batch_size: int | None
) -> Tensor:
    """P(match) of each pair, float32 (B,) on the CPU. ConfigError unless they pair up."""
    scores = [torch.zeros(0)]
    for own, encoded in runtime.paired_batches(images, as_list(texts), "match", batch_size):
        tokens = runtime.tokenize(own, runtime.encoder_id)
        image_kv = runtime.image_kv(encoded.tokens, "encode")
        scores.append(match_probability(runtime, tokens, image_kv))
    return torch.cat(scores)


@torch.inference_mode()
def match_matrix(
    runtime: Runtime, images: Images, texts: str | Sequence[str], batch_size: int | None
) -> Tensor:
    """P(match) of every image with every text, float32 (I, T) on the CPU."""
    texts = as_list(texts)
    rows = []
    for _, encoded in runtime.encoded_batches(images, batch_size):
        image_kv = runtime.image_kv(encoded.tokens, "encode")  # once for all texts
        count = len(encoded)
        columns = []
        for chunk in chunks(texts, max(1, 4 * DEFAULT_BATCH_SIZE // count)):
            tokens = runtime.tokenize(chunk, runtime.encoder_id)
            repeated = Tokens(tokens.ids.repeat(count, 1), tokens.mask.repeat(count, 1))
            columns.append(match_probability(runtime, repeated, image_kv).view(count, -1))
        rows.append(torch.cat(columns, dim=1) if columns else torch.zeros(count, 0))
    return torch.cat(rows) if rows else torch.zeros(0, len(texts))


def match_probability(runtime: Runtime, tokens: Tokens, image_kv: Any) -> Tensor:
    logits = runtime.model.match_logits(tokens.ids, tokens.mask, image_kv)  # (R, 2)
    return logits.float().softmax(dim=1)[:, 1].cpu()


@torch.inference_mode()
def embed_images(runtime: Runtime, images: Images, batch_size: int | None) -> Tensor:
    """Unit vectors, float32 on the CPU: (I, E), or (I, Q, E) of a model with queries."""
    found = [
        runtime.embed(encoded).float().cpu() for _, encoded in runtime.encoded_batches(images, batch_size)
    ]
    return torch.cat(found) if found else torch.zeros(0, *runtime.embedding_shape)


@torch.inference_mode()
def embed_texts(runtime: Runtime, texts: str | Sequence[str], batch_size: int | None) -> Tensor:
    """Unit vectors, float32 (T, E) on the CPU."""
    found = []
    for chunk in chunks(as_list(texts), checked_batch_size(batch_size)):
        tokens = runtime.tokenize(chunk, runtime.require_tokenizer().cls_id)
        found.append(runtime.model.embed_text(tokens.ids, tokens.mask).float().cpu())
    return torch.cat(found) if found else torch.zeros(0, runtime.model.config.embed_dim)
