"""The image encoder over a batch of pictures or of clips.

B examples, F frames, S side of the picture, N image tokens, D width.
"""

from torch import Tensor

from openblip.models.blip import Blip


def encode_media(model: Blip, pixels: Tensor) -> Tensor:
    """Normalised pictures (B, 3, S, S) or clips (B, F, 3, S, S) -> tokens (B, F*N, D)."""
    return model.encode_video(pixels) if pixels.dim() == 5 else model.encode_image(pixels)


def num_frames(pixels: Tensor) -> int:
    """Frames of each example in `pixels`; one for pictures."""
    return pixels.shape[1] if pixels.dim() == 5 else 1
