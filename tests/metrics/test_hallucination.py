"""What captions say that is not in their images, judged by hand."""

import pytest

from openblip.errors import ConfigError
from openblip.metrics.hallucination import (
    DepictedObject,
    ObjectRelation,
    Vocabulary,
    coco_synonyms,
    hallucination_rates,
    parse_synonyms,
    plural_of,
)

DOGS = DepictedObject(
    "dog", ("puppy",), 2, ("small", "brown"), (ObjectRelation("left of", "cat"), ObjectRelation("on the left"))
)
CAT = DepictedObject("cat", (), 1, (), (ObjectRelation("right of", "dog"), ObjectRelation("on the right")))
SKY = DepictedObject("sky", attributes=("blue",), stuff=True)
SCENE = [DOGS, CAT, SKY]
VOCABULARY = Vocabulary([SCENE, [DepictedObject("palm tree"), DepictedObject("tree", attributes=("green",))]])


@pytest.mark.parametrize(
    ("caption", "false"),
    [
        ("Two small brown puppies on the left, and a cat on the right.", {}),
        ("2 dogs left of a cat under a blue sky", {}),
        ("dogs left of the cat", {}),
        ("a sunset over the sea", {}),  # nothing of it is in the vocabulary
        ("a palm tree", {"object": ["palm tree"]}),  # and not the tree in it
        ("a dog", {"count": ["a dog"]}),
        ("three small dogs", {"count": ["three small dogs"]}),
        ("cats", {"count": ["cats"]}),
        ("a small cat", {"attribute": ["small cat"]}),
        ("the cat is green and the sky green", {"attribute": ["green cat", "green sky"]}),
        ("a cat left of two dogs", {"relation": ["cat left of dog"]}),
        ("two dogs, a cat on the left", {"relation": ["cat on the left"]}),
        ("a cat left of a tree", {"object": ["tree"]}),  # how the cat stands to what is not there is no further claim
        ("three green trees", {"object": ["trees"]}),
        ("the dog cat", {}),  # a cat of some kind
    ],
)
def test_false_claims_are_found(caption: str, false: dict[str, list[str]]) -> None:
    assert VOCABULARY.judge(caption, SCENE).hallucinated() == false


def test_what_is_not_known_of_an_object_is_not_judged() -> None:
    vague = [DepictedObject("dog"), DepictedObject("cat", attributes=("small",), relations=())]
    vocabulary = Vocabulary([SCENE, vague])
    judgement = vocabulary.judge("three small dogs left of a brown cat", vague)
    assert judgement.hallucinated() == {"attribute": ["brown cat"]}
    assert vocabulary.judge("three cats left of a dog", vague).hallucinated() == {"relation": ["cats left of dog"]}


def test_several_objects_of_a_name_count_alone_or_together() -> None:
    alike = [DepictedObject("dog", count=1, attributes=("small",)), DepictedObject("dog", count=2, attributes=())]
    vocabulary = Vocabulary([alike])
    for caption in ("a small dog", "two dogs", "three dogs", "dogs"):
        assert vocabulary.judge(caption, alike).hallucinated() == {}
    assert vocabulary.judge("four dogs", alike).hallucinated() == {"count": ["four dogs"]}


def test_rates_are_shares_of_what_was_said() -> None:
    captions = ["two small dogs and a tree", "two big dogs", "a cat left of two dogs", "the sea"]
    rates = hallucination_rates([VOCABULARY.judge(caption, SCENE) for caption in captions])
    assert rates["chair_i"] == pytest.approx(1 / 5)  # dogs, tree, dogs, cat, dogs
    assert rates["chair_s"] == pytest.approx(1 / 4)
    assert rates["attributes"] == 0.0
    assert rates["counts"] == 0.0
    assert rates["relations"] == 1.0
    assert rates["captions"] == pytest.approx(2 / 4)
    assert rates["object_recall"] == pytest.approx(4 / 8)
    nothing = hallucination_rates([VOCABULARY.judge("the sea", [])])
    assert (nothing["chair_i"], nothing["chair_s"], nothing["object_recall"]) == (None, 0.0, None)
    with pytest.raises(ConfigError, match="no caption"):
        hallucination_rates([])


@pytest.mark.parametrize(
    ("caption", "names"),
    [
        ("A man and two women are riding motorbikes", ["person", "person", "motorcycle"]),
        ("people at a bus stop next to a hot dog stand", ["person", "hot dog"]),
        ("an orange cat sleeps on a teddy bear", ["cat", "teddy bear"]),
        ("a tennis player swings her racquet on a tennis court", ["person", "tennis racket"]),
        ("three sheep, some geese and a glass of wine on the table", ["sheep", "bird", "wine glass", "dining table"]),
    ],
)
def test_cocos_classes_are_found_by_their_synonyms(caption: str, names: list[str]) -> None:
    vocabulary = Vocabulary(synonyms=coco_synonyms())
    assert [mention.name for mention in vocabulary.mentions(caption)] == names


def test_lists_of_synonyms() -> None:
    assert len(coco_synonyms()) == 80 + 1
    assert parse_synonyms({"dog": ["puppy"], "cat": []}, "names.json") == {"dog": ["puppy"], "cat": []}
    for hostile in ({}, {"dog": "puppy"}, {"dog": ["?!", ""]}):
        with pytest.raises(ConfigError, match=r"names\.json"):
            parse_synonyms(hostile, "names.json")
    assert [plural_of(word) for word in ("fox", "butterfly", "key", "policeman", "sheep", "bus")] == [
        "foxes", "butterflies", "keys", "policemen", "sheep", "buses",
    ]  # fmt: skip
