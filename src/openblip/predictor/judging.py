"""Whether statements about two images are true (NLVR2; BLIP section 5.4).

B pairs, R statements, S side of the prepared picture.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from openblip.data.images import ImageInput
from openblip.data.prompts import MAX_STATEMENT_WORDS, normalize_caption
from openblip.errors import ConfigError
from openblip.predictor.batching import as_list, chunks, is_one
from openblip.predictor.blip_runtime import BlipRuntime
from openblip.predictor.images import input_name
from openblip.predictor.runtime import clips_per_batch

ImagePair = Sequence[ImageInput]
MAX_STATEMENT_TOKENS = 64  # forty words of released code's limit, and room for rare ones


@torch.inference_mode()
def judge_statements(
    runtime: BlipRuntime,
    images: ImagePair | Sequence[ImagePair],
    statements: str | Sequence[str],
    batch_size: int | None,
) -> Tensor:
    """P(true) of each statement about its (left, right) pair, float32 (B,) on the CPU."""
    statements = as_list(statements)
    pairs = _pairs(images)
    if len(pairs) != len(statements):
        raise ConfigError(
            f"judge takes one statement for each pair of images: {len(pairs)} pairs and {len(statements)} "
            "statements were given."
        )
    found = []
    for chunk in chunks(range(len(pairs)), clips_per_batch(batch_size, 2)):
        pixels = torch.stack([_prepare(runtime, pairs[i], i) for i in chunk])  # (B, 2, 3, S, S)
        tokens = runtime.tokens(
            [normalize_caption(statements[i], MAX_STATEMENT_WORDS) for i in chunk],
            MAX_STATEMENT_TOKENS,
            runtime.encoder_id,
        )
        image_tokens = runtime.model.encode_pair(runtime.normalized(pixels))
        pair_kv = runtime.model.image_kv(image_tokens, "encode")
        logits = runtime.model.judge_logits(tokens.ids, tokens.mask, pair_kv)  # (B, 2)
        found.append(logits.float().softmax(dim=1)[:, 1].cpu())
    return torch.cat(found) if found else torch.zeros(0)


def _pairs(images: ImagePair | Sequence[ImagePair]) -> list[list[ImageInput]]:
    """One pair or a list of them; ConfigError for anything else."""
    given = as_list(images)
    if len(given) == 2 and all(is_one(image) for image in given):
        return [given]
    for position, pair in enumerate(given):
        if is_one(pair) or len(pair) != 2:
            raise ConfigError(f"judge takes pairs (left, right) of images; item {position} is none.")
    return [list(pair) for pair in given]


def _prepare(runtime: BlipRuntime, pair: Sequence[ImageInput], position: int) -> Tensor:
    """uint8 (2, 3, S, S)."""
    sides = zip(pair, ("left", "right"), strict=True)
    return torch.stack(
        [
            runtime.read_picture(image, f"{input_name(image, position, 'pair')} ({side})")
            for image, side in sides
        ]
    )
