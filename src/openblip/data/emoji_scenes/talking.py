"""The grammar of dialogs about a scene: questions that lean on what was said before, and their answers.

Each question has all its right answers (they say the same in other words), half right ones (true, but less
than the whole answer) and wrong ones of the same make. What else may be said answers other questions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from random import Random

from openblip.data.emoji_scenes.phrasing import INVERSE_WORDS, RELATION_WORDS
from openblip.data.emoji_scenes.replies import (
    AMOUNTS,
    NOTHING_ELSE,
    PLACES,
    SAME_SIZE,
    SIZES,
    Family,
    Texts,
    also_answers,
    background_answers,
    comparison_answers,
    number_answers,
    place_answers,
    plural,
    presence_answers,
    size_answers,
    total_answers,
    with_article,
)
from openblip.data.emoji_scenes.scene import RELATIONS, Scene, SceneObject
from openblip.data.emoji_scenes.vocabulary import (
    BACKGROUNDS,
    NOUNS,
    Split,
    draw_absent_noun,
    lookalikes,
    pair_allowed,
)

NUM_ROUNDS = 5
NUM_OTHER_NOUNS = 12  # of wrong answers that name another thing
NUM_WRONG_LISTINGS = 20  # of two things, not both of which are right


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A question and the answers of its own kind: a right one that is given, and candidates.

    No sentence of another `family` answers it.
    """

    family: Family
    question: str
    answer: str
    right: Texts
    half_right: Texts
    wrong: Texts


@dataclass(slots=True, kw_only=True)
class Talk:
    """What is talked about, and what was said so far.

    `mentioned` are the names of things that the other one knows of; `topic` is the one that "it" means, None
    where that would not be clear. `nouns` may be named: in training none that is held out with a shown one.
    """

    scene: Scene
    split: Split
    rng: Random
    nouns: Sequence[str]
    mentioned: list[str]
    topic: str | None
    asked: set[object] = field(default_factory=set)

    @classmethod
    def about(cls, scene: Scene, split: Split, rng: Random) -> "Talk":
        """A talk that starts from one thing of `scene`."""
        shown = scene.names
        first = rng.choice(shown)
        free = split in ("val", "test")
        nouns = [
            noun.name
            for noun in NOUNS
            if noun.name not in shown
            and (free or all(pair_allowed(split, noun.name, name) for name in shown))
        ]
        return cls(scene=scene, split=split, rng=rng, nouns=nouns, mentioned=[first], topic=first)

    @property
    def caption(self) -> str:
        """Names the first thing, and not its size, number or background."""
        first = self.thing(self.mentioned[0])
        return f"a picture with {with_article(first.name) if first.count == 1 else plural(first.name)}"

    @property
    def unmentioned(self) -> list[str]:
        return [name for name in self.scene.names if name not in self.mentioned]

    def thing(self, name: str) -> SceneObject:
        (thing,) = (thing for thing in self.scene.objects if thing.name == name)
        return thing

    def refer(self, name: str) -> tuple[str, str]:
        """("it", "is"), ("the dogs", "are"): a pronoun where it is clear."""
        thing = self.thing(name)
        if thing.count == 1:
            return ("it" if name == self.topic else f"the {name}"), "is"
        return ("they" if name == self.topic else f"the {plural(name)}"), "are"

    def other_nouns(self) -> list[str]:
        """Some that are not shown, the lookalikes of what is shown first."""
        alike = {other for name in self.scene.names for other in lookalikes(name)}
        shuffled = self.rng.sample(self.nouns, len(self.nouns))
        return sorted(shuffled, key=lambda name: name not in alike)[:NUM_OTHER_NOUNS]

    def round(
        self,
        family: Family,
        questions: Texts,
        right: Iterable[str],
        half_right: Iterable[str],
        wrong: Iterable[str],
    ) -> Round:
        """One of `questions`, answered in one of the `right` ways; `wrong` may hold what is not wrong."""
        right, half_right = tuple(dict.fromkeys(right)), tuple(dict.fromkeys(half_right))
        wrong = [text for text in dict.fromkeys(wrong) if text not in (*right, *half_right)]
        return Round(
            family=family,
            question=self.rng.choice(questions),
            answer=self.rng.choice(right),
            right=right,
            half_right=half_right,
            wrong=tuple(wrong),
        )


def ask_background(talk: Talk) -> Round:
    color = talk.scene.background
    talk.topic = None
    wrong = [text for other in BACKGROUNDS for text in background_answers(other)]
    questions = ("what color is the background?", "what is the color of the background?")
    return talk.round("background", questions, background_answers(color), (), wrong)


def ask_size(talk: Talk, name: str) -> Round:
    thing = talk.thing(name)
    subject, verb = talk.refer(name)
    pronoun = "it is" if thing.count == 1 else "they are"
    talk.topic = name
    wrong = [text for size in SIZES for text in size_answers(thing, size)]
    wrong += [f"{pronoun} not {size}" for size in ("small", "big")]
    others = [SceneObject(name=other, count=thing.count) for other in talk.other_nouns()]
    wrong += [size_answers(other, thing.size)[1] for other in others]
    half_right = [f"{pronoun} not {size}" for size in ("small", "big") if size != thing.size]
    questions = (f"how big {verb} {subject}?", f"what size {verb} {subject}?")
    return talk.round("size", questions, size_answers(thing, thing.size), half_right, wrong)


def ask_number(talk: Talk, name: str) -> Round:
    """How many there are of the only kind of thing."""
    count = talk.thing(name).count
    is_clear = talk.topic == name
    talk.topic = name
    wrong = [text for other in AMOUNTS for text in number_answers(name, other)]
    wrong += [number_answers(other, count)[0] for other in talk.other_nouns()]
    half_right = ("more than one",) if count > 1 else ()
    questions = (f"how many {plural(name)} are there?", f"how many {plural(name)} can you see?")
    if is_clear:
        questions = ("how many are there?", "how many of them are there?")
    return talk.round("number", questions, number_answers(name, count), half_right, wrong)


def ask_total(talk: Talk) -> Round:
    count = talk.scene.num_things
    talk.topic = None
    wrong = [text for other in AMOUNTS for text in total_answers(other)]
    wrong += [number_answers(thing.name, count)[0] for thing in talk.scene.objects]
    questions = ("how many things are there?", "how many things do you see in all?")
    return talk.round("number", questions, total_answers(count), ("more than one",), wrong)


def ask_else(talk: Talk) -> Round:
    """What was not mentioned yet: nothing, or one or two things."""
    unmentioned, others = talk.unmentioned, talk.other_nouns()
    questions = ("is there anything else?", "do you see anything else?", "anything else in the picture?")
    listings = [
        text for pair in combinations([*others[:4], *talk.scene.names], 2) for text in also_answers(pair)
    ]
    wrong = talk.rng.sample(listings, NUM_WRONG_LISTINGS)
    wrong += [text for name in (*others, *talk.mentioned) for text in also_answers([name])]
    if unmentioned:
        right, half_right = also_answers(unmentioned), ["yes"]
        if len(unmentioned) > 1:
            half_right += [text for name in unmentioned for text in also_answers([name])]
        wrong += [*NOTHING_ELSE, "no"]
    else:
        right, half_right = NOTHING_ELSE, ["no"]
        wrong += ["yes"]
    talk.topic = unmentioned[0] if len(unmentioned) == 1 else None
    talk.mentioned += unmentioned
    return talk.round("presence", questions, right, half_right, wrong)


def ask_presence(talk: Talk) -> Round:
    """Whether there is a thing: one not mentioned yet, or one that is not there."""
    shown = talk.scene.names
    # A scene of one kind of thing has only absent ones to ask for; this evens yes and no over all scenes.
    is_there = bool(talk.unmentioned) and talk.rng.random() < 0.9
    name = talk.rng.choice(talk.unmentioned) if is_there else draw_absent_noun(talk.rng, talk.split, shown)
    if is_there:
        talk.mentioned.append(name)
    talk.topic = name if is_there else None
    wrong = [*presence_answers(name, True), *presence_answers(name, False), "yes", "no"]
    wrong += [presence_answers(other, is_there)[0] for other in talk.other_nouns() if other != name]
    forms = ("is there {}?", "is {} in the picture?", "can you see {}?")
    questions = tuple(form.format(with_article(name)) for form in forms)
    half_right = ("yes",) if is_there else ("no",)
    return talk.round("presence", questions, presence_answers(name, is_there), half_right, wrong)


def ask_place(talk: Talk) -> Round:
    """Where one of a pair is, towards the other."""
    relation = talk.scene.relation
    assert relation is not None
    first, second = talk.scene.names
    name = talk.topic or talk.rng.choice((first, second))
    subject, _ = talk.refer(name)
    talk.topic = name
    is_first = name == first
    other = second if is_first else first
    words = (RELATION_WORDS if is_first else INVERSE_WORDS)[relation]
    right = (*place_answers(words, other), PLACES[relation][0 if is_first else 1])
    half_right = (f"it is next to the {other}",) if relation == "left of" else ()
    all_words = [
        tuple(direction[each]) for each in RELATIONS for direction in (RELATION_WORDS, INVERSE_WORDS)
    ]
    wrong = [text for other_words in all_words for text in place_answers(other_words, other)]
    wrong += [f"it is next to the {other}", *(place for places in PLACES.values() for place in places)]
    wrong += [place_answers(words, noun)[0] for noun in talk.other_nouns()]
    return talk.round(
        "place", (f"where is {subject}?", f"where exactly is {subject}?"), right, half_right, wrong
    )


def ask_bigger(talk: Talk) -> Round:
    """Which of a pair is bigger, or that neither is."""
    first, second = talk.scene.objects
    right: Texts = SAME_SIZE
    talk.topic = None
    if first.size != second.size:
        talk.topic = max(first, second, key=lambda thing: SIZES.index(thing.size)).name
        right = comparison_answers(talk.topic)
    names = [first.name, second.name, *talk.other_nouns()]
    wrong = [*SAME_SIZE, *(text for name in names for text in comparison_answers(name))]
    return talk.round("comparison", ("which one is bigger?", "which of them is bigger?"), right, (), wrong)


Asker = Callable[[Talk], Round]


def _open_questions(talk: Talk) -> Iterator[tuple[object, Asker, int]]:
    """What can be asked now: what it is about, who asks it, its weight."""
    yield "background", ask_background, 2
    yield "else", ask_else, 3
    if talk.unmentioned or len(talk.scene.objects) == 1:
        yield "presence", ask_presence, 4
    for name in talk.mentioned:
        yield ("size", name), partial(ask_size, name=name), 2
    if len(talk.scene.objects) == 1:
        yield "number", partial(ask_number, name=talk.mentioned[0]), 2
    else:
        yield "total", ask_total, 1
    if talk.scene.relation is not None and not talk.unmentioned:
        yield "place", ask_place, 4
        yield "bigger", ask_bigger, 2


def draw_rounds(talk: Talk) -> tuple[Round, ...]:
    """NUM_ROUNDS different questions, each one possible after those before it."""
    rounds = []
    for _ in range(NUM_ROUNDS):
        questions = [each for each in _open_questions(talk) if each[0] not in talk.asked]
        ((subject, asker, _),) = talk.rng.choices(questions, [weight for *_, weight in questions])
        talk.asked.add(subject)
        rounds.append(asker(talk))
    return tuple(rounds)
