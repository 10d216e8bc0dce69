"""Predictors of tiny BLIP-2 checkpoints, and what is asked of them."""

from collections.abc import Sequence

from openblip.models.config import Blip2Head
from openblip.predictor import Blip2Predictor
from tiny_blip2 import Language, tiny_blip2


def blip2_predictor(
    heads: Sequence[Blip2Head] = ("itc", "itm", "itg"),
    language: Language | None = None,
    *,
    tower: bool = False,
    instructed: bool = False,
) -> Blip2Predictor:
    checkpoint = tiny_blip2(heads, language, tower=tower, instructed=instructed)
    return Blip2Predictor(checkpoint, device="cpu")


QUESTIONS = ["what is it?", "how many cats are there?", "why?", "how big", "is it a green tree?"]
PROMPTS = ["a photo of", "", "Question: what is it? Answer:", "a small red dog beside", "two"]
