"""The grammar of statements about two images, half of them false.

A false statement is nearly true: the two images are swapped, or one thing, count, background or arrangement
is another. So the words alone say nothing about the label, and neither does one image.

`left` and `right` are said of the images only, never of things within one: swap the images, exchange the two
words, and a statement stays as true as it was.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from random import Random

from openblip.emoji_scenes import scene as world
from openblip.emoji_scenes.scene import (
    BACKGROUNDS,
    SIZES,
    WORLD,
    Scene,
    SceneObject,
    SceneText,
    Size,
    Split,
    draw_other,
)

STATEMENT_FORMS: dict[str, list[str]] = WORLD["statements"]
OF_A_SIDE = [kind for kind in STATEMENT_FORMS if kind.endswith("on a side")]
OF_BOTH = [kind for kind in STATEMENT_FORMS if kind not in OF_A_SIDE]
# How the first of a pair can be said to stand to the second.
ARRANGEMENTS = ("above", "below", "next to")


def draw_statement(rng: Random, split: Split) -> SceneText:
    """Draw a statement: half of them speak of left and right, and half of each kind are true."""
    return SceneContext(rng, split).draw_statement()


class SceneContext:
    """A statement in the making: its kind, its split, whether it is true, and the stream that decides it.

    `words` fill its forms. `met` are the nouns shown or named so far: in training no two of them are held
    out, since such two do not even meet in one sample.
    """

    def __init__(self, rng: Random, split: Split) -> None:
        self.rng, self.split = rng, split
        self.kind, self.label = rng.choice(rng.choice((OF_A_SIDE, OF_BOTH))), rng.random() < 0.5
        self.words: dict[str, object] = {}
        self.met: set[str] = set()

    def draw_statement(self) -> SceneText:
        """Draw the scenes and the words of a statement of this kind."""
        rng, label, words = self.rng, self.label, self.words
        match self.kind:
            case "shown on a side":
                name = self._draw_noun()
                return self._of_side(self._scene_with(name), lambda: self._scene_without(name))
            case "count on a side":
                name = self._draw_noun()
                count, *others = rng.sample((1, 2, 3), 3)
                words["things"] = SceneObject(name=name, count=count)
                return self._of_side(self._group(name, count), lambda: self._group(name, rng.choice(others)))
            case "more on a side":  # a third of the false ones are of equal numbers
                name, more = self._draw_noun(), rng.choice(("more", "fewer"))
                words["more"] = more
                count, count_there = sorted(rng.sample((1, 2, 3), 2), reverse=more == "more")
                if not label and rng.random() < 1 / 3:
                    count = count_there
                return self._of_swapped(self._group(name, count), self._group(name, count_there))
            case "background on a side":
                scene = self._draw_scene()
                words["color"] = color = scene.background
                colors = [name for name in BACKGROUNDS if name != color]
                return self._of_side(scene, lambda: replace(self._draw_scene(), background=rng.choice(colors)))
            case "size on a side":
                name, size = self._draw_noun(), rng.choice((SIZES[0], SIZES[-1]))
                words["size"] = size
                here = self._scene_with(name, size)
                return self._of_side(here, lambda: self._scene_with(name, draw_other(rng, SIZES, than=size)))
            case "bigger on a side":
                name, bigger = self._draw_noun(), rng.choice(("bigger", "smaller"))
                words["bigger"] = bigger
                size, size_there = sorted(rng.sample(SIZES, 2), key=SIZES.index, reverse=bigger == "bigger")
                return self._of_swapped(self._scene_with(name, size), self._scene_with(name, size_there))
            case "relation on a side":  # in the other image the same two stand differently
                name, other = self._draw_pair()
                words["stands"] = stands = rng.choice(ARRANGEMENTS)
                elsewhere = [each for each in ARRANGEMENTS if each != stands]
                here = self._arranged(name, other, stands)
                return self._of_side(here, lambda: self._arranged(name, other, rng.choice(elsewhere)))
            case "how many pictures show":
                claim = rng.choice(WORLD["showing_claims"])
                words["claim"], number = claim["text"], rng.choice(claim["true_of" if label else "false_of"])
                name = self._draw_noun()
                first = self._scene_with(name) if number > 0 else self._scene_without(name)
                return self._of_both(first, self._scene_with(name) if number > 1 else self._scene_without(name))
            case "total":  # the claim is drawn first, so that it tells nothing; a false one is off by one
                name, claimed = self._draw_noun(), rng.randint(2, 6)
                words["number"] = world.NUMBER_WORDS[claimed]
                near = [number for number in (claimed - 1, claimed + 1) if 2 <= number <= 6]
                total = claimed if label else rng.choice(near)
                count = rng.randint(max(1, total - 3), min(3, total - 1))
                return self._of_both(self._group(name, count), self._group(name, total - count))
            case "same count":
                name, is_same = self._draw_noun(), rng.random() < 0.5
                words["claim"] = "the same number" if is_same == label else "different numbers"
                count = rng.randint(1, 3)
                other_count = count if is_same else draw_other(rng, (1, 2, 3), than=count)
                return self._of_both(self._group(name, count), self._group(name, other_count))
            case "backgrounds":  # whether both have the same background, or both have a certain one
                is_same = rng.random() < 0.5
                first, second = self._draw_scene(), self._draw_scene()
                color = first.background
                second = replace(second, background=color if is_same else draw_other(rng, BACKGROUNDS, than=color))
                if is_same != label:
                    words["claim"] = "the two pictures have different backgrounds"
                elif rng.random() < 0.5:
                    words["claim"] = "the two pictures have the same background"
                else:
                    words["claim"] = f"both pictures have a {color} background"
                return self._of_both(first, second)
            case "one each":  # if false, one is missing or both stand together
                name, other = self._draw_pair()
                if label or rng.random() < 2 / 3:
                    first = self._scene_with(name, without=other)
                else:
                    first = world.draw_scene_of(rng, name, other, relation=rng.choice(world.RELATIONS))
                second = self._scene_with(other, without=name) if label else self._scene_without(name, other)
                return self._of_both(first, second)
            case "relation in one or both":  # elsewhere the same two stand differently
                name, other = self._draw_pair()
                words["stands"] = stands = rng.choice(ARRANGEMENTS)
                says_both = rng.random() < 0.5
                words["claim"] = "in both pictures" if says_both else "in one of the pictures"
                num_true = (1 if says_both else 0) + (1 if label else 0)
                shown = [stands] * num_true + [draw_other(rng, ARRANGEMENTS, than=stands) for _ in range(2 - num_true)]
                return self._of_both(*(self._arranged(name, other, each) for each in shown))
        raise AssertionError(f"no statement of kind {self.kind}")

    def _of_both(self, first: Scene, second: Scene) -> SceneText:
        """Say something of two images whose order does not matter: they come in any."""
        return self._state(*self.rng.sample((first, second), 2))

    def _of_side(self, here: Scene, there: Callable[[], Scene]) -> SceneText:
        """Say what is true of `here` on {side} and a scene of `there` on {other}.

        It is made false by swapping the two, or half of the time by two scenes of `there`.
        """
        if not self.label and self.rng.random() < 0.5:
            here = there()
        return self._of_swapped(here, there())

    def _of_swapped(self, here: Scene, there: Scene) -> SceneText:
        """Say what is true of `here` on {side} and `there` on {other}, and false of the two swapped."""
        side, other = self.rng.choice((("left", "right"), ("right", "left")))
        self.words |= {"side": side, "other": other}
        return self._state(here, there) if (side == "left") == self.label else self._state(there, here)

    def _state(self, left: Scene, right: Scene) -> SceneText:
        text = self.rng.choice(STATEMENT_FORMS[self.kind]).format(**self.words)
        fields = {"statement": text, "label": self.label, "statement_kind": self.kind}
        return SceneText(scenes=(left, right), kind=self.kind, text=text, fields=fields)

    def _draw_noun(self) -> str:
        name = self.rng.choice(world.NOUNS)
        self.words["thing"] = SceneObject(name=name)
        self.met.add(name)
        return name

    def _draw_pair(self) -> tuple[str, str]:
        """Draw two nouns of the split, in any order."""
        first, second = self.rng.sample(self.rng.choice(world.pairs_of(self.split)), 2)
        self.words |= {"first": SceneObject(name=first), "second": SceneObject(name=second)}
        self.met.update((first, second))
        return first, second

    def _group(self, name: str, count: int) -> Scene:
        return world.draw_scene_of(self.rng, name, count=count)

    def _arranged(self, first: str, second: str, stands: str) -> Scene:
        """Draw a scene with the pair one above the other, or side by side in any order."""
        if stands == "below" or (stands == "next to" and self.rng.random() < 0.5):
            first, second = second, first
        return world.draw_scene_of(self.rng, first, second, relation="left of" if stands == "next to" else "above")

    def _draw_scene(self) -> Scene:
        return self._draw_fitting(lambda: world.draw_scene(self.rng, self.split))

    def _scene_with(self, name: str, size: Size | None = None, without: str = "") -> Scene:
        """Draw a scene with one of `name`, alone or in a pair, and none of `without`."""
        return self._draw_fitting(lambda: world.draw_scene_with(self.rng, self.split, name, size), without)

    def _scene_without(self, *names: str) -> Scene:
        """Draw such a scene with none of `names`, half of the time with a lookalike of the last."""

        def draw() -> Scene:
            shown = self.rng.choice(world.lookalikes(names[-1]) if self.rng.random() < 0.5 else world.NOUNS)
            return world.draw_scene_with(self.rng, self.split, shown)

        return self._draw_fitting(draw, *names)

    def _draw_fitting(self, draw: Callable[[], Scene], *without: str) -> Scene:
        """Draw until a scene shows none of `without` and no noun that is held out with one met before."""
        while True:
            scene = draw()
            names = self.met.union(scene.names)
            # The few pairs of val and test hold within a scene, not between the two of a sample.
            allowed = [world.pair_allowed(self.split, *pair) for pair in combinations(names, 2)]
            may_meet = self.split in world.EVALUATION_SPLITS or all(allowed)
            if may_meet and not set(scene.names).intersection(without):
                self.met = names
                return scene
