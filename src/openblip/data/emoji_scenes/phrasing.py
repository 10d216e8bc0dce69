"""The grammar: every true caption of a scene.

Sizes are said exactly when they are not normal, so nothing about a caption is a matter of taste but its form:
a text of this grammar that is not among the references of a scene is false for it.
"""

from itertools import permutations

from openblip.data.emoji_scenes.scene import Relation, Scene, SceneObject
from openblip.data.emoji_scenes.vocabulary import COUNT_WORDS, NOUN_BY_NAME

# {x} is what is seen, {is} agrees with its number, {c} the colour of the background.
SINGLE_FORMS = (
    "{x} on a {c} background",
    "{x} in front of a {c} wall",
    "{x}, {c} background",
    "there {is} {x} on a {c} background",
    "there {is} {x} in front of a {c} wall",
    "on a {c} background there {is} {x}",
    "a picture of {x} on a {c} background",
    "a drawing of {x} in front of a {c} wall",
    "a {c} background with {x}",
    "a {c} picture with {x}",
)
# {r} is a relation that holds from {x} to {y}.
PAIR_FORMS = (
    "{x} {r} {y} on a {c} background",
    "{x} {r} {y} in front of a {c} wall",
    "{x} is {r} {y}, {c} background",
    "on a {c} background, {x} is {r} {y}",
    "there is {x} {r} {y} on a {c} background",
    "a picture of {x} {r} {y} on a {c} background",
)
BARE_PAIR_FORM = "{x} {r} {y}"
PLACE_FORMS: dict[Relation, tuple[str, ...]] = {
    "left of": (
        "on a {c} background, {x} on the left and {y} on the right",
        "{x} on the left, {y} on the right, {c} background",
    ),
    "above": (
        "on a {c} background, {x} at the top and {y} at the bottom",
        "{x} at the top, {y} at the bottom, {c} background",
    ),
}
RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left of": ("to the left of", "left of"),
    "above": ("above",),
}
INVERSE_WORDS: dict[Relation, tuple[str, ...]] = {
    "left of": ("to the right of", "right of"),
    "above": ("below",),
}
SIDE_BY_SIDE = (
    "next to"  # true both ways, and said with the background only, so that it still tells scenes apart
)
# {l} lists two or three things in any order.
LIST_FORMS = (
    "{l} on a {c} background",
    "{l} in front of a {c} wall",
    "there is {l} on a {c} background",
    "a picture of {l} on a {c} background",
    "{l}, {c} background",
)


def noun_phrase(thing: SceneObject) -> str:
    """ "a dog", "an owl", "a small owl", "two small dogs": the size is said when it is not normal."""
    noun = NOUN_BY_NAME[thing.name]
    size = "" if thing.size == "normal" else f"{thing.size} "
    if thing.count > 1:
        return f"{COUNT_WORDS[thing.count]} {size}{noun.plural}"
    return f"{'a' if size else noun.article} {size}{noun.name}"


def references(scene: Scene) -> tuple[str, ...]:
    """All true captions of `scene`, distinct, in a fixed order."""
    if scene.relation is not None:
        captions = _pair_captions(scene, scene.relation)
    elif len(scene.objects) == 1:
        captions = _single_captions(scene)
    else:
        captions = _list_captions(scene)
    return tuple(dict.fromkeys(captions))


def _single_captions(scene: Scene) -> list[str]:
    thing = scene.objects[0]
    verb = "is" if thing.count == 1 else "are"
    words = {"x": noun_phrase(thing), "is": verb, "c": scene.background}
    return [form.format(**words) for form in SINGLE_FORMS]


def _pair_captions(scene: Scene, relation: Relation) -> list[str]:
    x, y = (noun_phrase(thing) for thing in scene.objects)
    told = [(x, words, y) for words in RELATION_WORDS[relation]]
    told += [(y, words, x) for words in INVERSE_WORDS[relation]]
    captions = [BARE_PAIR_FORM.format(x=a, r=words, y=b) for a, words, b in told]
    if relation == "left of":
        told += [(x, SIDE_BY_SIDE, y), (y, SIDE_BY_SIDE, x)]
    captions += [
        form.format(x=a, r=words, y=b, c=scene.background) for form in PAIR_FORMS for a, words, b in told
    ]
    captions += [form.format(x=x, y=y, c=scene.background) for form in PLACE_FORMS[relation]]
    return captions


def _list_captions(scene: Scene) -> list[str]:
    phrases = [noun_phrase(thing) for thing in scene.objects]
    listings = [f"{', '.join(order[:-1])} and {order[-1]}" for order in permutations(phrases)]
    return [form.format(l=listing, c=scene.background) for form in LIST_FORMS for listing in listings]
