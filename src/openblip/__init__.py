"""OpenBLIP: Bootstrapping Language-Image Pre-training, open.

`load` gives a `BlipPredictor`, or for a BLIP-2 a `Blip2Predictor`; `Greedy`, `Beam` and `Nucleus` say how it writes.
`pipeline` takes the arguments and gives the results of transformers 4's function of this name.
"""

from typing import TYPE_CHECKING, Any

from openblip.errors import (
    CheckpointError,
    ConfigError,
    ImageError,
    MissingExtraError,
    OpenBlipError,
    SourceError,
    UnsupportedTaskError,
    VideoError,
)

if TYPE_CHECKING:
    from openblip.generation.decoding import Beam, Greedy, Nucleus
    from openblip.predictor import Blip2Predictor, BlipPredictor, load
    from openblip.predictor.pipeline import pipeline

__version__ = "0.1.0"

__all__ = ["Beam", "Blip2Predictor", "BlipPredictor", "Greedy", "Nucleus", "load", "pipeline"]
__all__ += ["CheckpointError", "ConfigError", "ImageError", "MissingExtraError", "OpenBlipError", "SourceError"]
__all__ += ["UnsupportedTaskError", "VideoError"]


def __getattr__(name: str) -> Any:
    """Import torch only when a model is asked for, so that `openblip --help` answers at once."""
    if name in ("Beam", "Greedy", "Nucleus"):
        from openblip.generation import decoding

        return getattr(decoding, name)
    if name in ("Blip2Predictor", "BlipPredictor", "load"):
        from openblip import predictor

        return getattr(predictor, name)
    if name == "pipeline":
        from openblip.predictor.pipeline import pipeline

        return pipeline
    raise AttributeError(f"module openblip has no attribute {name}")
