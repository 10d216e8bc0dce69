"""Samples with a text about one scene, for language models that never see a picture.

A text is several lines. The first is a caption, and later lines say the same in other words or ask about it:
who has learned that, answers from what stands before, a caption or what takes its place (BLIP-2 stage 2).
"""

from random import Random
from typing import Any

from openblip.data.emoji_scenes.asking import Question, draw_question
from openblip.data.emoji_scenes.encoding import Member, jpeg_bytes, json_bytes, scene_json
from openblip.data.emoji_scenes.phrasing import SIDE_BY_SIDE, references
from openblip.data.emoji_scenes.questions import question_json
from openblip.data.emoji_scenes.rendering import render
from openblip.data.emoji_scenes.request import SceneRequest
from openblip.data.emoji_scenes.scene import Scene, draw_scene
from openblip.data.emoji_scenes.sprites import require_demo_packages
from openblip.data.emoji_scenes.vocabulary import Split

QUESTION_FORMS = ("Question: {} Answer: {}", "Question: {} Short answer: {}")  # BLIP-2's prompts
CAPTION_PROMPT = "a photo of"
NOT_AFTER_THE_PROMPT = ("there ", "on ", "a picture of ", "a drawing of ")

COMPLETE_PROBABILITY = 0.8  # of a first line that says all there is to know
QUESTION_PROBABILITY = 0.6  # of a later line that asks; the others are captions
PROMPTED_PROBABILITY = 0.4  # of a caption in a later line that begins as BLIP-2's do
# Of a question about a pair that asks who stands where: language models learn that last of all.
RELATIONAL_PROBABILITY = 0.5
RELATIONAL = frozenset({"place", "whether relation"})


class DocumentSamples:
    """`jpg` and `json` with the `text`, and `scene`.

    And to examine who has read such texts: a `context` that says all, a `question` about it with its
    `answers`, `question_id` and `question_kind`, and all true captions as `references`.
    """

    def require_packages(self) -> None:
        require_demo_packages()

    def draw(self, rng: Random, split: Split) -> Scene:
        return draw_scene(rng, split)

    def claims(self, scene: Scene) -> tuple[str, ...]:
        return references(scene)

    def members(self, request: SceneRequest, index: int, scene: Scene) -> list[Member]:
        rendered = render(scene, request.rng(index, "image"))
        examination = request.rng(index, "examination")
        content = {
            "text": draw_document(scene, request.split, request.rng(index, "text")),
            "context": examination.choice([c for c in references(scene) if is_complete(scene, c)]),
            **question_json(draw_question(scene, request.split, "picture", examination), index),
            "references": references(scene),
            "scene": scene_json(scene, rendered),
        }
        return [("jpg", jpeg_bytes(rendered.image)), ("json", json_bytes(content))]

    def companions(self) -> dict[str, Any]:
        return {}


def draw_document(scene: Scene, split: Split, rng: Random) -> str:
    """A caption and two to five lines more: questions that the captions so far answer, or other captions."""
    truths = references(scene)
    complete = [caption for caption in truths if is_complete(scene, caption)]
    said = [rng.choice(complete if rng.random() < COMPLETE_PROBABILITY else truths)]
    lines = list(said)
    for _ in range(rng.choice((2, 3, 4, 5))):
        if rng.random() < QUESTION_PROBABILITY:
            question = _answered_question(scene, split, said, rng)
            lines.append(rng.choice(QUESTION_FORMS).format(question.text, question.answers[0]))
        else:
            caption = rng.choice(truths)
            prompted = rng.random() < PROMPTED_PROBABILITY and not caption.startswith(NOT_AFTER_THE_PROMPT)
            said.append(caption)
            lines.append(f"{CAPTION_PROMPT} {caption}" if prompted else caption)
    return "\n".join(lines)


def is_complete(scene: Scene, caption: str) -> bool:
    """Whether the caption leaves nothing unsaid that can be asked."""
    return says_background(scene, caption) and says_relation(scene, caption)


def says_background(scene: Scene, caption: str) -> bool:
    return scene.background in caption.replace(",", "").split()


def says_relation(scene: Scene, caption: str) -> bool:
    """Whether it says who stands where, if the scene has that."""
    return scene.relation is None or SIDE_BY_SIDE not in caption


def _answered_question(scene: Scene, split: Split, said: list[str], rng: Random) -> Question:
    """A question whose answer follows from what was said."""
    unsaid: set[str] = set()
    if not any(says_background(scene, caption) for caption in said):
        unsaid.add("background")
    knows_relation = any(says_relation(scene, caption) for caption in said)
    if not knows_relation:
        unsaid |= RELATIONAL | {"neighbor"}
    relational = knows_relation and scene.relation is not None and rng.random() < RELATIONAL_PROBABILITY
    while True:  # no scene has so few kinds of questions that this takes long
        question = draw_question(scene, split, "picture", rng)
        if question.kind in RELATIONAL if relational else question.kind not in unsaid:
            return question
