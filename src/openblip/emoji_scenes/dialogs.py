"""The grammar of dialogs about a scene: five questions that lean on what was said before, and their answers.

Each question has all its right answers (they say the same in other words), half right ones (true, but less
than the whole answer) and wrong ones of the same make. Answers to other questions fill up 100, as in VisDial.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, permutations
from random import Random
from typing import Any, Literal, get_args

from openblip.emoji_scenes.captions import RELATION_WORDS, relation_from_both_ends
from openblip.emoji_scenes.scene import (
    BACKGROUNDS,
    EVALUATION_SPLITS,
    NOUNS,
    RELATIONS,
    SIZES,
    WORLD,
    Scene,
    SceneObject,
    Split,
    draw_absent_noun,
    draw_scene,
    lookalikes,
    nouns_allowed_with,
)

QuestionFamily = Literal["background", "size", "number", "presence", "place", "comparison"]
Sentences = tuple[str, ...]

NUM_ROUNDS = 5
NUM_OPTIONS = 100
NUM_OTHER_NOUNS = 12  # of wrong answers that name another thing
NUM_WRONG_LISTINGS = 20  # of two things, not both of which are right
COUNTS = (1, 2, 3, 4, 5)
DIALOG_QUESTIONS: dict[str, list[str]] = WORLD["dialogs"]["questions"]
DIALOG_ANSWERS: dict[str, list[str]] = WORLD["dialogs"]["answers"]


def _say(forms: Iterable[str], *values: object, **words: str) -> Sentences:
    """Say each of the values in all forms."""
    return tuple(form.format(value, **words) for value in values for form in forms)


def _say_size(*things: SceneObject) -> Sentences:
    answers: list[str] = []
    for thing in things:
        row = "normal_size" if thing.size == "normal" else "size_of_one" if thing.count == 1 else "size_of_several"
        answers += _say(DIALOG_ANSWERS[row], thing)
    return tuple(answers)


def _say_number(name: str, *counts: int, several: str = "several") -> Sentences:
    things = [SceneObject(name=name, count=count) for count in counts]
    return tuple(text for each in things for text in _say(DIALOG_ANSWERS["one" if each.count == 1 else several], each))


def _say_presence(name: str, is_there: bool) -> Sentences:
    return _say(DIALOG_ANSWERS["present" if is_there else "absent"], SceneObject(name=name))


def _say_also(*names: str) -> Sentences:
    """Say that these things are there too, in any order."""
    nouns = [SceneObject(name=name).a_noun for name in names]
    return tuple(form.format(" and ".join(order)) for form in DIALOG_ANSWERS["also"] for order in permutations(nouns))


@cache
def sentences_of(family: QuestionFamily, name: str) -> Sentences:
    """Return all sentences of `family` about `name` (for places: seen from there)."""
    match family:
        case "background":
            return _say(DIALOG_ANSWERS["background"], *BACKGROUNDS)
        case "size":
            return _say_size(*(SceneObject(name=name, size=s, count=n) for n in (1, 2) for s in SIZES))
        case "number":
            return _say_number(name, *COUNTS)
        case "presence":
            return *_say_also(name), *_say_presence(name, True), *_say_presence(name, False)
        case "place":
            ways = [
                words for way in ("forward", "backward") for each in RELATIONS for words in RELATION_WORDS[each][way]
            ]
            return _say(DIALOG_ANSWERS["place"], *ways, other=name)
        case "comparison":
            return _say(DIALOG_ANSWERS["bigger"], name)


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogRound:
    """A question, the answer that is given, and candidates; no sentence of another family answers it."""

    family: QuestionFamily
    question: str
    answer: str
    right: Sentences
    half_right: Sentences
    wrong: Sentences

    def as_json(self, nouns: Sequence[str], rng: Random) -> dict[str, Any]:
        """Return the round with NUM_OPTIONS different candidates in random order: all of its own, and
        sentences of other families about some of `nouns`.
        """
        options = dict.fromkeys((*self.right, *self.half_right, *self.wrong))
        families = [family for family in get_args(QuestionFamily) if family != self.family]
        while len(options) < NUM_OPTIONS:
            options[rng.choice(sentences_of(rng.choice(families), rng.choice(nouns)))] = None
        shuffled = rng.sample(list(options), NUM_OPTIONS)
        relevance = dict.fromkeys(self.right, 1.0) | dict.fromkeys(self.half_right, 0.5)
        return {
            "question": self.question,
            "answer": self.answer,
            "options": shuffled,
            "answer_index": shuffled.index(self.answer),
            "relevance": [relevance.get(option, 0.0) for option in shuffled],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneDialog:
    """A scene, a caption of it and the rounds; `nouns` may be named in answers to other questions."""

    scenes: tuple[Scene]
    caption: str
    rounds: tuple[DialogRound, ...]
    nouns: tuple[str, ...]

    @property
    def text(self) -> str:
        """The caption and the questions."""
        return "\n".join([self.caption, *(each.question for each in self.rounds)])

    def as_json(self, rng: Random) -> dict[str, Any]:
        """Return the fields of a VisDial sample; `rng` draws the options of each round."""
        return {"caption": self.caption, "dialog": [each.as_json(self.nouns, rng) for each in self.rounds]}


def draw_dialog(rng: Random, split: Split) -> SceneDialog:
    """Draw a scene and NUM_ROUNDS different questions, each one possible after those before it."""
    scene = draw_scene(rng, split)
    if len(scene.objects) == 1 and rng.random() < 0.5:
        scene = draw_scene(rng, split)  # there is more to say about several, and more often a yes
    conversation = DialogContext(scene, split, rng)
    caption = conversation.caption()
    asked: set[Hashable] = set()
    rounds = []
    for _ in range(NUM_ROUNDS):
        questions = [each for each in conversation.open_questions() if each[0] not in asked]
        ((subject, ask, _),) = rng.choices(questions, [weight for *_, weight in questions])
        asked.add(subject)
        rounds.append(ask())
    return SceneDialog(scenes=(scene,), caption=caption, rounds=tuple(rounds), nouns=tuple(conversation.nouns))


class DialogContext:
    """What is talked about, and what was said so far.

    `mentioned` are the names of the things that the other one knows of; `topic` is the one that "it" means,
    or None when that is not clear. `nouns` may be named: in training none that is held out with a shown one.
    """

    def __init__(self, scene: Scene, split: Split, rng: Random) -> None:
        self.scene, self.split, self.rng = scene, split, rng
        self.things = {thing.name: thing for thing in scene.objects}
        first = rng.choice(scene.names)
        self.mentioned = [first]
        self.topic: str | None = first
        absent = [name for name in NOUNS if name not in scene.names]
        self.nouns = absent if split in EVALUATION_SPLITS else nouns_allowed_with(split, scene.names)

    def caption(self) -> str:
        """Name the first thing, but not its size, number or background."""
        first = self.things[self.mentioned[0]]
        return f"a picture with {first.a_noun if first.count == 1 else first.plural}"

    def open_questions(self) -> Iterator[tuple[Hashable, Callable[[], DialogRound], int]]:
        """Yield what can be asked now: what it is about, the function that asks it, its weight."""
        unmentioned, is_single = self._unmentioned(), len(self.things) == 1
        yield "background", self._ask_background, 2
        yield "else", self._ask_else, 3
        if unmentioned or is_single:
            yield "presence", self._ask_presence, 4
        for name in self.mentioned:
            yield ("size", name), partial(self._ask_size, name), 2
        if is_single:
            yield "number", partial(self._ask_number, self.mentioned[0]), 2
        else:
            yield "total", self._ask_total, 1
        if self.scene.relation is not None and not unmentioned:
            yield "place", self._ask_place, 4
            yield "bigger", self._ask_bigger, 2

    def _ask_background(self) -> DialogRound:
        self.topic = None
        right, wrong = (
            _say(DIALOG_ANSWERS["background"], self.scene.background),
            _say(DIALOG_ANSWERS["background"], *BACKGROUNDS),
        )
        return self._round("background", DIALOG_QUESTIONS["background"], right, (), wrong)

    def _ask_size(self, name: str) -> DialogRound:
        thing, subject = self.things[name], self._reference_to(name)
        self.topic = name
        negations = {size: f"{thing.pronoun} {thing.verb} not {size}" for size in ("small", "big")}
        half_right = [text for size, text in negations.items() if size != thing.size]
        wrong = [*_say_size(*(replace(thing, size=size) for size in SIZES)), *negations.values()]
        wrong += [_say_size(replace(thing, name=other))[1] for other in self._other_nouns()]
        questions = _say(DIALOG_QUESTIONS["size"], thing, subject=subject)
        return self._round("size", questions, _say_size(thing), half_right, wrong)

    def _ask_number(self, name: str) -> DialogRound:
        """Ask how many there are of the only kind of thing."""
        thing = self.things[name]
        questions = _say(DIALOG_QUESTIONS["number_of_topic" if self.topic == name else "number"], thing)
        self.topic = name
        half_right = ("more than one",) if thing.count > 1 else ()
        wrong = [*_say_number(name, *COUNTS)]
        wrong += [_say_number(other, thing.count)[0] for other in self._other_nouns()]
        return self._round("number", questions, _say_number(name, thing.count), half_right, wrong)

    def _ask_total(self) -> DialogRound:
        """Ask how many things there are of all kinds."""
        count = self.scene.num_things
        self.topic = None
        right = _say_number("thing", count, several="total")
        wrong = [*_say_number("thing", *COUNTS, several="total")]
        wrong += [_say_number(name, count)[0] for name in self.things]
        return self._round("number", DIALOG_QUESTIONS["total"], right, ("more than one",), wrong)

    def _ask_else(self) -> DialogRound:
        """Ask what was not mentioned yet: nothing, or one or two things."""
        unmentioned, others = self._unmentioned(), self._other_nouns()
        pairs = combinations([*others[:4], *self.things], 2)
        wrong = self.rng.sample([text for pair in pairs for text in _say_also(*pair)], NUM_WRONG_LISTINGS)
        wrong += [text for name in (*others, *self.mentioned) for text in _say_also(name)]
        if unmentioned:
            right, half_right = _say_also(*unmentioned), ["yes"]
            half_right += [text for name in unmentioned for text in _say_also(name)]
            wrong += [*DIALOG_ANSWERS["nothing_else"], "no"]
        else:
            right, half_right = tuple(DIALOG_ANSWERS["nothing_else"]), ["no"]
            wrong += ["yes"]
        self.topic = unmentioned[0] if len(unmentioned) == 1 else None
        self.mentioned += unmentioned
        return self._round("presence", DIALOG_QUESTIONS["else"], right, half_right, wrong)

    def _ask_presence(self) -> DialogRound:
        """Ask whether there is a thing: one that was not mentioned yet, or one that is not there."""
        unmentioned = self._unmentioned()
        # A scene of one kind of thing has only absent ones to ask for; this evens yes and no over all scenes.
        is_there = bool(unmentioned) and self.rng.random() < 0.9
        if is_there:
            name = self.rng.choice(unmentioned)
            self.mentioned.append(name)
        else:
            name = draw_absent_noun(self.rng, self.split, self.scene.names)
        self.topic = name if is_there else None
        wrong = [*_say_presence(name, True), *_say_presence(name, False), "yes", "no"]
        wrong += [_say_presence(other, is_there)[0] for other in self._other_nouns() if other != name]
        questions = _say(DIALOG_QUESTIONS["presence"], SceneObject(name=name))
        half_right = ("yes",) if is_there else ("no",)
        return self._round("presence", questions, _say_presence(name, is_there), half_right, wrong)

    def _ask_place(self) -> DialogRound:
        """Ask where one of a pair is; the answers say it towards the other."""
        assert self.scene.relation is not None
        name = self.topic or self.rng.choice(self.scene.names)
        subject = self._reference_to(name)
        self.topic = name
        index = self.scene.names.index(name)
        _, words, other = relation_from_both_ends(self.scene)[index]
        next_to = f"it is next to the {other.name}"
        ways = [way for words in RELATION_WORDS.values() for way in (*words["forward"], *words["backward"])]
        wrong = [*_say(DIALOG_ANSWERS["place"], *ways, other=other.name)]
        wrong += [next_to, *(f"it is {place}" for each in RELATIONS for place in RELATION_WORDS[each]["places"])]
        wrong += [f"it is {words[0]} the {noun}" for noun in self._other_nouns()]
        questions = _say(DIALOG_QUESTIONS["place"], subject)
        place = RELATION_WORDS[self.scene.relation]["places"][index]
        right = (*_say(DIALOG_ANSWERS["place"], *words, other=other.name), f"it is {place}")
        half_right = (next_to,) if self.scene.relation == "left of" else ()
        return self._round("place", questions, right, half_right, wrong)

    def _ask_bigger(self) -> DialogRound:
        """Ask which of a pair is bigger; perhaps neither is."""
        first, second = self.scene.objects
        self.topic = None
        if first.size != second.size:
            self.topic = max(first, second, key=lambda thing: SIZES.index(thing.size)).name
        same_size = tuple(DIALOG_ANSWERS["same_size"])
        right = _say(DIALOG_ANSWERS["bigger"], self.topic) if self.topic else same_size
        wrong = same_size + _say(DIALOG_ANSWERS["bigger"], first.name, second.name, *self._other_nouns())
        return self._round("comparison", DIALOG_QUESTIONS["bigger"], right, (), wrong)

    def _unmentioned(self) -> list[str]:
        return [name for name in self.scene.names if name not in self.mentioned]

    def _reference_to(self, name: str) -> str:
        """ "it" or "they" where that is clear, else "the dog" or "the dogs"."""
        return self.things[name].pronoun if name == self.topic else f"the {self.things[name].noun}"

    def _other_nouns(self) -> list[str]:
        """Draw some nouns that are not shown, the lookalikes of what is shown first."""
        alike = {other for name in self.scene.names for other in lookalikes(name)}
        shuffled = self.rng.sample(self.nouns, len(self.nouns))
        return sorted(shuffled, key=lambda name: name not in alike)[:NUM_OTHER_NOUNS]

    def _round(
        self,
        family: QuestionFamily,
        questions: Sequence[str],
        right: Sentences,
        half_right: Iterable[str],
        wrong: Iterable[str],
    ) -> DialogRound:
        """Draw one of `questions` and one of the `right` answers.

        `half_right` may hold what is right, and `wrong` what is either: they are left out there.
        """
        half_right = tuple(text for text in dict.fromkeys(half_right) if text not in right)
        return DialogRound(
            family=family,
            question=self.rng.choice(questions),
            answer=self.rng.choice(right),
            right=right,
            half_right=half_right,
            wrong=tuple(text for text in dict.fromkeys(wrong) if text not in (*right, *half_right)),
        )
