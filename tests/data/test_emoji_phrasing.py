"""Scenes and what can truly be said about them."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from openblip.data.emoji_scenes.noise import normalize
from openblip.data.emoji_scenes.phrasing import references
from openblip.data.emoji_scenes.scene import Scene, SceneObject, draw_scene, sizes_of
from openblip.data.emoji_scenes.vocabulary import SPLITS, pair_allowed

SCENES = st.builds(
    lambda seed, split: (draw_scene(Random(seed), split), split),
    st.integers(0, 10**9),
    st.sampled_from(SPLITS),
)


def scene_of(*things: SceneObject, relation=None, background="blue") -> Scene:
    return Scene(objects=things, relation=relation, background=background)


@settings(deadline=None)
@given(SCENES)
def test_captions_are_plain_short_and_distinct(drawn):
    captions = references(drawn[0])
    assert 8 <= len(captions) <= 60
    assert len({normalize(caption) for caption in captions}) == len(captions)
    for caption in captions:
        assert caption == normalize(caption)
        assert len(caption.split()) <= 20


@settings(deadline=None)
@given(SCENES)
def test_scenes_show_only_pairs_of_their_split_and_fit(drawn):
    scene, split = drawn
    names = [thing.name for thing in scene.objects]
    assert len(set(names)) == len(names)
    assert all(pair_allowed(split, a, b) for a in names for b in names if a < b)
    sizes = sizes_of(sum(thing.count for thing in scene.objects))
    assert all(thing.size in sizes for thing in scene.objects)
    assert (scene.relation is not None) == (len(names) == 2)


def test_one_thing():
    captions = references(scene_of(SceneObject(name="owl", size="small")))
    assert "a small owl on a blue background" in captions
    assert "there is a small owl in front of a blue wall" in captions
    assert not any(" owl " in f" {caption} " and "small owl" not in caption for caption in captions)
    assert "an owl on a blue background" in references(scene_of(SceneObject(name="owl")))


def test_several_of_a_kind():
    captions = references(scene_of(SceneObject(name="butterfly", count=3)))
    assert "there are three butterflies on a blue background" in captions
    assert not any("there is" in caption for caption in captions)


def test_side_by_side_is_said_from_both_ends():
    fox, key = SceneObject(name="fox"), SceneObject(name="key", size="small")
    captions = set(references(scene_of(fox, key, relation="left of")))
    assert {
        "a fox to the left of a small key",
        "a small key right of a fox on a blue background",
        "on a blue background, a small key is next to a fox",
        "a fox on the left, a small key on the right, blue background",
    } <= captions
    mirrored = set(references(scene_of(key, fox, relation="left of")))
    shared = captions & mirrored
    assert shared
    assert all("next to" in caption for caption in shared)


def test_above_is_not_said_of_things_side_by_side():
    fox, key = SceneObject(name="fox"), SceneObject(name="key")
    above = set(references(scene_of(fox, key, relation="above")))
    assert "a key below a fox" in above
    assert not any("left" in caption or "next to" in caption for caption in above)
    assert above.isdisjoint(references(scene_of(key, fox, relation="above")))


def test_three_things_are_listed_in_any_order():
    things = [SceneObject(name=name) for name in ("fox", "key", "cake")]
    captions = references(scene_of(*things))
    assert set(captions) == set(references(scene_of(*things[::-1])))
    assert "a cake, a fox and a key on a blue background" in captions


def test_what_is_not_said_of_a_pair_still_tells_scenes_apart():
    """Without the background the relation is said, without the relation the background."""
    fox, key = SceneObject(name="fox"), SceneObject(name="key")
    for caption in references(scene_of(fox, key, relation="left of", background="pink")):
        assert "pink" in caption or "left" in caption or "right" in caption
        assert "pink" in caption or "next to" not in caption
