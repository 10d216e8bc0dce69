"""The grammar of captions: every true caption of a scene, and captions as wrong as alt-text on the web.

Sizes are said exactly when they are not normal, so captions of a scene differ in their form only: a text of
this grammar that is not among the true captions of a scene is false for it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import permutations
from random import Random
from typing import Any

from openblip.emoji_scenes import scene as world
from openblip.emoji_scenes.scene import BACKGROUNDS, NOUNS, WORLD, Relation, Scene, SceneObject, Split, draw_other

RELATION_WORDS: dict[Relation, dict[str, list[str]]] = WORLD["relations"]
# True both ways, and said only together with the background, so that captions with it tell scenes apart too.
SIDE_BY_SIDE = "next to"
CAPTION_FORMS: dict[str, list[str]] = WORLD["captions"]


def relation_from_both_ends(scene: Scene) -> list[tuple[SceneObject, list[str], SceneObject]]:
    """Return the relation of a pair in both directions: a thing, how it stands to the other, the other."""
    assert scene.relation is not None
    first, second = scene.objects
    words = RELATION_WORDS[scene.relation]
    return [(first, words["forward"], second), (second, words["backward"], first)]


def true_captions(scene: Scene) -> tuple[str, ...]:
    """Return all true captions of `scene`, distinct, in a fixed order."""
    color = {"c": scene.background}
    if scene.relation is not None:
        told = [
            {"x": subject, "r": words, "y": other} | color
            for subject, alternatives, other in relation_from_both_ends(scene)
            for words in alternatives
        ]
        captions = fill_forms(CAPTION_FORMS["bare_pair"], told)
        x, y = scene.objects
        if scene.relation == "left of":
            told += [{"x": a, "r": SIDE_BY_SIDE, "y": b} | color for a, b in ((x, y), (y, x))]
        captions += fill_forms(CAPTION_FORMS["pair"], told)
        p, q = RELATION_WORDS[scene.relation]["places"]
        captions += fill_forms(CAPTION_FORMS["place"], [{"x": x, "y": y, "p": p, "q": q} | color])
    elif len(scene.objects) == 1:
        (x,) = scene.objects
        captions = fill_forms(CAPTION_FORMS["single"], [{"x": x, "is": x.verb} | color])
    else:
        orders = permutations(map(str, scene.objects))
        listings = [f"{', '.join(order[:-1])} and {order[-1]}" for order in orders]
        captions = fill_forms(CAPTION_FORMS["list"], [{"l": listing} | color for listing in listings])
    return tuple(dict.fromkeys(captions))


def fill_forms(forms: Iterable[str], fillings: Iterable[Mapping[str, object]]) -> list[str]:
    """Return every form with every filling; the forms are the outer loop."""
    return [form.format_map(filling) for form in forms for filling in fillings]


def described_objects(scene: Scene) -> list[dict[str, Any]]:
    """Return what is true of the things of `scene` and of its background, as the field `objects` of docs/data.md.

    How the things of a scene without a relation stand is not said.
    """
    objects: list[dict[str, Any]] = []
    for thing in scene.objects:
        sizes = [] if thing.size == "normal" else [thing.size]
        objects.append({"name": thing.name, "count": thing.count, "attributes": sizes})
    if scene.relation is not None:
        places = RELATION_WORDS[scene.relation]["places"]
        both_ways = [SIDE_BY_SIDE] if scene.relation == "left of" else []
        for fields, place, (_, words, other) in zip(objects, places, relation_from_both_ends(scene), strict=True):
            held = [{"phrase": phrase, "to": other.name} for phrase in [*words, *both_ways]]
            fields["relations"] = [*held, {"phrase": place}]
    background = {"name": "background", "synonyms": ["wall", "picture"], "attributes": [scene.background]}
    return [*objects, background | {"stuff": True}]


def says_background(scene: Scene, caption: str) -> bool:
    """Whether a true caption names the background."""
    return scene.background in caption.replace(",", "").split()


def says_relation(scene: Scene, caption: str) -> bool:
    """Whether a true caption says how the things stand, if the scene has a relation."""
    return scene.relation is None or SIDE_BY_SIDE not in caption


def class_phrases() -> dict[str, str]:
    """Return the name of each class, and what takes the place of {} in a template: "dog": "a dog"."""
    return {name: SceneObject(name=name).a_noun for name in NOUNS}


def class_templates() -> list[str]:
    """Return the captions of one thing of normal size on every background, with {} for the thing."""
    fillings = [{"x": "{}", "is": "is", "c": color} for color in BACKGROUNDS]
    return [caption for filling in fillings for caption in fill_forms(CAPTION_FORMS["single"], [filling])]


# Noise: captions as they are on the web
WEB_TEXTS: dict[str, Any] = WORLD["noise"]
NOISE_SHARES: dict[str, int] = WEB_TEXTS["shares"]
OPEN_WORDS = frozenset((*BACKGROUNDS, *WEB_TEXTS["open_words"]))


def normalize(text: str) -> str:
    """Return the text as BLIP's pre_caption reads it: lower case, without .!"()*#:;~, single spaces."""
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", text.lower()).split())


def draw_noisy_caption(scene: Scene, split: Split, rng: Random, other_caption: Callable[[], str]) -> tuple[str, str]:
    """Draw a caption that is not true of `scene`, and its kind; `other_caption` draws one of another image."""
    captions = true_captions(scene)
    normalized = {normalize(caption) for caption in captions}
    (kind,) = rng.choices(list(NOISE_SHARES), list(NOISE_SHARES.values()))
    while True:
        match kind:
            case "other_caption":
                caption = other_caption()
            case "wrong_object" | "wrong_attribute":
                caption = rng.choice(true_captions(_changed(scene, kind, split, rng)))
            case "truncated":
                caption = _truncate(rng.choice(captions), rng)
            case _:
                caption = _draw_web_text(kind, rng)
        if normalize(caption) not in normalized:
            return caption, kind


def _changed(scene: Scene, kind: str, split: Split, rng: Random) -> Scene:
    """Change a noun ("wrong_object"), or a size, a count, the background or the relation ("wrong_attribute").

    The result is a scene that could exist; its pairs of nouns stay within those of the split.
    """
    attributes = ["size", "background"]
    attributes += ["relation"] if scene.relation is not None else []
    attributes += ["count"] if len(scene.objects) == 1 else []
    attribute = rng.choice(attributes) if kind == "wrong_attribute" else "name"
    if attribute == "background":
        return replace(scene, background=draw_other(rng, BACKGROUNDS, than=scene.background))
    if attribute == "relation":
        swapped = replace(scene, objects=scene.objects[::-1])
        (other,) = (relation for relation in world.RELATIONS if relation != scene.relation)
        return rng.choice([swapped, swapped, replace(scene, relation=other), replace(swapped, relation=other)])
    position = rng.randrange(len(scene.objects))
    thing = scene.objects[position]
    if attribute == "size":
        changed = replace(thing, size=draw_other(rng, world.sizes_of(scene.num_things), than=thing.size))
    elif attribute == "count":
        count = draw_other(rng, (1, 2, 3), than=thing.count)
        size = thing.size if thing.size in world.sizes_of(count) else rng.choice(world.sizes_of(count))
        changed = replace(thing, count=count, size=size)
    else:
        others = [name for name in scene.names if name != thing.name]
        allowed = [name for name in world.nouns_allowed_with(split, others) if name != thing.name]
        changed = replace(thing, name=rng.choice(allowed))
    return replace(scene, objects=tuple(changed if each is thing else each for each in scene.objects))


def _truncate(caption: str, rng: Random) -> str:
    """Keep a quarter to three quarters of `caption`, cut inside a word or after a word that needs another."""
    cuts = []
    for end in range(len(caption) // 4, 3 * len(caption) // 4 + 1):
        last_word = caption[:end].rsplit(" ", 1)[-1]
        if caption[end] == " ":
            leaves_it_open = last_word in OPEN_WORDS
        else:
            # A cut that leaves a noun ("two dog", "a car" of a carrot) could pass for a whole caption.
            leaves_it_open = caption[end - 1 : end + 1].isalpha() and last_word not in NOUNS
        if leaves_it_open:
            cuts.append(caption[:end])
    return rng.choice(cuts)


def _draw_web_text(kind: str, rng: Random) -> str:
    """Draw the name of an image's file, or the text of a shop or a search engine, some with nouns stuffed in."""
    if kind == "file_name":
        ending = str(rng.choice(WEB_TEXTS["file_endings"]))
        templates, words = WEB_TEXTS["file_names"], {"noun": rng.choice(NOUNS).replace(" ", rng.choice("-_"))}
    else:
        ending, templates = "", WEB_TEXTS["boilerplate"]
        words = dict(zip("abc", rng.sample(NOUNS, 3), strict=True))
        words["plural"] = SceneObject(name=rng.choice(NOUNS)).plural
        words["year"] = str(rng.randint(2012, 2025))
        words["price"] = str(rng.choice(WEB_TEXTS["prices"]))
        words["site"] = rng.choice(WEB_TEXTS["sites"])

    def fill(field: re.Match[str]) -> str:
        content = field[1]
        if content.startswith("#"):
            return "".join(rng.choice("0123456789") for _ in range(int(content[1:])))
        if re.fullmatch(r"\d+-\d+", content):
            low, high = content.split("-")
            return str(rng.randint(int(low), int(high))).zfill(len(low))
        choice = rng.choice(content.split("|")) if "|" in content else content
        return words.get(choice, choice)

    # All templates are filled, in their order, before one is drawn.
    return rng.choice([re.sub(r"\{(.+?)\}", fill, template) for template in templates]) + ending
