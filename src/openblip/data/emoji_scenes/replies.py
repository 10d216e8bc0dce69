"""What is answered in dialogs: for each question, sentences that all say the same."""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain, permutations
from typing import Literal

from openblip.data.emoji_scenes.phrasing import INVERSE_WORDS, RELATION_WORDS
from openblip.data.emoji_scenes.scene import RELATIONS, Relation, SceneObject
from openblip.data.emoji_scenes.vocabulary import BACKGROUNDS, NOUN_BY_NAME, NUMBER_WORDS, Size

Family = Literal["background", "size", "number", "presence", "place", "comparison"]
Texts = tuple[str, ...]

AMOUNTS = {**NUMBER_WORDS, 4: "four", 5: "five"}
SIZES: tuple[Size, ...] = ("small", "normal", "big")


def with_article(name: str) -> str:
    return f"{NOUN_BY_NAME[name].article} {name}"


def plural(name: str) -> str:
    return NOUN_BY_NAME[name].plural


def background_answers(color: str) -> Texts:
    return f"the background is {color}", f"it is {color}", color


def size_answers(thing: SceneObject, size: Size) -> Texts:
    words = "of normal size" if size == "normal" else size
    if thing.count > 1:
        several = "neither small nor big" if size == "normal" else f"{size} ones"
        return f"they are {words}", f"the {plural(thing.name)} are {words}", f"they are {several}"
    one = "neither small nor big" if size == "normal" else f"a {size} one"
    return f"it is {words}", f"the {thing.name} is {words}", f"it is {one}"


def number_answers(name: str, count: int) -> Texts:
    if count == 1:
        return f"there is only one {name}", "only one", f"just one {name}"
    amount = AMOUNTS[count]
    return f"there are {amount} {plural(name)}", amount, f"there are {amount} of them"


def total_answers(count: int) -> Texts:
    if count == 1:
        return "there is only one thing", "only one", "just one thing"
    return f"there are {AMOUNTS[count]} things", AMOUNTS[count], f"{AMOUNTS[count]} things"


def also_answers(names: Sequence[str]) -> Texts:
    """That there is something else: these things, in any order."""
    listings = [" and ".join(with_article(name) for name in order) for order in permutations(names)]
    return tuple(
        form.format(listing)
        for form in ("yes, there is also {}", "yes, i can see {} too", "there is {} as well")
        for listing in listings
    )


NOTHING_ELSE = ("no, there is nothing else", "no, that is all", "nothing else")


def presence_answers(name: str, is_there: bool) -> Texts:
    one = with_article(name)
    if is_there:
        return f"yes, there is {one}", f"yes, i can see {one}", f"yes, {one} is there"
    return f"no, there is no {name}", f"no, i cannot see {one}", f"no, {one} is not there"


def place_answers(relation_words: Texts, name: str) -> Texts:
    """Where a thing is, seen from `name`."""
    return tuple(
        form.format(words, name) for words in relation_words for form in ("it is {} the {}", "{} the {}")
    )


PLACES: dict[Relation, Texts] = {  # of the first of a pair, of the second
    "left of": ("it is on the left", "it is on the right"),
    "above": ("it is at the top", "it is at the bottom"),
}
SAME_SIZE = ("both have the same size", "neither, they are equally big")


def comparison_answers(name: str) -> Texts:
    return f"the {name} is bigger", f"the bigger one is the {name}"


@cache
def sayings(family: Family, name: str) -> Texts:
    """All sentences of `family` about `name` (where it is: seen from there)."""
    groups: dict[Family, Iterable[Texts]] = {
        "background": map(background_answers, BACKGROUNDS),
        "size": (
            size_answers(SceneObject(name=name, count=count), size) for count in (1, 2) for size in SIZES
        ),
        "number": (number_answers(name, count) for count in AMOUNTS),
        "presence": (also_answers([name]), presence_answers(name, True), presence_answers(name, False)),
        "place": (
            place_answers(words[relation], name)
            for words in (RELATION_WORDS, INVERSE_WORDS)
            for relation in RELATIONS
        ),
        "comparison": [comparison_answers(name)],
    }
    return tuple(chain.from_iterable(groups[family]))
