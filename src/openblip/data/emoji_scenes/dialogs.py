"""Samples with a dialog about a picture and 100 candidate answers to each question, as in VisDial."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, get_args

from openblip.data.emoji_scenes.encoding import Member, jpeg_bytes, json_bytes, scene_json
from openblip.data.emoji_scenes.rendering import render
from openblip.data.emoji_scenes.replies import Family, sayings
from openblip.data.emoji_scenes.request import SceneRequest
from openblip.data.emoji_scenes.scene import Scene, draw_scene
from openblip.data.emoji_scenes.sprites import require_demo_packages
from openblip.data.emoji_scenes.talking import Round, Talk, draw_rounds
from openblip.data.emoji_scenes.vocabulary import Split

NUM_OPTIONS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialog:
    """A scene, what is said first, and the rounds; `nouns` may be named in stray answers."""

    scene: Scene
    caption: str
    rounds: tuple[Round, ...]
    nouns: tuple[str, ...]


class DialogSamples:
    """`jpg` and `json` with `caption`, `scene` and `dialog`: rounds with `question`, `answer`, `options`,
    `answer_index` and `relevance`.
    """

    def require_packages(self) -> None:
        require_demo_packages()

    def draw(self, rng: Random, split: Split) -> Dialog:
        scene = draw_scene(rng, split)
        if len(scene.objects) == 1 and rng.random() < 0.5:
            scene = draw_scene(rng, split)  # there is more to say about several, and more often a yes
        talk = Talk.about(scene, split, rng)
        caption = talk.caption
        return Dialog(scene=scene, caption=caption, rounds=draw_rounds(talk), nouns=tuple(talk.nouns))

    def claims(self, dialog: Dialog) -> tuple[Hashable, ...]:
        questions = tuple(each.question for each in dialog.rounds)
        return ((dialog.scene.content(), dialog.caption, questions),)

    def members(self, request: SceneRequest, index: int, dialog: Dialog) -> list[Member]:
        rendered = render(dialog.scene, request.rng(index, "image"))
        rng = request.rng(index, "options")
        content = {
            "caption": dialog.caption,
            "dialog": [round_json(each, dialog.nouns, rng) for each in dialog.rounds],
            "scene": scene_json(dialog.scene, rendered),
        }
        return [("jpg", jpeg_bytes(rendered.image)), ("json", json_bytes(content))]

    def companions(self) -> dict[str, Any]:
        return {}


def round_json(asked: Round, nouns: Sequence[str], rng: Random) -> dict[str, Any]:
    """The round with NUM_OPTIONS different candidates in random order: all of its own, and strays."""
    options = dict.fromkeys((*asked.right, *asked.half_right, *asked.wrong))
    families = [family for family in get_args(Family) if family != asked.family]
    while len(options) < NUM_OPTIONS:
        options[rng.choice(sayings(rng.choice(families), rng.choice(nouns)))] = None
    shuffled = rng.sample(list(options), NUM_OPTIONS)
    relevance = dict.fromkeys(asked.right, 1.0) | dict.fromkeys(asked.half_right, 0.5)
    return {
        "question": asked.question,
        "answer": asked.answer,
        "options": shuffled,
        "answer_index": shuffled.index(asked.answer),
        "relevance": [relevance.get(option, 0.0) for option in shuffled],
    }
