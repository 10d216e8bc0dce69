"""What BLIP-2 makes of images and texts before any head.

I images, T texts, B pairs, L text tokens, Q queries, D width of the Q-Former.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from openblip.predictor.blip2_runtime import Blip2Runtime
from openblip.predictor.features import Features, reads_texts_alone, unit_vectors, without_padding
from openblip.predictor.images import EncodedImages, Images, listed
from openblip.predictor.runtime import clips_per_batch


@torch.inference_mode()
def extract_features(
    runtime: Blip2Runtime, images: Images | None, texts: Sequence[str] | None, batch_size: int | None
) -> Features:
    """Of images, of texts, or of pairs of them."""
    model, images = runtime.model, None if images is None else listed(images)
    reads_alone = reads_texts_alone(images, texts, model.config.heads, alone=("itc",), together=("itm",))
    projects = "itc" in model.config.heads
    image = queries = image_projected = text = text_projected = text_mask = multimodal = None
    encoded = None if images is None else runtime.encode(images, batch_size)
    if encoded is not None:
        image = encoded.tokens.float().cpu()
        read = _queries(runtime, encoded, None, batch_size)
        queries = read.float().cpu()
        if projects:
            image_projected = model.embed_image(read).cpu()
    if texts is not None:
        tokens = runtime.tokenize(texts, runtime.encoder_id)
        text_mask = tokens.mask.cpu()
        if reads_alone:
            states = model.qformer(tokens.ids, mask=tokens.mask[:, None, None, :])  # (T, L, D)
            text = without_padding(states.float().cpu(), text_mask)
            text_projected = without_padding(unit_vectors(model.text_proj(states)), text_mask)
        if encoded is not None:
            multimodal = _queries(runtime, encoded, texts, batch_size).float().cpu()
    return Features(
        image=image,
        queries=queries,
        image_projected=image_projected,
        text=text,
        text_projected=text_projected,
        text_mask=text_mask,
        multimodal=multimodal,
    )


def _queries(
    runtime: Blip2Runtime, encoded: EncodedImages, texts: Sequence[str] | None, batch_size: int | None
) -> Tensor:
    """(I, Q, D) on the model's device, of images alone or each with its text."""
    config = runtime.model.config.qformer
    found = [torch.zeros(0, config.num_queries, config.hidden_dim, device=runtime.device)]
    size = clips_per_batch(batch_size, encoded.num_frames)
    for start in range(0, len(encoded), size):
        where = slice(start, start + size)
        image_kv = runtime.model.image_kv(encoded.tokens[where])
        if texts is None:
            found.append(runtime.model.encode_queries(image_kv).queries)
        else:
            tokens = runtime.tokenize(texts[where], runtime.encoder_id)
            found.append(runtime.model.encode_multimodal(tokens.ids, tokens.mask, image_kv))
    return torch.cat(found)
