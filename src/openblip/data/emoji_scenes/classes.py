"""Samples for classification: one thing, whose noun is the label, and the prompts that name all classes."""

from random import Random
from typing import Any

from openblip.data.emoji_scenes.encoding import Member, jpeg_bytes, json_bytes, scene_json
from openblip.data.emoji_scenes.phrasing import SINGLE_FORMS, references
from openblip.data.emoji_scenes.rendering import render
from openblip.data.emoji_scenes.request import SceneRequest
from openblip.data.emoji_scenes.scene import Scene, draw_group
from openblip.data.emoji_scenes.sprites import require_demo_packages
from openblip.data.emoji_scenes.vocabulary import BACKGROUNDS, NOUNS, Split

CLASSES_FILE = "classes.json"
TEMPLATES_FILE = "templates.json"


class ClassSamples:
    """`jpg` and `json` with `label`, `caption`, `references` and `scene`."""

    def require_packages(self) -> None:
        require_demo_packages()

    def draw(self, rng: Random, split: Split) -> Scene:
        return draw_group(rng, rng.choice(NOUNS).name, 1)

    def claims(self, scene: Scene) -> tuple[()]:
        """Nothing: two pictures may show the same, each in its own place and light."""
        return ()

    def members(self, request: SceneRequest, index: int, scene: Scene) -> list[Member]:
        truths = references(scene)
        rendered = render(scene, request.rng(index, "image"))
        content = {
            "label": scene.objects[0].name,
            "caption": request.rng(index, "caption").choice(truths),
            "references": truths,
            "scene": scene_json(scene, rendered),
        }
        return [("jpg", jpeg_bytes(rendered.image)), ("json", json_bytes(content))]

    def companions(self) -> dict[str, Any]:
        return {CLASSES_FILE: class_phrases(), TEMPLATES_FILE: prompt_templates()}


def class_phrases() -> dict[str, str]:
    """Each class's name, and what takes the place of {} in a template: "dog": "a dog"."""
    return {noun.name: f"{noun.article} {noun.name}" for noun in NOUNS}


def prompt_templates() -> list[str]:
    """Captions of one thing of normal size on every background, with {} for the thing."""
    return [form.format(x="{}", c=color, **{"is": "is"}) for color in BACKGROUNDS for form in SINGLE_FORMS]
