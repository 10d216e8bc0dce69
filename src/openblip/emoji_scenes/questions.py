"""The grammar of questions about one scene with the answers of ten annotators, and documents that ask them.

Answers are counted per annotator, as in VQA: most people say "2", some "two"; a small dog is a "dog" to most
and a "small dog" to some. Yes and no are right equally often within each kind of question.

A document is a text of several lines about one scene, for language models that never see an image. The first
line is a caption; later lines say the same in other words or ask about it. A model that has learned this
answers from what stands before, which is a caption or what takes its place (BLIP-2 stage 2).
"""

from random import Random
from typing import Literal

from openblip.emoji_scenes import captions
from openblip.emoji_scenes import scene as world
from openblip.emoji_scenes.captions import RELATION_WORDS, relation_from_both_ends
from openblip.emoji_scenes.scene import BACKGROUNDS, NOUNS, WORLD, Scene, SceneObject, SceneText, Size, Split, sizes_of

Medium = Literal["picture", "video"]  # what a question calls the image or the video that it is about
Votes = dict[str, int]  # answer -> number of annotators who gave it

NUM_ANNOTATORS = 10
SIZE_VOTES: dict[Size, Votes] = WORLD["size_votes"]
QUESTION_FORMS: dict[str, list[str]] = WORLD["questions"]


def yes_or_no(is_true: bool) -> Votes:
    return {"yes" if is_true else "no": NUM_ANNOTATORS}


def naming_votes(thing: SceneObject) -> Votes:
    """What people call a thing: "dog", "small dog", "dogs", "two dogs"."""
    rarer = [f"{thing.size} {thing.noun}"] if thing.size != "normal" else []
    rarer += [f"{thing.number} {thing.noun}"] if thing.count > 1 else []
    return {thing.noun: NUM_ANNOTATORS - 2 * len(rarer)} | dict.fromkeys(rarer, 2)


def counting_votes(count: int) -> Votes:
    """Most people write a number in digits, some as a word."""
    return {str(count): 7, world.NUMBER_WORDS[count]: 3}


def list_answers() -> list[str]:
    """Return all answers that can occur, sorted."""
    counts_and_sizes = [(count, size) for count in (1, 2, 3) for size in sizes_of(count)]
    things = [SceneObject(name=name, size=size, count=count) for name in NOUNS for count, size in counts_and_sizes]
    votes = [*map(counting_votes, (1, 2, 3)), *SIZE_VOTES.values(), *map(naming_votes, things)]
    return sorted({"yes", "no", *BACKGROUNDS}.union(*votes))


def draw_question(scene: Scene, split: Split, medium: Medium, rng: Random) -> SceneText:
    """Draw one of the questions that can be asked about `scene`, each kind with its weight.

    Its fields are those of a VQA sample, with all annotators' answers, the majority's first; the writer numbers it.
    """
    weights = {"background": 2, "existence": 3, "size": 2, "whether size": 2}
    if len(scene.objects) == 1:
        weights |= {"count": 3, "name": 3, "total": 1}
    else:
        weights["total"] = 2
        if [thing.size for thing in scene.objects].count("small") == 1:
            weights["which is small"] = 2
    if scene.relation is not None:
        weights |= {"neighbor": 4, "place": 3, "whether relation": 2}
    (kind,) = rng.choices(list(weights), list(weights.values()))
    fillings: list[dict[str, object]] = [{}]  # words for the question's forms; several where a relation has several
    match kind:
        case "background":
            votes = {scene.background: NUM_ANNOTATORS}
        case "count":
            thing = rng.choice(scene.objects)
            votes, fillings = counting_votes(thing.count), [{"thing": thing}]
        case "total":
            votes = counting_votes(scene.num_things)
        case "existence":  # in equal parts of a noun that is there and of one that is not
            is_there = rng.random() < 0.5
            name = rng.choice(scene.names) if is_there else world.draw_absent_noun(rng, split, scene.names)
            votes, fillings = yes_or_no(is_there), [{"thing": SceneObject(name=name)}]
        case "name":
            (thing,) = scene.objects
            votes = naming_votes(thing)
        case "size":
            thing = rng.choice(scene.objects)
            votes, fillings = SIZE_VOTES[thing.size], [{"thing": thing}]
        case "whether size":  # "is it small?" and, where a thing may be big, "is it big?" are half true
            thing = rng.choice(scene.objects)
            asked: Size = "small"
            if "big" in sizes_of(scene.num_things):
                # Two of three sizes can be asked for: asking for the thing's own in three of four evens yes and no.
                asks_for_its_own = rng.random() < 0.75
                other_size: Size = "big" if thing.size == "small" else "small"
                asked = thing.size if asks_for_its_own else other_size
                asked = rng.choice(("small", "big")) if thing.size == "normal" else asked
            votes, fillings = yes_or_no(thing.size == asked), [{"thing": thing, "size": asked}]
        case "which is small":
            (thing,) = (thing for thing in scene.objects if thing.size == "small")
            votes = naming_votes(thing)
        case "neighbor":
            thing, relations, other = rng.choice(relation_from_both_ends(scene))
            votes, fillings = naming_votes(thing), [{"relation": words, "other": other} for words in relations]
        case "whether relation":  # in equal parts true and reversed
            thing, relations, other = rng.choice(relation_from_both_ends(scene))
            is_true = rng.random() < 0.5
            first, second = (thing, other) if is_true else (other, thing)
            votes = yes_or_no(is_true)
            fillings = [{"first": first, "relation": words, "second": second} for words in relations]
        case "place":
            assert scene.relation is not None
            places = RELATION_WORDS[scene.relation]["places"]
            thing, place = rng.choice(list(zip(scene.objects, places, strict=True)))
            votes, fillings = naming_votes(thing), [{"place": place}]
        case _:
            raise AssertionError(f"no question of kind {kind}")
    wordings = captions.fill_forms(QUESTION_FORMS[kind], [words | {"medium": medium} for words in fillings])
    text = rng.choice(wordings)
    answers = [answer for answer, count in votes.items() for _ in range(count)]
    fields = {"question": text, "answers": answers, "question_id": 0, "question_kind": kind}
    return SceneText(scenes=(scene,), kind=kind, text=text, fields=fields)


# Documents
DOCUMENT_QUESTION_FORMS = ("Question: {} Answer: {}", "Question: {} Short answer: {}")  # BLIP-2's prompts
DOCUMENT_CAPTION_PROMPT = "a photo of"
NOT_AFTER_THE_PROMPT = ("there ", "on ", "a picture of ", "a drawing of ")

COMPLETE_PROBABILITY = 0.8  # of a first line that says everything that can be asked
QUESTION_PROBABILITY = 0.6  # of a later line that asks; the others are captions
PROMPTED_PROBABILITY = 0.4  # of a caption in a later line that begins with BLIP-2's caption prompt
# Of a question about a pair that asks how the things stand: language models learn that last of all.
RELATIONAL_PROBABILITY = 0.5
RELATIONAL = frozenset({"place", "whether relation"})


def complete_captions(scene: Scene) -> list[str]:
    """Return the true captions that leave nothing unsaid that can be asked."""
    true = captions.true_captions(scene)
    return [text for text in true if captions.says_background(scene, text) and captions.says_relation(scene, text)]


def draw_document(scene: Scene, split: Split, rng: Random) -> str:
    """Draw a caption and two to five more lines: questions that the captions so far answer, or captions."""
    true = captions.true_captions(scene)
    is_complete = rng.random() < COMPLETE_PROBABILITY
    said = [rng.choice(complete_captions(scene) if is_complete else true)]
    lines = list(said)
    for _ in range(rng.choice((2, 3, 4, 5))):
        if rng.random() < QUESTION_PROBABILITY:
            question = _draw_answered_question(scene, split, said, rng)
            lines.append(rng.choice(DOCUMENT_QUESTION_FORMS).format(question.text, question.fields["answers"][0]))
        else:
            caption = rng.choice(true)
            is_prompted = rng.random() < PROMPTED_PROBABILITY and not caption.startswith(NOT_AFTER_THE_PROMPT)
            said.append(caption)
            lines.append(f"{DOCUMENT_CAPTION_PROMPT} {caption}" if is_prompted else caption)
    return "\n".join(lines)


def _draw_answered_question(scene: Scene, split: Split, said: list[str], rng: Random) -> SceneText:
    """Draw a question whose answer follows from what was said."""
    knows_relation = any(captions.says_relation(scene, text) for text in said)
    unsaid = set() if any(captions.says_background(scene, text) for text in said) else {"background"}
    unsaid |= set() if knows_relation else RELATIONAL | {"neighbor"}
    asks_relation = knows_relation and scene.relation is not None and rng.random() < RELATIONAL_PROBABILITY
    while True:  # every scene has so many kinds of answered questions that this ends soon
        question = draw_question(scene, split, "picture", rng)
        if question.kind in RELATIONAL if asks_relation else question.kind not in unsaid:
            return question
