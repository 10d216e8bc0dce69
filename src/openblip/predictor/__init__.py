"""The user's side of a checkpoint: pictures and strings in, results out.

`load` gives a `Predictor` for a BLIP and a `Blip2Predictor` for a BLIP-2; `Calls` is what they share.
"""

from openblip.models.similarity import similarity_of_pairs
from openblip.predictor.blip2_predictor import Blip2Predictor
from openblip.predictor.calls import Calls
from openblip.predictor.explanation import Explanation
from openblip.predictor.features import Features
from openblip.predictor.images import EncodedImages, Images
from openblip.predictor.loading import load
from openblip.predictor.predictor import Predictor
from openblip.predictor.scored_text import ScoredText

__all__ = [
    "Blip2Predictor",
    "Calls",
    "EncodedImages",
    "Explanation",
    "Features",
    "Images",
    "Predictor",
    "ScoredText",
    "load",
    "similarity_of_pairs",
]
