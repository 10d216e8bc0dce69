"""What a scene contains, without pixels: the nouns of world.toml, which of them a split shows together, scenes."""

import hashlib
import tomllib
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeVar, get_args

Kind = Literal[
    "captions", "paraphrases", "questions", "statements", "dialogs", "clips", "clip-questions", "classes", "documents"
]
Split = Literal["web", "human", "val", "test"]
Size = Literal["small", "normal", "big"]
Relation = Literal["left of", "above"]
KIND_NAMES: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)
SIZES: tuple[Size, ...] = get_args(Size)  # in ascending order
RELATIONS: tuple[Relation, ...] = get_args(Relation)
EVALUATION_SPLITS = ("val", "test")  # they show pairs of nouns that no other split shows
SINGLE_PROBABILITY = 0.4  # of a scene with one noun, one to three of it
PAIR_PROBABILITY = 0.5  # of two nouns in a relation; the rest are three nouns
NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
# The nouns, colours and sentences of the world; the texts of this file and of the grammars come from here.
WORLD: dict[str, Any] = tomllib.loads((Path(__file__).parent / "world.toml").read_text(encoding="utf-8"))
NOUNS: tuple[str, ...] = tuple(WORLD["nouns"])
BACKGROUNDS: dict[str, tuple[int, ...]] = {name: tuple(color) for name, color in WORLD["backgrounds"].items()}

_T = TypeVar("_T")


@cache
def lookalikes(name: str) -> tuple[str, ...]:
    """Return the nouns that are most easily mistaken for `name`."""
    (row,) = (row for row in WORLD["lookalikes"] if name in row)
    return tuple(other for other in row if other != name)


@cache
def pair_allowed(split: Split, first: str, second: str) -> bool:
    """Whether scenes of `split` may show both nouns together, in any order; it never changes.

    Of 100 pairs 10 are for test, 6 for val, and all others for the two splits of training.
    """
    digest = hashlib.sha256("|".join(sorted((first, second))).encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    pair_split = "test" if bucket < 10 else "val" if bucket < 16 else "train"
    return pair_split == (split if split in EVALUATION_SPLITS else "train")


@cache
def pairs_of(split: Split) -> tuple[tuple[str, str], ...]:
    """Return the unordered noun pairs of `split`, in vocabulary order."""
    return tuple(pair for pair in combinations(NOUNS, 2) if pair_allowed(split, *pair))


@cache
def triples_of(split: Split) -> tuple[tuple[str, str, str], ...]:
    """Return the unordered noun triples all of whose pairs belong to `split`, in vocabulary order."""
    pairs = set(pairs_of(split))
    return tuple((a, b, c) for a, b in pairs_of(split) for c in NOUNS if (b, c) in pairs and (a, c) in pairs)


def nouns_allowed_with(split: Split, shown: Collection[str]) -> list[str]:
    """Return the nouns that are not shown and make pairs of `split` with all that are."""
    return [name for name in NOUNS if name not in shown and all(pair_allowed(split, name, other) for other in shown)]


def draw_absent_noun(rng: Random, split: Split, shown: Collection[str]) -> str:
    """Draw a noun that is not shown, half of the time a lookalike of one that is.

    It makes pairs of `split` with all that is shown, so that no text of training names two nouns together
    that are held out. Val and test have few pairs: there one such pair is enough, or none where none exists.
    """
    absent = [name for name in NOUNS if name not in shown]
    allowed_with_one = [name for name in absent if any(pair_allowed(split, name, other) for other in shown)]
    choices = nouns_allowed_with(split, shown) or allowed_with_one or absent
    if rng.random() < 0.5:
        alike = {other for name in shown for other in lookalikes(name)}
        choices = [name for name in choices if name in alike] or choices
    return rng.choice(choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """`count` things of one noun and one size, and the words for them, which fill the forms of the grammars.

    `a_noun` ("an owl") and `plural` ("owls") are the same for any number and size; `noun` ("owl", "owls"), `number`
    ("one", "two"), `verb` ("is", "are") and `pronoun` ("it", "they") go by the number.
    """

    name: str
    size: Size = "normal"
    count: int = 1

    def __str__(self) -> str:
        """ "a dog", "an owl", "a small owl", "two small dogs": the size is said when it is not normal."""
        number = "a" if self.count == 1 else self.number
        if self.size != "normal":
            return f"{number} {self.size} {self.noun}"
        return self.a_noun if self.count == 1 else f"{number} {self.noun}"

    @property
    def a_noun(self) -> str:
        return f"an {self.name}" if self.name[0] in "aeiou" and self.name != "unicorn" else f"a {self.name}"

    @property
    def plural(self) -> str:
        return str(WORLD["irregular_plurals"].get(self.name, f"{self.name}s"))

    @property
    def noun(self) -> str:
        return self.name if self.count == 1 else self.plural

    @property
    def number(self) -> str:
        return NUMBER_WORDS[self.count]

    @property
    def verb(self) -> str:
        return "is" if self.count == 1 else "are"

    @property
    def pronoun(self) -> str:
        return "it" if self.count == 1 else "they"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One kind of thing, two kinds in a relation, or two (in videos) or three kinds without one.

    The relation holds from objects[0] to objects[1] ("left of": the first is left of the second).
    """

    objects: tuple[SceneObject, ...]
    background: str
    relation: Relation | None = None

    @property
    def scenes(self) -> tuple["Scene", ...]:
        """The scene itself, as a text has the scenes that it is about."""
        return (self,)

    @property
    def names(self) -> list[str]:
        return [thing.name for thing in self.objects]

    @property
    def num_things(self) -> int:
        return sum(thing.count for thing in self.objects)

    def content(self) -> Hashable:
        """Return a value that is equal exactly for scenes that show the same."""
        return frozenset(self.objects) if self.relation is None else self.objects, self.relation, self.background

    def as_json(self, details: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the scene as plain values in a fixed key order, each object with its details (boxes)."""
        objects = [asdict(thing) | dict(more) for thing, more in zip(self.objects, details, strict=True)]
        return {"objects": objects, "relation": self.relation, "background": self.background}


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneText:
    """A text about one scene, or about two (left, right): its kind, and the fields of the json file that it decides."""

    scenes: tuple[Scene, ...]
    kind: str
    text: str
    fields: dict[str, Any]


def sizes_of(num_things: int) -> tuple[Size, ...]:
    """Return the sizes that the things of a scene may have: a big one leaves no room for another."""
    return SIZES if num_things == 1 else ("small", "normal")


def draw_other(rng: Random, values: Iterable[_T], than: _T | None = None) -> _T:
    """Draw any of the values but `than`."""
    return rng.choice([value for value in values if value != than])


def draw_scene(rng: Random, split: Split) -> Scene:
    """Draw a scene of `split`: pairs and triples of nouns come from the pairs of that split only."""
    background = draw_other(rng, BACKGROUNDS)
    kind = rng.random()
    if kind < SINGLE_PROBABILITY:
        count = rng.choice((1, 1, 2, 3))
        return draw_scene_of(rng, rng.choice(NOUNS), count=count, background=background)
    is_pair = kind < SINGLE_PROBABILITY + PAIR_PROBABILITY
    names = list(rng.choice(pairs_of(split)) if is_pair else rng.choice(triples_of(split)))
    rng.shuffle(names)
    scene = draw_scene_of(rng, *names, background=background)
    return replace(scene, relation=rng.choice(RELATIONS)) if is_pair else scene


def draw_moving_scene(rng: Random, split: Split) -> Scene:
    """Draw the scene of a video: things of one kind, or one of each of two or three kinds; no relation."""
    (num_nouns,) = rng.choices((1, 2, 3), (40, 40, 20))
    if num_nouns == 1:
        return draw_scene_of(rng, rng.choice(NOUNS), count=rng.choice((1, 1, 2, 3)))
    names = rng.choice(pairs_of(split)) if num_nouns == 2 else rng.choice(triples_of(split))
    return draw_scene_of(rng, *rng.sample(names, num_nouns))


def draw_scene_with(rng: Random, split: Split, name: str, size: Size | None = None) -> Scene:
    """Draw a scene with one thing of noun `name`, alone or in a pair of `split`; any size when it is None."""
    pairs = [pair for pair in pairs_of(split) if name in pair]
    if pairs and size != "big" and rng.random() < 0.5:
        names = rng.sample(rng.choice(pairs), 2)
        scene = draw_scene_of(rng, *names, relation=rng.choice(RELATIONS))
    else:
        scene = draw_scene_of(rng, name)
    if size is None:
        return scene
    objects = tuple(replace(thing, size=size) if thing.name == name else thing for thing in scene.objects)
    return replace(scene, objects=objects)


def draw_scene_of(
    rng: Random, *names: str, count: int = 1, relation: Relation | None = None, background: str | None = None
) -> Scene:
    """Draw a scene with `count` of each noun and nothing else, in sizes that fit; any background when it is None."""
    sizes = sizes_of(count * len(names))
    objects = tuple(SceneObject(name=name, size=rng.choice(sizes), count=count) for name in names)
    return Scene(objects=objects, background=background or draw_other(rng, BACKGROUNDS), relation=relation)
