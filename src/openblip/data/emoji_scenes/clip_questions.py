"""Samples with a question about a clip and the answers of ten annotators."""

from collections.abc import Hashable
from random import Random
from typing import Any

from openblip.data.emoji_scenes.asking import draw_question, every_answer
from openblip.data.emoji_scenes.clips import moving_scene_json
from openblip.data.emoji_scenes.encoding import Member, clip_bytes, json_bytes, require_video_package
from openblip.data.emoji_scenes.filming import FRAMES_PER_SECOND, film
from openblip.data.emoji_scenes.questions import ANSWER_LIST_FILE, AskedScene, question_json
from openblip.data.emoji_scenes.request import SceneRequest
from openblip.data.emoji_scenes.scene import draw_moving_scene
from openblip.data.emoji_scenes.sprites import require_demo_packages
from openblip.data.emoji_scenes.vocabulary import Split


class ClipQuestionSamples:
    """`mp4` and `json` with `question`, `answers`, `question_id`, `question_kind` and `scene`."""

    def require_packages(self) -> None:
        require_demo_packages()
        require_video_package()

    def draw(self, rng: Random, split: Split) -> AskedScene:
        scene = draw_moving_scene(rng, split)
        return AskedScene(scene, draw_question(scene, split, "video", rng))

    def claims(self, asked: AskedScene) -> tuple[Hashable, ...]:
        return ((asked.scene.content(), asked.question.text),)

    def members(self, request: SceneRequest, index: int, asked: AskedScene) -> list[Member]:
        filmed = film(asked.scene, request.rng(index, "image"))
        content = question_json(asked.question, index) | {"scene": moving_scene_json(asked.scene, filmed)}
        return [("mp4", clip_bytes(filmed.frames, FRAMES_PER_SECOND)), ("json", json_bytes(content))]

    def companions(self) -> dict[str, Any]:
        return {ANSWER_LIST_FILE: every_answer()}
