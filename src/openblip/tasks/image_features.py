"""The image encoder of BLIP-2 over a batch.

B examples, F frames, S side of the picture, N image tokens, Dv their width.
"""

from torch import Tensor

from openblip.data.transforms import Preprocessing
from openblip.models.blip2 import Blip2


def image_features(model: Blip2, preprocessing: Preprocessing, pixels: Tensor) -> Tensor:
    """uint8 pictures (B, 3, S, S), clips (B, F, 3, S, S), a cache's features (B, N, Dv) -> (B, F*N, Dv)."""
    if pixels.is_floating_point():
        return pixels
    normalized = preprocessing.normalize(pixels)
    if pixels.dim() == 4:
        return model.encode_image(normalized)
    frames = model.encode_image(normalized.flatten(0, 1))  # (B*F, N, Dv)
    features: Tensor = frames.unflatten(0, pixels.shape[:2]).flatten(1, 2)
    return features
