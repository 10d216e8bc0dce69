"""The user's side of a checkpoint: images and strings in, results out.

`load` gives a `BlipPredictor` for a BLIP and a `Blip2Predictor` for a BLIP-2; `BasePredictor` defines the
calls that both have.
"""

from openblip.models.blip import similarity_of_pairs
from openblip.predictor.blip2_predictor import Blip2Predictor
from openblip.predictor.calls import BasePredictor
from openblip.predictor.explanation import Explanation
from openblip.predictor.features import Features
from openblip.predictor.images import EncodedImages, Images
from openblip.predictor.loading import load
from openblip.predictor.predictor import BlipPredictor
from openblip.predictor.scored_text import ScoredText, TextScore

__all__ = [
    "BasePredictor",
    "Blip2Predictor",
    "BlipPredictor",
    "EncodedImages",
    "Explanation",
    "Features",
    "Images",
    "ScoredText",
    "TextScore",
    "load",
    "similarity_of_pairs",
]
