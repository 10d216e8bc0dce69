"""The metric of hallucination, which knows nothing of emoji scenes, tells their true captions from the false ones."""

from dataclasses import replace

import pytest
from scene_plans import draw_plans

from openblip.data.sample import Sample
from openblip.emoji_scenes.captions import RELATION_WORDS, described_objects, true_captions
from openblip.evaluation.captioning import objects_of
from openblip.metrics.hallucination import Vocabulary


def objects(scene):
    return objects_of(Sample("0", "s", b"", (), "0", {"objects": described_objects(scene)}))


@pytest.fixture(scope="module")
def scenes():
    return draw_plans("captions", "web", 400)


@pytest.fixture(scope="module")
def vocabulary(scenes):
    return Vocabulary(map(objects, scenes))


def test_true_captions_say_nothing_false_and_all_is_judged(scenes, vocabulary):
    for scene in scenes:
        for caption in true_captions(scene):
            judgement = vocabulary.judge(caption, objects(scene))
            assert judgement.hallucinated() == {}, caption
            assert judgement.num_named == judgement.num_objects == len(scene.objects)
            kinds = [claim.kind for claim in judgement.claims]
            assert kinds.count("object") == kinds.count("count") == len(scene.objects)
            sized = sum(thing.size != "normal" for thing in scene.objects)
            assert kinds.count("attribute") == sized + (scene.background in caption.replace(",", "").split())
            words = RELATION_WORDS[scene.relation] if scene.relation else {"places": []}
            places = sum(place in caption for place in words["places"])
            assert kinds.count("relation") == (places or scene.relation is not None)


@pytest.mark.parametrize("kind", ["object", "attribute", "count", "relation"])
def test_captions_of_scenes_that_differ_in_one_thing_are_false_in_that(scenes, vocabulary, kind):
    num_judged = 0
    for scene in scenes[:150]:
        first, *others = scene.objects
        match kind:
            case "object":
                name = next(name for name in ("dog", "cat", "owl", "key") if name not in scene.names)
                changed = replace(scene, objects=(replace(first, name=name), *others))
            case "attribute" if first.size == "normal":
                changed = replace(scene, objects=(replace(first, size="small"), *others))
            case "count" if not others:
                changed = replace(scene, objects=(replace(first, count=first.count % 3 + 1),))
            case "relation" if scene.relation is not None:
                changed = replace(scene, objects=scene.objects[::-1])
            case _:
                continue
        for caption in set(true_captions(changed)) - set(true_captions(scene)):
            assert list(vocabulary.judge(caption, objects(scene)).hallucinated()) == [kind], caption
            num_judged += 1
    assert num_judged > 200
