"""The user's side of a checkpoint: pictures and strings in, results out. `load` gives a `Predictor`."""

from openblip.predictor.explanation import Explanation
from openblip.predictor.features import Features
from openblip.predictor.images import EncodedImages, Images
from openblip.predictor.loading import load
from openblip.predictor.predictor import Predictor
from openblip.predictor.scored_text import ScoredText

__all__ = ["EncodedImages", "Explanation", "Features", "Images", "Predictor", "ScoredText", "load"]
