"""What a scene contains, without pixels: phrasing.py says it, rendering.py paints it."""

from collections.abc import Hashable
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, Literal

from openblip.data.emoji_scenes.vocabulary import (
    BACKGROUNDS,
    NOUNS,
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
    """One kind of thing, a pair in a relation, or three different things without one.

    `relation` holds between objects[0] and objects[1] ("left of": the first is left of the second).
    """

    objects: tuple[SceneObject, ...]
    background: str
    relation: Relation | None = None

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


def _draw_object(rng: Random, name: str, num_things: int, count: int = 1) -> SceneObject:
    return SceneObject(name=name, size=rng.choice(sizes_of(num_things)), count=count)
