"""Samples with a question about a picture and the answers of ten annotators, as in VQA."""

from collections.abc import Hashable
from dataclasses import dataclass
from random import Random
from typing import Any

from openblip.data.emoji_scenes.asking import Question, draw_question, every_answer
from openblip.data.emoji_scenes.encoding import Member, jpeg_bytes, json_bytes, scene_json
from openblip.data.emoji_scenes.rendering import render
from openblip.data.emoji_scenes.request import SceneRequest
from openblip.data.emoji_scenes.scene import Scene, draw_scene
from openblip.data.emoji_scenes.sprites import require_demo_packages
from openblip.data.emoji_scenes.vocabulary import Split

ANSWER_LIST_FILE = "answer_list.json"


@dataclass(frozen=True, slots=True)
class AskedScene:
    """A scene and one question about it."""

    scene: Scene
    question: Question


class QuestionSamples:
    """`jpg` and `json` with `question`, `answers`, `question_id`, `question_kind` and `scene`."""

    def require_packages(self) -> None:
        require_demo_packages()

    def draw(self, rng: Random, split: Split) -> AskedScene:
        scene = draw_scene(rng, split)
        return AskedScene(scene, draw_question(scene, split, "picture", rng))

    def claims(self, asked: AskedScene) -> tuple[Hashable, ...]:
        return ((asked.scene.content(), asked.question.text),)

    def members(self, request: SceneRequest, index: int, asked: AskedScene) -> list[Member]:
        rendered = render(asked.scene, request.rng(index, "image"))
        content = question_json(asked.question, index) | {"scene": scene_json(asked.scene, rendered)}
        return [("jpg", jpeg_bytes(rendered.image)), ("json", json_bytes(content))]

    def companions(self) -> dict[str, Any]:
        return {ANSWER_LIST_FILE: every_answer()}


def question_json(question: Question, question_id: int) -> dict[str, Any]:
    return {
        "question": question.text,
        "answers": question.answers,
        "question_id": question_id,
        "question_kind": question.kind,
    }
