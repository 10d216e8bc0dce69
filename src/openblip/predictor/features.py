"""What a model makes of images and texts before any head: for search, probes, and models behind it.

I images, T texts, B pairs, F frames, N image tokens, L text tokens, Q queries, Dv and D their widths,
E embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.data.tokenizer import Tokens
from openblip.errors import ConfigError, UnsupportedTaskError
from openblip.predictor.batching import chunks
from openblip.predictor.blip_runtime import BlipRuntime
from openblip.predictor.images import EncodedImages, Images, listed
from openblip.predictor.runtime import clips_per_batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """States of the model, float32 on the CPU; None for what was not asked for or the model does not have.

    The first token stands for the whole, of an image and of a text. A text that is shorter than the longest
    ends in zeros.
    """

    image: Tensor | None = None
    """(I, N, Dv), of clips (I, F * N, Dv): the class token, then the patches row by row."""
    queries: Tensor | None = None
    """BLIP-2: (I, Q, D), what the queries read of the image, and the language model after a projection."""
    image_projected: Tensor | None = None
    """(I, N, E), unit vectors in the space of ITC; the first is what `embed_images` gives. Of BLIP-2 the
    queries', (I, Q, E), all of what `embed_images` gives."""
    text: Tensor | None = None
    """(T, L, D), read alone."""
    text_projected: Tensor | None = None
    """(T, L, E), unit vectors in the space of ITC; the first is what `embed_texts` gives."""
    text_mask: Tensor | None = None
    """bool (T, L), True at real tokens."""
    multimodal: Tensor | None = None
    """(B, L, D), each text read together with its image; of BLIP-2 the queries that read it, (B, Q, D)."""


@torch.inference_mode()
def extract_features(
    runtime: BlipRuntime, images: Images | None, texts: Sequence[str] | None, batch_size: int | None
) -> Features:
    """Of images, of texts, or of pairs of them."""
    images = None if images is None else listed(images)
    heads = runtime.model.config.heads
    reads_alone = reads_texts_alone(images, texts, heads, alone=("itc", "visdial"), together=("itm", "vqa"))
    projects = "itc" in runtime.model.config.heads
    image = image_projected = text = text_projected = text_mask = multimodal = None
    encoded = None if images is None else runtime.encode(images, batch_size)
    if encoded is not None:
        image = encoded.tokens.float().cpu()
        if projects:
            image_projected = unit_vectors(runtime.model.project_image(encoded.tokens))
    if texts is not None:
        tokens = _tokens(runtime, texts)
        text_mask = tokens.mask.cpu()
        if reads_alone:
            states = _states(runtime, tokens, runtime.tokenizer.cls_id, None, batch_size)
            text = without_padding(states.float().cpu(), text_mask)
            if projects:
                text_projected = without_padding(unit_vectors(runtime.model.project_text(states)), text_mask)
        if encoded is not None:
            states = _states(runtime, tokens, runtime.encoder_id, encoded, batch_size)
            multimodal = without_padding(states.float().cpu(), text_mask)
    return Features(
        image=image,
        image_projected=image_projected,
        text=text,
        text_projected=text_projected,
        text_mask=text_mask,
        multimodal=multimodal,
    )


def reads_texts_alone(
    images: Sequence[Any] | Tensor | EncodedImages | None,
    texts: Sequence[str] | None,
    heads: Sequence[str],
    *,
    alone: Sequence[str],
    together: Sequence[str],
) -> bool:
    """Whether a model of these heads reads texts without images.

    alone, together: the heads that have taught it to read texts without images and with them. Raises when it
    has none for what is wanted, or images and texts are no pairs.
    """
    reads_alone = bool(set(alone) & set(heads))
    if images is None and texts is None:
        raise ConfigError("features are those of images, of texts or of both: neither was given.")
    if images is None and not reads_alone:
        raise UnsupportedTaskError(
            f"Features of texts alone need the text encoder of an {' or '.join(alone)} head; this checkpoint "
            f"has {', '.join(heads)}."
        )
    if images is None or texts is None:
        return reads_alone
    if not set(together) & set(heads):
        raise UnsupportedTaskError(
            f"Features of texts with images need the text encoder of an {' or '.join(together)} head; this "
            f"checkpoint has {', '.join(heads)}. Ask for images and texts apart."
        )
    if len(images) != len(texts):
        raise ConfigError(
            f"features takes pairs, one text for each image: {len(images)} images and {len(texts)} texts "
            "were given; ask for images and texts apart."
        )
    return reads_alone


def _tokens(runtime: BlipRuntime, texts: Sequence[str]) -> Tokens:
    """All texts, padded to the longest; a model that only answers reads them as questions."""
    if "vqa" in runtime.model.config.heads and "itm" not in runtime.model.config.heads:
        return runtime.tokenize_questions(texts)
    return runtime.tokenize(texts, runtime.tokenizer.cls_id)


def _states(
    runtime: BlipRuntime, tokens: Tokens, first_id: int, encoded: EncodedImages | None, batch_size: int | None
) -> Tensor:
    """(T, L, D) on the model's device, of texts from `first_id` on, alone or each with its image."""
    ids = tokens.ids.clone()
    ids[:, :1] = first_id
    size = clips_per_batch(batch_size, 1 if encoded is None else encoded.num_frames)
    found = [torch.zeros(0, ids.shape[1], runtime.model.config.text.hidden_dim, device=runtime.device)]
    for rows in chunks(range(len(ids)), size):
        where = slice(rows[0], rows[-1] + 1)
        kv = None if encoded is None else runtime.model.image_kv(encoded.tokens[where], "encode").layers
        found.append(runtime.model.text(ids[where], "encode", tokens.mask[where], kv))
    return torch.cat([states.to(runtime.dtype) for states in found])


def unit_vectors(projected: Tensor) -> Tensor:
    """float32 on the CPU."""
    return F.normalize(projected.float(), dim=-1).cpu()


def without_padding(states: Tensor, mask: Tensor) -> Tensor:
    """Zeros where there is no token, so that nothing depends on what else was in the list."""
    return states * mask[..., None]
