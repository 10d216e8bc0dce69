"""What real alt-text has wrong with it: captions of a scene that are not true of it, each of a named kind."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random
from typing import Literal, TypeVar

from openblip.data.emoji_scenes.phrasing import references
from openblip.data.emoji_scenes.scene import RELATIONS, Scene, SceneObject, sizes_of
from openblip.data.emoji_scenes.vocabulary import BACKGROUNDS, NOUN_BY_NAME, NOUNS, Split, pair_allowed

T = TypeVar("T")
NoiseKind = Literal[
    "other_caption", "wrong_object", "wrong_attribute", "file_name", "boilerplate", "truncated"
]
NOISE_SHARES: dict[NoiseKind, int] = {  # percent of the noisy captions
    "other_caption": 35,
    "wrong_object": 15,
    "wrong_attribute": 15,
    "file_name": 12,
    "boilerplate": 13,
    "truncated": 10,
}

# Words that leave a phrase open: a caption that ends in one has lost its end.
OPEN_WORDS = frozenset(BACKGROUNDS) | {
    *("a", "an", "the", "to", "of", "left", "right", "in", "front", "on", "at", "and", "is", "are", "there"),
    *("two", "three", "small", "big", "next"),
}


def normalize(text: str) -> str:
    """As BLIP's pre_caption sees a text: lower case, without .!"()*#:;~, single blanks."""
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", text.lower()).split())


def noisy_caption(
    scene: Scene, true_captions: tuple[str, ...], split: Split, rng: Random, other_caption: Callable[[], str]
) -> tuple[str, NoiseKind]:
    """A caption that is not true of `scene`, and its kind.

    `other_caption` gives the caption of another image, a new one with every call.
    """
    (kind,) = rng.choices(list(NOISE_SHARES), list(NOISE_SHARES.values()))
    truths = {normalize(caption) for caption in true_captions}
    make: dict[NoiseKind, Callable[[], str]] = {
        "other_caption": other_caption,
        "wrong_object": lambda: _caption_of(_with_wrong_object(scene, split, rng), rng),
        "wrong_attribute": lambda: _caption_of(_with_wrong_attribute(scene, rng), rng),
        "file_name": lambda: file_name(rng),
        "boilerplate": lambda: boilerplate(rng),
        "truncated": lambda: truncated(rng.choice(true_captions), rng),
    }
    while True:
        caption = make[kind]()
        if normalize(caption) not in truths:
            return caption, kind


def _caption_of(scene: Scene, rng: Random) -> str:
    return rng.choice(references(scene))


def _with_wrong_object(scene: Scene, split: Split, rng: Random) -> Scene:
    """One noun replaced by another; pairs of nouns stay within those of the split."""
    position = rng.randrange(len(scene.objects))
    others = [thing.name for index, thing in enumerate(scene.objects) if index != position]
    taken = {thing.name for thing in scene.objects}
    choices = [
        noun.name
        for noun in NOUNS
        if noun.name not in taken and all(pair_allowed(split, noun.name, other) for other in others)
    ]
    objects = list(scene.objects)
    objects[position] = replace(objects[position], name=rng.choice(choices))
    return replace(scene, objects=tuple(objects))


def _with_wrong_attribute(scene: Scene, rng: Random) -> Scene:
    """The size, count, background or relation wrong; what comes out is a scene that could exist."""
    attributes = ["size", "background"]
    if scene.relation is not None:
        attributes.append("relation")
    if len(scene.objects) == 1:
        attributes.append("count")
    attribute = rng.choice(attributes)
    if attribute == "background":
        return replace(scene, background=_another(rng, BACKGROUNDS, scene.background))
    if attribute == "relation":
        return _with_wrong_relation(scene, rng)
    position = rng.randrange(len(scene.objects))
    thing = scene.objects[position]
    if attribute == "count":
        wrong = _with_count(thing, _another(rng, (1, 2, 3), thing.count), rng)
    else:
        sizes = sizes_of(sum(thing.count for thing in scene.objects))
        wrong = replace(thing, size=_another(rng, sizes, thing.size))
    return replace(scene, objects=(*scene.objects[:position], wrong, *scene.objects[position + 1 :]))


def _another(rng: Random, choices: Iterable[T], than: T) -> T:
    return rng.choice([choice for choice in choices if choice != than])


def _with_count(thing: SceneObject, count: int, rng: Random) -> SceneObject:
    """That many of the thing, in a size that so many may have."""
    sizes = sizes_of(count)
    return replace(thing, count=count, size=thing.size if thing.size in sizes else rng.choice(sizes))


def _with_wrong_relation(scene: Scene, rng: Random) -> Scene:
    swapped = replace(scene, objects=scene.objects[::-1])
    other = next(relation for relation in RELATIONS if relation != scene.relation)
    return rng.choice([swapped, swapped, replace(scene, relation=other), replace(swapped, relation=other)])


def truncated(caption: str, rng: Random) -> str:
    """A quarter to three quarters of `caption`, cut inside a word or after a word that wants another one."""
    cuts = []
    for end in range(len(caption) // 4, 3 * len(caption) // 4 + 1):
        last_word = caption[:end].rsplit(" ", 1)[-1]
        inside_word = caption[end - 1].isalpha() and caption[end].isalpha()
        # A cut that leaves a noun ("two dog", "a car" of a carrot) could pass for a whole caption.
        if (inside_word and last_word not in NOUN_BY_NAME) or (
            caption[end] == " " and last_word in OPEN_WORDS
        ):
            cuts.append(caption[:end])
    return rng.choice(cuts)


def _digits(rng: Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _date(rng: Random) -> str:
    return f"{rng.randint(2009, 2024)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}"


def file_name(rng: Random) -> str:
    """What a camera, a phone or a download folder calls a picture."""
    ending = rng.choice(("", ".jpg", ".jpg", ".png", ".jpeg", ".gif"))
    noun = rng.choice(NOUNS).name.replace(" ", rng.choice("-_"))
    stem = rng.choice(
        (
            f"img_{_date(rng)}_{_digits(rng, 4)}",
            f"img_{_digits(rng, 4)}",
            f"dsc{_digits(rng, 5)}",
            f"dscn{_digits(rng, 4)}",
            f"p{_digits(rng, 7)}",
            f"screenshot {rng.randint(1, 99)}",
            f"screenshot_{_date(rng)}",
            f"image{rng.randint(1, 400)}",
            f"image ({rng.randint(1, 30)})",
            f"photo-{_digits(rng, 9)}",
            f"whatsapp image {_date(rng)}",
            f"download ({rng.randint(1, 30)})",
            f"untitled-{rng.randint(1, 60)}",
            f"{noun}_{rng.randint(1, 40)}_final",
            f"{noun}-{rng.randint(200, 1600)}x{rng.randint(200, 1200)}",
            f"{noun}{_digits(rng, 3)}_thumb",
        )
    )
    return stem + ending


def boilerplate(rng: Random) -> str:
    """Shop and search-engine text, some with nouns stuffed in."""
    nouns = [noun.name for noun in rng.sample(NOUNS, 3)]
    plural = rng.choice(NOUNS).plural
    year, price = rng.randint(2012, 2025), rng.choice((5, 9, 12, 19, 25, 29, 49, 50, 75, 99))
    site = rng.choice(
        ("pinterest", "etsy", "ebay", "amazon", "shutterstock", "flickr", "deviantart", "redbubble")
    )
    return rng.choice(
        (
            f"free shipping on all orders over {price}",
            f"buy {rng.choice(('stickers', 'posters', 'prints', plural))} online best price {year}",
            f"click to {rng.choice(('enlarge', 'zoom', 'view full size', 'open image in new window'))}",
            f"stock photo id {_digits(rng, 5)} royalty free",
            f"royalty free vector image {_digits(rng, 7)}",
            site,
            f"{rng.choice(nouns)} | {site}",
            f"{' '.join(nouns)} clipart png download",
            f"{nouns[0]} {nouns[1]} "
            f"{rng.choice(('wallpaper hd', 'svg bundle', 'sticker pack', 'emoji copy paste'))}",
            f"best {plural} {year} review top {rng.randint(3, 20)}",
            f"{nouns[0]} sticker {price}.99 add to cart",
            f"sale up to {rng.choice((20, 30, 50, 70))}% off {plural}",
            f"{rng.choice(('image may contain', 'this image shows'))}: no description available",
            f"{rng.choice(('logo', 'banner', 'thumbnail', 'placeholder image', 'advertisement', 'icon'))}",
            f"download {nouns[0]} icon free {rng.choice(('png', 'svg', 'psd', 'eps'))} {_digits(rng, 4)}",
            f"copyright {year} all rights reserved",
            f"{nouns[0]} printable coloring page for kids",
            f"share on {site}",
            f"image {rng.randint(1, 9)} of {rng.randint(9, 24)}",
            f"new {nouns[0]} {nouns[1]} gift idea {rng.choice(('birthday', 'christmas', 'easter'))} {year}",
        )
    )
