"""What a scene contains, without pixels: phrasing.py says it, rendering.py paints it."""

from collections.abc import Hashable
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any, Literal

from openblip.data.emoji_scenes.vocabulary import (
    BACKGROUNDS,
    NOUNS,
    Pair,
    Size,
    Split,
    pairs_of,
    triples_of,
)

Relation = Literal["left of", "above"]
RELATIONS: tuple[Relation, ...] = ("left of", "above")

SINGLE_PROBABILITY = 0.4  # one noun, one to three of it
PAIR_PROBABILITY = 0.5  # two nouns in a relation; the rest are three nouns


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """`count` things of one kind and one size."""

    name: str
    size: Size = "normal"
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One kind of thing, a pair in a relation, or two (in clips) or three different things without one.

    `relation` holds between objects[0] and objects[1] ("left of": the first is left of the second).
    """

    objects: tuple[SceneObject, ...]
    background: str
    relation: Relation | None = None

    @property
    def names(self) -> list[str]:
        """The nouns that are shown."""
        return [thing.name for thing in self.objects]

    @property
    def num_things(self) -> int:
        """All copies counted."""
        return sum(thing.count for thing in self.objects)

    def content(self) -> Hashable:
        """Equal exactly for scenes that show the same."""
        things = frozenset(self.objects) if self.relation is None else self.objects
        return things, self.relation, self.background

    def as_json(self) -> dict[str, Any]:
        """Plain dicts and lists, in a fixed key order."""
        return {
            "objects": [asdict(thing) for thing in self.objects],
            "relation": self.relation,
            "background": self.background,
        }


def sizes_of(num_things: int) -> tuple[Size, ...]:
    """The sizes that things may have in a scene: a big one leaves room for nothing else."""
    return ("small", "normal", "big") if num_things == 1 else ("small", "normal")


def draw_scene(rng: Random, split: Split) -> Scene:
    """A scene of `split`: pairs and triples of nouns come from the pairs of that split only."""
    background = rng.choice(list(BACKGROUNDS))
    kind = rng.random()
    if kind < SINGLE_PROBABILITY:
        count = rng.choice((1, 1, 2, 3))
        thing = _draw_object(rng, rng.choice(NOUNS).name, num_things=count, count=count)
        return Scene(objects=(thing,), background=background)
    is_pair = kind < SINGLE_PROBABILITY + PAIR_PROBABILITY
    names = list(rng.choice(pairs_of(split)) if is_pair else rng.choice(triples_of(split)))
    rng.shuffle(names)
    objects = tuple(_draw_object(rng, name, num_things=len(names)) for name in names)
    return Scene(objects=objects, background=background, relation=rng.choice(RELATIONS) if is_pair else None)


def draw_moving_scene(rng: Random, split: Split) -> Scene:
    """The scene of a clip: things of one kind, or two or three different ones, and how they stand is open."""
    num_nouns = rng.choices((1, 2, 3), (40, 40, 20))[0]
    if num_nouns == 1:
        return draw_group(rng, rng.choice(NOUNS).name, rng.choice((1, 1, 2, 3)))
    names = rng.choice(pairs_of(split)) if num_nouns == 2 else rng.choice(triples_of(split))
    objects = tuple(_draw_object(rng, name, num_nouns) for name in rng.sample(names, num_nouns))
    return Scene(objects=objects, background=draw_background(rng))


def draw_background(rng: Random, other_than: str = "") -> str:
    """Any colour, but not `other_than`."""
    return rng.choice([color for color in BACKGROUNDS if color != other_than])


def draw_group(rng: Random, name: str, count: int) -> Scene:
    """`count` of one noun and nothing else."""
    thing = _draw_object(rng, name, num_things=count, count=count)
    return Scene(objects=(thing,), background=draw_background(rng))


def draw_pair_of(rng: Random, names: Pair, relation: Relation) -> Scene:
    """The two nouns, the first left of or above the second."""
    first, second = (_draw_object(rng, name, num_things=2) for name in names)
    return Scene(objects=(first, second), background=draw_background(rng), relation=relation)


def draw_scene_with(rng: Random, split: Split, name: str, size: Size | None = None) -> Scene:
    """A scene with one thing of noun `name`, of `size` where one is given: alone, or in a pair of `split`."""
    pairs = [pair for pair in pairs_of(split) if name in pair]
    if pairs and size != "big" and rng.random() < 0.5:
        first, second = rng.sample(rng.choice(pairs), 2)
        scene = draw_pair_of(rng, (first, second), rng.choice(RELATIONS))
    else:
        scene = draw_group(rng, name, 1)
    if size is None:
        return scene
    objects = tuple(replace(thing, size=size) if thing.name == name else thing for thing in scene.objects)
    return replace(scene, objects=objects)


def _draw_object(rng: Random, name: str, num_things: int, count: int = 1) -> SceneObject:
    return SceneObject(name=name, size=rng.choice(sizes_of(num_things)), count=count)
