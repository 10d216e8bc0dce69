"""What all trainings of BLIP-2 have in common: a model, the pixels that it takes, and what of it is frozen.

B examples, F frames, S side of the picture, N image tokens, Dv their width.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from openblip.data.transforms import Preprocessing
from openblip.models.blip2 import Blip2
from openblip.models.vision_tower import encoder_depths
from openblip.tasks.image_features import image_features
from openblip.tasks.protocol import TrainingTask


class Blip2Task(TrainingTask):
    """A model and its objectives."""

    def __init__(self, model: Blip2, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing

    def features(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, S, S), clips (B, F, 3, S, S), or a cache's features (B, N, Dv) -> (B, F*N, Dv)."""
        return image_features(self.model, self.preprocessing, pixels)

    def frozen_parts(self) -> Sequence[nn.Module]:
        """The image encoder and the language model, where they are frozen."""
        return self.model.frozen_parts()

    def layers_above(self) -> Mapping[str, int]:
        """Of the image encoder; Q-Former, heads and adapters learn at the full rate."""
        return {f"model.vision.{name}": depth for name, depth in encoder_depths(self.model.vision).items()}
