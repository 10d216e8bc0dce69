"""Arguments that do not belong together, or that the model cannot read: every call says what is wrong."""

import io
from typing import Any

import pytest
import torch
from tiny_predictor import IMAGES, TEXTS, blip2_predictor, make_predictor

from openblip.errors import ConfigError
from openblip.generation.decoding import Greedy, Nucleus
from openblip.predictor import BasePredictor
from tiny_blip import SIZE, TINY

UNEQUAL = [(2, 1), (2, 3), (0, 1), (1, 0), (5, 4)]
PAIRS = list(zip(IMAGES, IMAGES[1:] + IMAGES[:1], strict=True))
NO_PAIRS: list[Any] = [IMAGES[:3], [(IMAGES[0],)], [IMAGES[:3]], [PAIRS[0], IMAGES[0]], IMAGES[0]]
FLOATS = torch.zeros(2, 3, SIZE, SIZE)
NO_IMAGES: list[Any] = [
    None,
    3,
    {"image": IMAGES[0]},
    [IMAGES[0], None],
    [float("nan")],
    [IMAGES],
    FLOATS - 1,
    FLOATS[None],
]
NO_TEXTS: list[Any] = [None, 3, ["a", None], [b"a"], [["a"]], {"a": "b"}]
ANSWERS = ["yes", "no"]
BAD_LISTS: list[Any] = [[["yes"]] * 4, [["yes"], [], ["no"], ["no"], ["no"]], ["yes", ["no"]]]
DIALOGS: list[Any] = [IMAGES, TEXTS, [["why?"]] * 5, [ANSWERS] * 5]
TOO_FEW = [[each[:4] if i == short else each for i, each in enumerate(DIALOGS)] for short in range(4)]
BAD_DIALOGS: list[Any] = [[], "what is it?", [("what is it?", "a dog")], [None, "why?"], [("a", 3), "why?"]]
NO_DIALOGS = [(IMAGES[:2], TEXTS[:2], [["why?"], dialog], [ANSWERS] * 2) for dialog in BAD_DIALOGS]
NO_CONVERSATIONS: list[Any] = [[("a", "b")], ["a", "b"], " ", [None, "a"], [("a", 3), "b"], 3]
SHORT, SAMPLES = Greedy(), Nucleus(max_new_tokens=2)
SEEDS = [(IMAGES, None, SAMPLES, 1, 2, False, [1] * n) for n in (0, 2, 6)]
QUESTIONS = [(IMAGES[:i], TEXTS[:q], choices) for i, q in UNEQUAL for choices in (None, ANSWERS)]

PREDICTORS: dict[str, BasePredictor] = {
    "blip": make_predictor("itc", "itm", "lm"),
    **{head: make_predictor(head) for head in ("lm", "vqa", "nlvr", "visdial")},
    "blip2": blip2_predictor(),
    "itg": blip2_predictor(("itg",)),
    "opt": blip2_predictor((), "opt"),
}
REFUSED: list[tuple[str, str, str, list[Any]]] = [
    ("blip", "caption", "equally many images and seeds", SEEDS),
    ("blip", "caption", "PIL.Image|from 0 to 1", [(images,) for images in NO_IMAGES]),
    ("blip", "prepare", "image [01] .*(PIL.Image|from 0 to 1)", [(images,) for images in NO_IMAGES]),
    ("nlvr", "judge", r"pair 0 \(right\) is NoneType", [([IMAGES[0], None], "a"), ([[IMAGES[0], None]], ["a"])]),
    ("blip", "encode_videos", "video 0 .*an open binary file", [(None,), (IMAGES[0],), ([FLOATS],), (io.StringIO(),)]),
    ("blip", "embed_texts", "text [01] must be a string", [(texts,) for texts in NO_TEXTS]),
    ("blip", "match", "text [01] must be a string", [(IMAGES[0], texts) for texts in NO_TEXTS]),
    ("blip", "caption", "prompt [01] must be a string", [(IMAGES[0], texts) for texts in NO_TEXTS[1:]]),
    ("blip", "score_texts", "text [01] must be a string", [(IMAGES[0], [["a", None]]), (IMAGES[:2], [["a"], 3])]),
    ("vqa", "answer", "question [01] must be a string", [(IMAGES[0], texts) for texts in NO_TEXTS]),
    ("vqa", "answer", "text 0 must be a string", [(IMAGES[0], "a", [None]), (IMAGES[0], "a", [[3]])]),
    ("nlvr", "judge", "statement [01] must be a string", [(PAIRS[0], texts) for texts in NO_TEXTS]),
    ("blip", "explain", "text [01] must be a string", [(IMAGES[0], texts) for texts in NO_TEXTS[1:]]),
    ("blip", "caption", "batch_size is 0", [(IMAGES, None, SHORT, 1, 0)]),
    ("blip", "caption", "batch_size is", [(IMAGES, None, SHORT, 1, size) for size in (-1, "2", 2.5)]),
    ("blip", "caption", "give openblip.Beam", [(IMAGES[0], None, "beam"), ([], None, Greedy), (IMAGES, None, None)]),
    ("blip", "caption", "prompt of less than 40", [(IMAGES[0], "dog " * 60), (IMAGES[:2], ["a", "dog " * 60])]),
    ("blip", "embed_texts", "batch_size is 0", [(TEXTS, 0)]),
    ("blip", "embed_texts", "batch_size is -1", [(TEXTS, -1)]),
    ("blip", "match", "match takes equally many", [(IMAGES[:i], TEXTS[:t], b) for i, t in UNEQUAL for b in (None, 2)]),
    ("blip", "score_texts", "2 images and 3 lists", [(IMAGES[:2], [["a dog"]] * 3)]),
    ("blip2", "score_texts", "2 images and 3 lists", [(IMAGES[:2], [["a dog"]] * 3)]),
    ("blip", "features", "neither was given", [()]),
    ("blip", "features", "2 images and 3 texts", [(IMAGES[:2], TEXTS[:3])]),
    ("blip2", "features", "2 images and 3 texts", [(IMAGES[:2], TEXTS[:3])]),
    ("blip", "explain", "2 images and 3 texts", [(IMAGES[:2], TEXTS[:3]), (PAIRS[0], iter(TEXTS[:3]))]),
    ("blip", "explain", "the text has no words", [(IMAGES[0], " ")]),
    ("blip", "explain", "the layers 0 to 1", [(IMAGES[0], "a dog", 2), (IMAGES[0], "a dog", -1)]),
    ("blip2", "explain", "in layers 0, 2", [(IMAGES[0], "a dog", 1)]),
    ("lm", "explain", "give a shorter one", [(IMAGES[0], "a dog " * 30)]),
    ("itg", "explain", "reads at most 40", [(IMAGES[0], "dog " * 50)]),
    ("vqa", "answer", "answer takes equally many", QUESTIONS),
    ("vqa", "answer", "candidates is empty", [(IMAGES, TEXTS, [])]),
    ("vqa", "answer", "one list that is not empty", [(IMAGES, TEXTS, lists) for lists in BAD_LISTS]),
    ("vqa", "answer", "the model reads at most", [(IMAGES, TEXTS, ["dog " * TINY.text.max_positions])]),
    ("nlvr", "judge", "equally many pairs and statements", [(PAIRS[:i], TEXTS[:t]) for i, t in [(1, 2), *UNEQUAL]]),
    ("nlvr", "judge", "judge takes pairs", [(images, TEXTS[0]) for images in NO_PAIRS]),
    ("visdial", "rank_answers", "equally many images, captions, dialogs and candidates", TOO_FEW),
    ("visdial", "rank_answers", "dialog 1 is no list that ends with the open question", NO_DIALOGS),
    ("opt", "caption", "2 images and 3 prompts", [(IMAGES[:2], ["a", "b", "c"])]),
    ("opt", "caption", "2 images and 1 seeds", [(IMAGES[:2], None, SAMPLES, 1, None, False, [1])]),
    ("opt", "caption", "Greedy writes one", [(IMAGES[0], None, SHORT, 2)]),
    ("opt", "caption", "give openblip.Beam", [(IMAGES[0], None, "beam"), ([], None, "beam")]),
    ("opt", "answer", "give openblip.Beam", [(IMAGES[0], "a", None, "beam")]),
    ("opt", "chat", "give openblip.Beam", [(IMAGES[0], "a", "beam")]),
    ("opt", "caption", "give a shorter prompt", [(IMAGES[0], "dog " * 200), (IMAGES[:2], ["a", "dog " * 200])]),
    ("opt", "answer", "give a shorter prompt", [(IMAGES[0], "dogdogdogdog " * 45)]),
    ("opt", "chat", "give a shorter prompt", [(IMAGES[0], [("a", "dog " * 200), "why?"])]),
    ("opt", "caption", "reads at most 128", [(IMAGES[0], None, Greedy(max_new_tokens=200))]),
    ("opt", "answer", "2 images and 3 questions", [(IMAGES[:2], ["a", "b", "c"])]),
    ("opt", "answer", "candidates is empty", [(IMAGES[0], "a", [])]),
    ("opt", "answer", "num_candidates", [(IMAGES[0], "a", ["b"], None, None, False, 0)]),
    ("opt", "chat", "2 images and 1 conversations", [(IMAGES[:2], ["why?"])]),
    ("opt", "chat", "conversation 0", [(IMAGES[0], turns) for turns in NO_CONVERSATIONS]),
]


@pytest.mark.parametrize(("kind", "call", "message", "cases"), REFUSED)
def test_what_cannot_be_done_is_refused(kind: str, call: str, message: str, cases: list[Any]) -> None:
    for arguments in cases:
        with pytest.raises(ConfigError, match=message):
            getattr(PREDICTORS[kind], call)(*arguments)
