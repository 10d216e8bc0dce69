"""The grammar of questions about one scene, and the answers that ten annotators give.

Answers are counted per annotator, as VQA has them: most people say "2", some "two"; a small dog is a "dog" to
most and a "small dog" to some. Of yes and no each is right half the time, within each kind of question.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from openblip.data.emoji_scenes.phrasing import INVERSE_WORDS, RELATION_WORDS
from openblip.data.emoji_scenes.scene import Scene, SceneObject, sizes_of
from openblip.data.emoji_scenes.vocabulary import (
    BACKGROUNDS,
    NOUN_BY_NAME,
    NOUNS,
    NUMBER_WORDS,
    Size,
    Split,
    draw_absent_noun,
)

NUM_ANNOTATORS = 10

Medium = Literal["picture", "video"]
Votes = dict[str, int]  # answer -> annotators that gave it


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`kind` is the name of what it asks for; `answers` are all annotators' answers, the majority's first."""

    kind: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Occasion:
    """What a question is asked about, and the random stream that words it."""

    scene: Scene
    split: Split
    medium: Medium
    rng: Random

    def ask(self, kind: str, votes: Votes, *wordings: str) -> Question:
        """One of the wordings, with the answers counted out."""
        answers = tuple(answer for answer, count in votes.items() for _ in range(count))
        return Question(kind=kind, text=self.rng.choice(wordings), answers=answers)


def naming_votes(thing: SceneObject) -> Votes:
    """What people call it: "dog", "small dog", "dogs", "two dogs"."""
    noun = NOUN_BY_NAME[thing.name]
    name = noun.name if thing.count == 1 else noun.plural
    rarer = [f"{thing.size} {name}"] if thing.size != "normal" else []
    rarer += [f"{NUMBER_WORDS[thing.count]} {name}"] if thing.count > 1 else []
    return {name: NUM_ANNOTATORS - 2 * len(rarer)} | dict.fromkeys(rarer, 2)


def counting_votes(count: int) -> Votes:
    return {str(count): 7, NUMBER_WORDS[count]: 3}


SIZE_VOTES: dict[Size, Votes] = {
    "small": {"small": 8, "little": 2},
    "normal": {"normal": 6, "medium": 4},
    "big": {"big": 7, "large": 3},
}


def unanimous(answer: str) -> Votes:
    return {answer: NUM_ANNOTATORS}


def every_answer() -> list[str]:
    """All answers that can occur, sorted."""
    kinds_of_votes = [unanimous(answer) for answer in ("yes", "no", *BACKGROUNDS)]
    kinds_of_votes += [counting_votes(count) for count in (1, 2, 3)] + list(SIZE_VOTES.values())
    kinds_of_votes += [
        naming_votes(SceneObject(name=noun.name, size=size, count=count))
        for noun in NOUNS
        for count in (1, 2, 3)
        for size in sizes_of(count)
    ]
    return sorted({answer for votes in kinds_of_votes for answer in votes})


def ask_background(on: Occasion) -> Question:
    return on.ask(
        "background",
        unanimous(on.scene.background),
        "what color is the background?",
        "what is the color of the background?",
        f"what is the background color of the {on.medium}?",
    )


def ask_count(on: Occasion) -> Question:
    """How many of a kind of thing that is there."""
    thing = on.rng.choice(on.scene.objects)
    plural = NOUN_BY_NAME[thing.name].plural
    return on.ask(
        "count",
        counting_votes(thing.count),
        f"how many {plural} are there?",
        f"how many {plural} are in the {on.medium}?",
        f"how many {plural} do you see?",
    )


def ask_total(on: Occasion) -> Question:
    return on.ask(
        "total",
        counting_votes(on.scene.num_things),
        "how many things are there?",
        f"how many things are in the {on.medium}?",
    )


def ask_existence(on: Occasion) -> Question:
    """Whether there is one of a noun, in equal parts one that is there and one that is not."""
    names = on.scene.names
    is_there = on.rng.random() < 0.5
    name = on.rng.choice(names) if is_there else draw_absent_noun(on.rng, on.split, names)
    noun = NOUN_BY_NAME[name]
    return on.ask(
        "existence",
        unanimous("yes" if is_there else "no"),
        f"is there {noun.article} {name}?",
        f"is there {noun.article} {name} in the {on.medium}?",
        f"do you see {noun.article} {name}?",
    )


def ask_name(on: Occasion) -> Question:
    """What the only kind of thing is."""
    (thing,) = on.scene.objects
    return on.ask(
        "name",
        naming_votes(thing),
        f"what is in the {on.medium}?",
        f"what does the {on.medium} show?",
        "what do you see?",
    )


def ask_size(on: Occasion) -> Question:
    thing = on.rng.choice(on.scene.objects)
    subject, verb = _definite(thing)
    return on.ask(
        "size", SIZE_VOTES[thing.size], f"what size {verb} {subject}?", f"how big {verb} {subject}?"
    )


def ask_whether_size(on: Occasion) -> Question:
    """Whether a thing is small (or big, where one of its kind may be); half of them are."""
    thing = on.rng.choice(on.scene.objects)
    asked: Size = "small"
    if "big" in sizes_of(on.scene.num_things):
        # Two of three sizes can be asked for: asking for the thing's own in three of four evens yes and no.
        own = on.rng.random() < 0.75
        other: Size = "big" if thing.size == "small" else "small"
        asked = on.rng.choice(("small", "big")) if thing.size == "normal" else thing.size if own else other
    subject, verb = _definite(thing)
    return on.ask(
        "whether size", unanimous("yes" if thing.size == asked else "no"), f"{verb} {subject} {asked}?"
    )


def ask_which_is_small(on: Occasion) -> Question:
    """Which of several different things is the only small one."""
    (small,) = (thing for thing in on.scene.objects if thing.size == "small")
    return on.ask("which is small", naming_votes(small), "what is small?", "which thing is small?")


def ask_neighbor(on: Occasion) -> Question:
    """What stands beside, above or below a named thing."""
    asked, words, named = on.rng.choice(_told_both_ways(on.scene))
    wordings = [f"what is {word} the {named.name}?" for word in words]
    return on.ask("neighbor", naming_votes(asked), *wordings)


def ask_whether_relation(on: Occasion) -> Question:
    """Whether one thing is left of (right of, above, below) the other, in equal parts true and reversed."""
    subject, words, other = on.rng.choice(_told_both_ways(on.scene))
    holds = on.rng.random() < 0.5
    if not holds:
        subject, other = other, subject
    wordings = [f"is the {subject.name} {word} the {other.name}?" for word in words]
    return on.ask("whether relation", unanimous("yes" if holds else "no"), *wordings)


def ask_place(on: Occasion) -> Question:
    """What is on the left, on the right, at the top or at the bottom."""
    places = (
        ("on the left", "on the right") if on.scene.relation == "left of" else ("at the top", "at the bottom")
    )
    thing, place = on.rng.choice(list(zip(on.scene.objects, places, strict=True)))
    return on.ask(
        "place",
        naming_votes(thing),
        f"what is {place}?",
        f"what is {place} of the {on.medium}?",
        f"which thing is {place}?",
    )


def _told_both_ways(scene: Scene) -> list[tuple[SceneObject, tuple[str, ...], SceneObject]]:
    """The relation of a pair from each of its ends: who stands, how that is said, towards whom."""
    assert scene.relation is not None
    first, second = scene.objects
    return [
        (first, RELATION_WORDS[scene.relation], second),
        (second, INVERSE_WORDS[scene.relation], first),
    ]


def _definite(thing: SceneObject) -> tuple[str, str]:
    """("the dog", "is") or ("the dogs", "are")."""
    noun = NOUN_BY_NAME[thing.name]
    return (f"the {noun.name}", "is") if thing.count == 1 else (f"the {noun.plural}", "are")


Asker = Callable[[Occasion], Question]


def askers_of(scene: Scene) -> Iterator[tuple[Asker, int]]:
    """What can be asked about `scene`, each with its weight."""
    yield from ((ask_background, 2), (ask_existence, 3), (ask_size, 2), (ask_whether_size, 2))
    if len(scene.objects) == 1:
        yield from ((ask_count, 3), (ask_name, 3), (ask_total, 1))
    else:
        yield ask_total, 2
        if [thing.size for thing in scene.objects].count("small") == 1:
            yield ask_which_is_small, 2
    if scene.relation is not None:
        yield from ((ask_neighbor, 4), (ask_place, 3), (ask_whether_relation, 2))


def draw_question(scene: Scene, split: Split, medium: Medium, rng: Random) -> Question:
    """One of the questions that can be asked about `scene`."""
    askers, weights = zip(*askers_of(scene), strict=True)
    (asker,) = rng.choices(askers, weights)
    question: Question = asker(Occasion(scene=scene, split=split, medium=medium, rng=rng))
    return question
