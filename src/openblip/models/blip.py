"""BLIP: a ViT and a text transformer as multimodal mixture of encoder-decoder (MED, BLIP section 3.1).

B images, R = B * K rows of text, N image tokens, T text tokens, Dv image width, D text width, E embedding
width, V vocabulary, S side of the picture.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.errors import UnsupportedTaskError
from openblip.models.config import BlipConfig, Head, Mode
from openblip.nn.attention import KeyValue
from openblip.nn.kv_cache import SelfAttentionCache
from openblip.nn.text_transformer import TextTransformer
from openblip.nn.vit import VisionTransformer, sine_positions

INITIAL_TEMPERATURE = 0.07  # of ITC, as in the released code


class ImageKV(NamedTuple):
    """Cross-attention keys and values of B images, one pair per layer, projected once."""

    layers: Sequence[KeyValue]

    def select(self, index: Tensor) -> "ImageKV":
        """Those of the images `index` names, (B') of int64, repeats allowed."""
        return ImageKV([layer.select(index) for layer in self.layers])

    @property
    def num_images(self) -> int:
        return self.layers[0].key.shape[0]


class Blip(nn.Module):
    """Image encoder, text encoder and decoder, with the heads named in `config.heads`.

    The first token of a text says how it is read, and the caller sets it: [CLS] for `embed_text`,
    [ENC] for `match_logits`, [DEC] for `decode`.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(**asdict(config.vision))
        self.text = TextTransformer(
            **asdict(config.text), image_dim=config.vision.hidden_dim, modes=config.modes
        )
        if "itc" in config.heads:
            self.vision_proj = nn.Linear(config.vision.hidden_dim, config.embed_dim)
            self.text_proj = nn.Linear(config.text.hidden_dim, config.embed_dim)
            self.log_temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE).log())
        if "itm" in config.heads:
            self.itm_head = nn.Linear(config.text.hidden_dim, 2)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.vision.class_token, std=0.02)
        with torch.no_grad():
            self.vision.position_embedding.copy_(sine_positions(config.vision.grid, config.vision.hidden_dim))

    @property
    def temperature(self) -> Tensor:
        """What ITC divides similarities by, a scalar.

        Learned as its logarithm, so that a step changes it by a share of itself. The released code learns the
        value: at small scale it then runs to its bounds within a hundred steps and takes the losses along.
        """
        self._require("itc")
        return self.log_temperature.exp()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels: float (B, 3, S, S), normalised -> image tokens (B, N, Dv)."""
        tokens: Tensor = self.vision(pixels)
        return tokens

    def image_kv(self, image_tokens: Tensor, mode: Mode) -> ImageKV:
        """What `match_logits` (encode) and `decode` (decode) attend to, computed once per image.

        Where both readings share their cross-attention (the paper's choice), one result serves both.
        """
        return ImageKV(self.text.image_kv(image_tokens, mode))

    @property
    def shares_cross_attention(self) -> bool:
        """Whether `image_kv` is the same in both modes."""
        return self.text.shares_cross_attention

    def embed_image(self, image_tokens: Tensor) -> Tensor:
        """(B, N, Dv) -> unit vectors (B, E) from the class token."""
        self._require("itc")
        return F.normalize(self.vision_proj(image_tokens[:, 0]).float(), dim=-1)

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (R, T) from [CLS], mask bool (R, T) -> unit vectors (R, E): the unimodal encoder."""
        self._require("itc")
        hidden = self.text(ids, "encode", mask=mask)
        return F.normalize(self.text_proj(hidden[:, 0]).float(), dim=-1)

    def match_logits(self, ids: Tensor, mask: Tensor, image_kv: ImageKV) -> Tensor:
        """ids (R, T) from [ENC] over B images -> (R, 2), index 1 says match: the image-grounded encoder."""
        self._require("itm")
        hidden = self.text(ids, "encode", mask=mask, image_kv=image_kv.layers)
        logits: Tensor = self.itm_head(hidden[:, 0])
        return logits

    def decode(
        self,
        ids: Tensor,
        image_kv: ImageKV,
        cache: SelfAttentionCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """ids (R, T) from [DEC] over B images -> logits (R, T, V): the image-grounded decoder.

        With a cache, ids are only the tokens it has not read. mask: bool (R, T), True at real tokens;
        needed only where padding stands before real tokens, since the decoder is causal.
        """
        self._require("lm")
        return self.text.predict_words(self.text(ids, "decode", mask, image_kv.layers, cache))

    def new_cache(self, max_length: int) -> SelfAttentionCache:
        """An empty cache for rows of at most `max_length` tokens; the first step says how many rows."""
        return SelfAttentionCache(self.config.text.num_layers, max_length)

    def _require(self, head: Head) -> None:
        if head not in self.config.heads:
            raise UnsupportedTaskError(
                f"This checkpoint has no {head} head; it has {', '.join(self.config.heads)}."
            )


def _initialise(module: nn.Module) -> None:
    """Truncated normal weights and zero biases, as ViT and BERT start.

    Their 0.02 suits a width of 768; it is scaled so that other widths pass signals on as well.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        fan_in = module.weight[0].numel()
        nn.init.trunc_normal_(module.weight, std=0.02 * (768 / fan_in) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
