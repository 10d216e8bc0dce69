"""The grammar of dialogs about a scene: five questions that lean on what was said before, and their answers.

Each question has all its right answers (they say the same in other words), half right ones (true, but less
than the whole answer) and wrong ones of the same make. Answers to other questions fill up 100, as in VisDial.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, permutations
from random import Random
from typing import Any, NamedTuple

from openblip.emoji_scenes import scene as world
from openblip.emoji_scenes.captions import RELATION_WORDS, relation_from_both_ends
from openblip.emoji_scenes.scene import BACKGROUNDS, NOUNS, SIZES, WORLD, Scene, SceneObject, SceneText, Split

Sentences = tuple[str, ...]

NUM_ROUNDS = 5
NUM_OPTIONS = 100
NUM_OTHER_NOUNS = 12  # of wrong answers that name another thing
NUM_WRONG_LISTINGS = 20  # of two things, not both of which are right
COUNTS = (1, 2, 3, 4, 5)
DIALOG_QUESTIONS: dict[str, list[str]] = WORLD["dialogs"]["questions"]
DIALOG_ANSWERS: dict[str, list[str]] = WORLD["dialogs"]["answers"]
FAMILY_OF_KIND: dict[str, str] = WORLD["dialogs"]["families"]


def _say(row: str, *values: object, **words: str) -> Sentences:
    """Return the answers of a row with each of the values."""
    return tuple(form.format(value, **words) for value in values for form in DIALOG_ANSWERS[row])


def _say_size(*things: SceneObject) -> Sentences:
    answers: list[str] = []
    for thing in things:
        row = "normal_size" if thing.size == "normal" else "size_of_one" if thing.count == 1 else "size_of_several"
        answers += _say(row, thing)
    return tuple(answers)


def _say_number(name: str, *counts: int, several: str = "several") -> Sentences:
    things = [SceneObject(name=name, count=count) for count in counts]
    return tuple(answer for thing in things for answer in _say("one" if thing.count == 1 else several, thing))


def _say_presence(name: str, *is_there: bool) -> Sentences:
    thing = SceneObject(name=name)
    return tuple(answer for each in is_there for answer in _say("present" if each else "absent", thing))


def _say_also(*names: str) -> Sentences:
    """Say that these things are there too, in any order."""
    nouns = [SceneObject(name=name).a_noun for name in names]
    return tuple(form.format(" and ".join(order)) for form in DIALOG_ANSWERS["also"] for order in permutations(nouns))


@cache
def sentences_about(name: str) -> dict[str, Sentences]:
    """Return all sentences of every family about `name` (for places: seen from there)."""
    things = [SceneObject(name=name, size=size, count=count) for count in (1, 2) for size in SIZES]
    ways = [way for side in ("forward", "backward") for words in RELATION_WORDS.values() for way in words[side]]
    return {
        "background": _say("background", *BACKGROUNDS),
        "size": _say_size(*things),
        "number": _say_number(name, *COUNTS),
        "presence": (*_say_also(name), *_say_presence(name, True, False)),
        "place": _say("place", *ways, other=name),
        "comparison": _say("bigger", name),
    }


class DialogRound(NamedTuple):
    """A question, the answer that is given, and candidates; `nouns` may be named in answers to other questions."""

    family: str
    question: str
    answer: str
    right: Sentences
    half_right: Sentences
    wrong: Sentences
    nouns: Sequence[str]

    def as_json(self, rng: Random) -> dict[str, Any]:
        """Return the round with NUM_OPTIONS different candidates in random order, some from other families."""
        options = dict.fromkeys((*self.right, *self.half_right, *self.wrong))
        families = [family for family in dict.fromkeys(FAMILY_OF_KIND.values()) if family != self.family]
        while len(options) < NUM_OPTIONS:
            family = rng.choice(families)
            options[rng.choice(sentences_about(rng.choice(self.nouns))[family])] = None
        shuffled = rng.sample(list(options), NUM_OPTIONS)
        relevance = dict.fromkeys(self.right, 1.0) | dict.fromkeys(self.half_right, 0.5)
        return {
            "question": self.question,
            "answer": self.answer,
            "options": shuffled,
            "answer_index": shuffled.index(self.answer),
            "relevance": [relevance.get(option, 0.0) for option in shuffled],
        }


def draw_dialog(rng: Random, split: Split) -> SceneText:
    """Draw a scene and NUM_ROUNDS different questions, each possible after those before; options are drawn later."""
    scene = world.draw_scene(rng, split)
    if len(scene.objects) == 1 and rng.random() < 0.5:
        scene = world.draw_scene(rng, split)  # there is more to say about several, and more often a yes
    dialog = DialogContext(scene, split, rng)
    first = dialog.things[dialog.mentioned[0]]  # the caption names it, but not its size, number or background
    caption = f"a picture with {first.a_noun if first.count == 1 else first.plural}"
    asked: set[tuple[str, str]] = set()
    rounds = []
    for _ in range(NUM_ROUNDS):
        questions = [each for each in dialog.open_questions() if each[:2] not in asked]
        ((kind, name, _),) = rng.choices(questions, [weight for *_, weight in questions])
        asked.add((kind, name))
        rounds.append(dialog.ask(kind, name))
    text = "\n".join([caption, *(each.question for each in rounds)])
    return SceneText(scenes=(scene,), kind="dialog", text=text, fields={"caption": caption, "dialog": rounds})


class DialogContext:
    """What is talked about, and what was said so far.

    `mentioned` are the names of the things that the asking person knows of; `topic` is the one that "it" means, or None
    when that is not clear. `nouns` may be named: in training none that is held out with a shown one.
    """

    def __init__(self, scene: Scene, split: Split, rng: Random) -> None:
        self.scene, self.split, self.rng = scene, split, rng
        self.things = {thing.name: thing for thing in scene.objects}
        self.mentioned = [rng.choice(scene.names)]
        self.topic: str | None = self.mentioned[0]
        absent = [name for name in NOUNS if name not in scene.names]
        self.nouns = absent if split in world.EVALUATION_SPLITS else world.nouns_allowed_with(split, scene.names)

    def open_questions(self) -> Iterator[tuple[str, str, int]]:
        """Yield what can be asked now: the kind of question, the thing that it names if any, its weight."""
        unmentioned, is_single = self._unmentioned(), len(self.things) == 1
        yield from (("background", "", 2), ("else", "", 3))
        if unmentioned or is_single:
            yield "presence", "", 4
        yield from (("size", name, 2) for name in self.mentioned)
        yield ("number", self.mentioned[0], 2) if is_single else ("total", "", 1)
        if self.scene.relation is not None and not unmentioned:
            yield from (("place", "", 4), ("bigger", "", 2))

    def ask(self, kind: str, name: str) -> DialogRound:
        """Draw a round with a question of a kind, which `open_questions` gave with `name`."""
        scene, rng, unmentioned = self.scene, self.rng, self._unmentioned()
        row, about, subject = kind, SceneObject(name=name), ""  # of questions, and what fills them
        topic: str | None = None  # after this round
        # `half_right` may hold what is right, and `wrong` what is either: they are left out there at the end.
        half_right: Sequence[str] = ()
        match kind:
            case "background":
                right, wrong = _say("background", scene.background), [*_say("background", *BACKGROUNDS)]
            case "size":
                thing, topic = self.things[name], name
                about, subject = thing, self._reference_to(name)
                negations = {size: f"{thing.pronoun} {thing.verb} not {size}" for size in ("small", "big")}
                right = _say_size(thing)
                half_right = [text for size, text in negations.items() if size != thing.size]
                wrong = [*_say_size(*(replace(thing, size=size) for size in SIZES)), *negations.values()]
                wrong += [_say_size(replace(thing, name=other))[1] for other in self._other_nouns()]
            case "number":  # how many there are of the only kind of thing
                count, topic = self.things[name].count, name
                row, about = "number_of_topic" if self.topic == name else "number", self.things[name]
                right, half_right = _say_number(name, count), ("more than one",) if count > 1 else ()
                wrong = [*_say_number(name, *COUNTS)]
                wrong += [_say_number(other, count)[0] for other in self._other_nouns()]
            case "total":  # how many things there are of all kinds
                count = scene.num_things
                right, half_right = _say_number("thing", count, several="total"), ("more than one",)
                wrong = [*_say_number("thing", *COUNTS, several="total")]
                wrong += [_say_number(each, count)[0] for each in self.things]
            case "else":  # what was not mentioned yet: nothing, or one or two things
                others = self._other_nouns()
                pairs = combinations([*others[:4], *self.things], 2)
                wrong = rng.sample([text for pair in pairs for text in _say_also(*pair)], NUM_WRONG_LISTINGS)
                wrong += [text for each in (*others, *self.mentioned) for text in _say_also(each)]
                if unmentioned:
                    right = _say_also(*unmentioned)
                    half_right = ["yes", *(text for each in unmentioned for text in _say_also(each))]
                    wrong += [*DIALOG_ANSWERS["nothing_else"], "no"]
                else:
                    right, half_right = tuple(DIALOG_ANSWERS["nothing_else"]), ("no",)
                    wrong += ["yes"]
                topic = unmentioned[0] if len(unmentioned) == 1 else None
                self.mentioned += unmentioned
            case "presence":  # whether there is a thing: one that was not mentioned yet, or one that is not there
                # A scene of one kind of thing has only absent ones to ask for; this evens yes and no over all scenes.
                is_there = bool(unmentioned) and rng.random() < 0.9
                name = rng.choice(unmentioned) if is_there else world.draw_absent_noun(rng, self.split, scene.names)
                topic = name if is_there else None
                self.mentioned += [name] if is_there else []
                about = SceneObject(name=name)
                right, half_right = _say_presence(name, is_there), ("yes" if is_there else "no",)
                wrong = [*_say_presence(name, True, False), "yes", "no"]
                wrong += [_say_presence(other, is_there)[0] for other in self._other_nouns() if other != name]
            case "place":  # where one of a pair is; the answers say it towards the other
                assert scene.relation is not None
                topic = self.topic or rng.choice(scene.names)
                subject = self._reference_to(topic)
                index, relations = scene.names.index(topic), RELATION_WORDS.values()
                _, words, neighbor = relation_from_both_ends(scene)[index]
                next_to = f"it is next to the {neighbor.name}"
                right = _say("place", *words, other=neighbor.name)
                right += (f"it is {RELATION_WORDS[scene.relation]['places'][index]}",)
                half_right = (next_to,) if scene.relation == "left of" else ()
                ways = [way for each in relations for way in (*each["forward"], *each["backward"])]
                wrong = [*_say("place", *ways, other=neighbor.name), next_to]
                wrong += [f"it is {place}" for each in relations for place in each["places"]]
                wrong += [f"it is {words[0]} the {noun}" for noun in self._other_nouns()]
            case "bigger":  # which of a pair is bigger; perhaps neither is
                first, second = scene.objects
                bigger = max(first, second, key=lambda thing: SIZES.index(thing.size))
                topic = None if first.size == second.size else bigger.name
                same_size = tuple(DIALOG_ANSWERS["same_size"])
                right = _say("bigger", topic) if topic else same_size
                wrong = [*same_size, *_say("bigger", first.name, second.name, *self._other_nouns())]
            case _:
                raise AssertionError(f"no question of kind {kind}")
        self.topic = topic
        half_right = tuple(text for text in dict.fromkeys(half_right) if text not in right)
        wrong = [text for text in dict.fromkeys(wrong) if text not in (*right, *half_right)]
        question = rng.choice(DIALOG_QUESTIONS[row]).format(about, subject=subject)
        answer, family = rng.choice(right), FAMILY_OF_KIND[kind]
        return DialogRound(family, question, answer, right, half_right, tuple(wrong), self.nouns)

    def _unmentioned(self) -> list[str]:
        return [name for name in self.scene.names if name not in self.mentioned]

    def _reference_to(self, name: str) -> str:
        """ "it" or "they" where that is clear, else "the dog" or "the dogs"."""
        return self.things[name].pronoun if name == self.topic else f"the {self.things[name].noun}"

    def _other_nouns(self) -> list[str]:
        """Draw some nouns that are not shown, the lookalikes of what is shown first."""
        alike = {other for name in self.scene.names for other in world.lookalikes(name)}
        shuffled = self.rng.sample(self.nouns, len(self.nouns))
        return sorted(shuffled, key=lambda name: name not in alike)[:NUM_OTHER_NOUNS]
