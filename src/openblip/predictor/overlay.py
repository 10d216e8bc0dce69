"""A heat map drawn over a picture.

G patches a side, H and W height and width of the picture.
"""

import numpy as np
from PIL import Image
from torch import Tensor

# Red, green and blue from cold to hot, at even steps of heat.
_RAMP = np.array([(30, 40, 130), (20, 150, 190), (90, 200, 90), (250, 210, 50), (225, 40, 30)], np.float32)
_OPACITY = 0.75  # of the hottest place; what is cold keeps the picture's own colours


def draw_heat(picture: Image.Image, heat: Tensor) -> Image.Image:
    """The picture (RGB, W x H) with heat (G, G), not negative, over it: the hottest patch is red."""
    peak = float(heat.max())
    if peak <= 0:
        return picture.copy()
    scaled = Image.fromarray((heat / peak).numpy().astype(np.float32))
    smooth = np.asarray(scaled.resize(picture.size, Image.Resampling.BICUBIC)).clip(0.0, 1.0)  # (H, W)
    steps = np.linspace(0.0, 1.0, len(_RAMP))
    colours = np.stack([np.interp(smooth, steps, channel) for channel in _RAMP.T], axis=-1)  # (H, W, 3)
    share = _OPACITY * smooth[..., None]
    blended = (1.0 - share) * np.asarray(picture, np.float32) + share * colours
    return Image.fromarray((blended + 0.5).astype(np.uint8))
