"""The grammar of statements about two pictures, half of them false.

A false statement is nearly true: the two pictures are swapped, or one thing, count, background or arrangement
is another. So the words alone tell nothing, and neither does one picture.

`left` and `right` are said of the pictures only, never of things within one: swap the pictures, exchange the
two words, and a statement stays as true as it was.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from random import Random

from openblip.data.emoji_scenes.scene import (
    RELATIONS,
    Relation,
    Scene,
    draw_background,
    draw_group,
    draw_pair_of,
    draw_scene,
    draw_scene_with,
)
from openblip.data.emoji_scenes.vocabulary import (
    NOUN_BY_NAME,
    NOUNS,
    NUMBER_WORDS,
    Size,
    Split,
    lookalikes,
    pair_allowed,
    pairs_of,
)

TOTAL_WORDS = {**NUMBER_WORDS, 4: "four", 5: "five", 6: "six"}
SIZE_ORDER: tuple[Size, ...] = ("small", "normal", "big")


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What is said about two scenes, whether it is true, and the name of what it is about."""

    kind: str
    text: str
    label: bool
    left: Scene
    right: Scene


@dataclass(slots=True, kw_only=True)
class Occasion:
    """A statement to be made: of which split, whether true, with the stream that decides it.

    `met` are the nouns shown or named so far. In training no two of them are held out: such two do not even
    meet in one sample.
    """

    rng: Random
    split: Split
    label: bool
    met: set[str] = field(default_factory=set)

    def state(self, kind: str, scenes: tuple[Scene, Scene], *wordings: str) -> Statement:
        """About pictures whose order does not matter: they come in any."""
        left, right = self.rng.sample(scenes, 2)
        text = self.rng.choice(wordings)
        return Statement(kind=kind, text=text, label=self.label, left=left, right=right)

    def state_of_side(self, kind: str, here: Scene, there: Callable[[], Scene], *wordings: str) -> Statement:
        """True of `here` on {side} and a scene of `there` on {other}; false of these swapped, or half of the
        time of two of `there`.
        """
        if not self.label and self.rng.random() < 0.5:
            here = there()
        return self.compare_sides(kind, here, there(), *wordings)

    def compare_sides(self, kind: str, here: Scene, there: Scene, *wordings: str) -> Statement:
        """True of `here` on {side} and `there` on {other}, and false of the two swapped."""
        side, other = self.rng.choice((("left", "right"), ("right", "left")))
        text = self.rng.choice(wordings).format(side=side, other=other)
        left, right = (here, there) if (side == "left") == self.label else (there, here)
        return Statement(kind=kind, text=text, label=self.label, left=left, right=right)

    def noun(self) -> str:
        """The noun that the statement is about."""
        name = self.rng.choice(NOUNS).name
        self.met.add(name)
        return name

    def pair(self) -> tuple[str, str]:
        """Two nouns of the split that the statement is about, in any order."""
        first, second = self.rng.sample(self.rng.choice(pairs_of(self.split)), 2)
        self.met.update((first, second))
        return first, second

    def scene(self) -> Scene:
        """Any scene of the split."""
        return self._first_fitting(lambda: draw_scene(self.rng, self.split))

    def scene_with(self, name: str, *, size: Size | None = None, without: str = "") -> Scene:
        """A scene with one of `name`, alone or in a pair, and none of `without`."""
        return self._first_fitting(lambda: draw_scene_with(self.rng, self.split, name, size), without)

    def scene_without(self, *names: str) -> Scene:
        """A scene of the same make with none of `names`, half the time with a lookalike of the last."""

        def draw() -> Scene:
            is_alike = self.rng.random() < 0.5
            shown = self.rng.choice(lookalikes(names[-1])) if is_alike else self.rng.choice(NOUNS).name
            return draw_scene_with(self.rng, self.split, shown)

        return self._first_fitting(draw, *names)

    def _first_fitting(self, draw: Callable[[], Scene], *without: str) -> Scene:
        while True:
            scene = draw()
            names = set(scene.names)
            if names.isdisjoint(without) and self._may_meet(names | self.met):
                self.met |= names
                return scene

    def _may_meet(self, names: Collection[str]) -> bool:
        if self.split in ("val", "test"):  # few pairs are theirs; within each picture the scene holds to them
            return True
        return all(pair_allowed(self.split, a, b) for a in names for b in names if a < b)

    def arranged(self, first: str, second: str, arrangement: str) -> Scene:
        """The pair one above the other, or side by side in any order."""
        if arrangement == "below" or (arrangement == "next to" and self.rng.random() < 0.5):
            first, second = second, first
        relation: Relation = "left of" if arrangement == "next to" else "above"
        return draw_pair_of(self.rng, (first, second), relation)


def state_shown(on: Occasion) -> Statement:
    name = on.noun()
    thing = _a(name)
    return on.state_of_side(
        "shown on a side",
        on.scene_with(name),
        lambda: on.scene_without(name),
        f"the {{side}} picture shows {thing}",
        f"there is {thing} in the {{side}} picture",
        f"{thing} can be seen in the picture on the {{side}}",
    )


def state_count(on: Occasion) -> Statement:
    name = on.noun()
    here, *others = on.rng.sample((1, 2, 3), 3)
    counted, verb = _counted(name, here)
    return on.state_of_side(
        "count on a side",
        draw_group(on.rng, name, here),
        lambda: draw_group(on.rng, name, on.rng.choice(others)),
        f"the {{side}} picture shows {counted}",
        f"there {verb} {counted} in the {{side}} picture",
    )


def state_more(on: Occasion) -> Statement:
    """Which picture shows more (fewer); a third of the false ones are of equal numbers."""
    name, word = on.noun(), on.rng.choice(("more", "fewer"))
    here, there = sorted(on.rng.sample((1, 2, 3), 2), reverse=word == "more")
    if not on.label and on.rng.random() < 1 / 3:
        here = there
    plural = NOUN_BY_NAME[name].plural
    return on.compare_sides(
        "more on a side",
        draw_group(on.rng, name, here),
        draw_group(on.rng, name, there),
        f"the {{side}} picture shows {word} {plural} than the {{other}} one",
        f"there are {word} {plural} in the {{side}} picture than in the {{other}} one",
    )


def state_background(on: Occasion) -> Statement:
    here = on.scene()
    return on.state_of_side(
        "background on a side",
        here,
        lambda: replace(on.scene(), background=draw_background(on.rng, other_than=here.background)),
        f"the {{side}} picture has a {here.background} background",
        f"the background of the {{side}} picture is {here.background}",
    )


def state_size(on: Occasion) -> Statement:
    name = on.noun()
    sizes: tuple[Size, ...] = ("small", "big")
    here = on.rng.choice(sizes)
    others = [size for size in SIZE_ORDER if size != here]
    return on.state_of_side(
        "size on a side",
        on.scene_with(name, size=here),
        lambda: on.scene_with(name, size=on.rng.choice(others)),
        f"the {name} in the {{side}} picture is {here}",
        f"the {{side}} picture shows a {here} {name}",
    )


def state_bigger(on: Occasion) -> Statement:
    name, word = on.noun(), on.rng.choice(("bigger", "smaller"))
    sizes = on.rng.sample(SIZE_ORDER, 2)
    here, there = sorted(sizes, key=SIZE_ORDER.index, reverse=word == "bigger")
    return on.compare_sides(
        "bigger on a side",
        on.scene_with(name, size=here),
        on.scene_with(name, size=there),
        f"the {name} in the {{side}} picture is {word} than the one in the {{other}} picture",
        f"the {{side}} picture shows a {word} {name} than the {{other}} one",
    )


def state_relation(on: Occasion) -> Statement:
    """How two things stand in one of the pictures; in the other the same two stand differently."""
    first, second, told, others = _draw_arrangement(on)
    return on.state_of_side(
        "relation on a side",
        on.arranged(first, second, told),
        lambda: on.arranged(first, second, on.rng.choice(others)),
        f"in the {{side}} picture {_a(first)} is {told} {_a(second)}",
        f"the {{side}} picture shows {_a(first)} {told} {_a(second)}",
        f"the {first} is {told} the {second} in the {{side}} picture",
    )


def state_how_many_show(on: Occasion) -> Statement:
    """Whether both, one, at least one or neither of the pictures shows a thing."""
    claim, true_of, false_of = on.rng.choice(_SHOWING)
    number = on.rng.choice(true_of if on.label else false_of)
    name = on.noun()
    first = on.scene_with(name) if number > 0 else on.scene_without(name)
    second = on.scene_with(name) if number > 1 else on.scene_without(name)
    return on.state("how many pictures show", (first, second), f"{claim} {_a(name)}")


# What is claimed; the numbers of pictures that show the thing of which it is true, and false but nearly true.
_SHOWING: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("both pictures show", (2,), (1,)),
    ("only one of the pictures shows", (1,), (0, 2)),
    ("at least one of the pictures shows", (1, 2), (0,)),
    ("neither of the pictures shows", (0,), (1,)),
)


def state_total(on: Occasion) -> Statement:
    """The claim is drawn first, so that its number tells nothing; a false one is off by one."""
    name, claimed = on.noun(), on.rng.randint(2, 6)
    total = claimed
    if not on.label:
        total = on.rng.choice([near for near in (claimed - 1, claimed + 1) if 2 <= near <= 6])
    count = on.rng.randint(max(1, total - 3), min(3, total - 1))
    plural = NOUN_BY_NAME[name].plural
    return on.state(
        "total",
        (draw_group(on.rng, name, count), draw_group(on.rng, name, total - count)),
        f"there are {TOTAL_WORDS[claimed]} {plural} in total",
        f"the two pictures show {TOTAL_WORDS[claimed]} {plural} together",
        f"there are {TOTAL_WORDS[claimed]} {plural} in the two pictures",
    )


def state_same_count(on: Occasion) -> Statement:
    name, is_same = on.noun(), on.rng.random() < 0.5
    first = on.rng.randint(1, 3)
    second = first if is_same else on.rng.choice([count for count in (1, 2, 3) if count != first])
    claim = "the same number" if is_same == on.label else "different numbers"
    plural = NOUN_BY_NAME[name].plural
    return on.state(
        "same count",
        (draw_group(on.rng, name, first), draw_group(on.rng, name, second)),
        f"the pictures show {claim} of {plural}",
        f"there are {claim} of {plural} in the two pictures",
    )


def state_backgrounds(on: Occasion) -> Statement:
    """Whether both have the same background, or both have a certain one."""
    is_same = on.rng.random() < 0.5
    first, second = on.scene(), on.scene()
    color = first.background
    second = replace(second, background=color if is_same else draw_background(on.rng, other_than=color))
    if is_same != on.label:
        wordings = ("the two pictures have different backgrounds",)
    elif on.rng.random() < 0.5:
        wordings = ("the two pictures have the same background",)
    else:
        wordings = (f"both pictures have a {color} background",)
    return on.state("backgrounds", (first, second), *wordings)


def state_one_each(on: Occasion) -> Statement:
    """One thing in one picture and another in the other; if false, one is missing or both stand together."""
    first, second = on.pair()
    if on.label:
        scenes = on.scene_with(first, without=second), on.scene_with(second, without=first)
    elif on.rng.random() < 2 / 3:
        scenes = on.scene_with(first, without=second), on.scene_without(first, second)
    else:
        pair = draw_pair_of(on.rng, (first, second), on.rng.choice(RELATIONS))
        scenes = pair, on.scene_without(first, second)
    return on.state(
        "one each",
        scenes,
        f"one picture shows {_a(first)} and the other {_a(second)}",
        f"one of the pictures shows {_a(first)}, the other one {_a(second)}",
    )


def state_relation_in_one(on: Occasion) -> Statement:
    """How two things stand in one or both of the pictures; elsewhere the same two stand differently."""
    first, second, told, others = _draw_arrangement(on)
    claims_both = on.rng.random() < 0.5
    number = (2 if on.label else 1) if claims_both else (1 if on.label else 0)
    arrangements = [told] * number + [on.rng.choice(others) for _ in range(2 - number)]
    scenes = (on.arranged(first, second, arrangements[0]), on.arranged(first, second, arrangements[1]))
    claim = "in both pictures" if claims_both else "in one of the pictures"
    return on.state(
        "relation in one or both",
        scenes,
        f"{claim} {_a(first)} is {told} {_a(second)}",
        f"{_a(first)} is {told} {_a(second)} {claim}",
    )


Stater = Callable[[Occasion], Statement]
OF_A_SIDE: tuple[Stater, ...] = (
    state_shown,
    state_count,
    state_more,
    state_background,
    state_size,
    state_bigger,
    state_relation,
)
OF_BOTH: tuple[Stater, ...] = (
    state_how_many_show,
    state_total,
    state_same_count,
    state_backgrounds,
    state_one_each,
    state_relation_in_one,
)


def draw_statement(rng: Random, split: Split) -> Statement:
    """Half of them speak of left and right, half of each kind are true."""
    state = rng.choice(rng.choice((OF_A_SIDE, OF_BOTH)))
    return state(Occasion(rng=rng, split=split, label=rng.random() < 0.5))


def _draw_arrangement(on: Occasion) -> tuple[str, str, str, list[str]]:
    """Two nouns, how the first is said to stand to the second, and how it could stand otherwise."""
    first, second = on.pair()
    told = on.rng.choice(("above", "below", "next to"))
    return first, second, told, [other for other in ("above", "below", "next to") if other != told]


def _a(name: str) -> str:
    return f"{NOUN_BY_NAME[name].article} {name}"


def _counted(name: str, count: int) -> tuple[str, str]:
    """("two dogs", "are") or ("one dog", "is")."""
    noun = NOUN_BY_NAME[name]
    return f"{NUMBER_WORDS[count]} {noun.name if count == 1 else noun.plural}", "is" if count == 1 else "are"
