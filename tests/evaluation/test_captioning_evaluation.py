"""Captions measured against numbers worked out by hand."""

from dataclasses import dataclass
from typing import Any

import pytest

from listed_source import ListSource, numbers, sample, scored
from openblip.data.sample import Sample
from openblip.errors import SourceError
from openblip.evaluation.captioning import evaluate_captioning, reference_captions
from openblip.generation.decoding import Beam
from openblip.metrics import captioning
from openblip.predictor.values import ScoredText

pytest.importorskip("pycocoevalcap")


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR and SPICE are tested with the metrics; here they would only take time."""
    monkeypatch.setattr(captioning, "java_runs", lambda: False)


@dataclass
class Writer:
    captions: list[str]
    decoding: Any = None

    def caption(self, images: Any, *, decoding: Any, batch_size: int | None, return_scores: bool) -> list[ScoredText]:
        """Of two tokens, with probabilities of 0.9 and 0.4: 0.6 is their geometric mean."""
        assert return_scores
        self.decoding = decoding
        return [scored(self.captions[number], 0.9, 0.4) for number in numbers(images)]


def test_a_caption_counts_when_it_is_one_of_the_references() -> None:
    samples = [
        sample(0, "a dog", references=["A dog.", "one dog"]),
        sample(1, "a cat", references=["a cat"]),
        sample(2, "a bird"),  # without references its caption is the reference
    ]
    scores = evaluate_captioning(Writer(["one dog", "a cow", "a bird"]), ListSource(samples))
    assert scores["exact_match"] == pytest.approx(2 / 3)
    assert scores["bleu_1"] == pytest.approx(5 / 6)  # five of six words
    assert [row["caption"] for row in scores["predictions"]] == ["one dog", "a cow", "a bird"]
    assert (scores["num_images"], scores["num_scored"], scores["num_rejects"]) == (3, 3, 0)
    assert "by_domain" not in scores


def test_results_are_what_cocos_server_takes() -> None:
    samples = [sample(0, "a dog", image_id=391895), sample(1, "a cat")]
    samples[0] = Sample("000", "s0", b"0", ("a dog",), "list#391895", {"image_id": 391895})
    scores = evaluate_captioning(Writer(["a dog", "a cow"]), ListSource(samples))
    assert scores["results"] == [{"image_id": 391895, "caption": "a dog"}, {"image_id": "001", "caption": "a cow"}]
    said = {"image_id": 391895, "caption": "a dog", "hallucinated": {}}
    assert scores["predictions"][0] == {"shard": "s0", "key": "000", **said}


def test_captions_are_judged_by_the_objects_of_their_samples() -> None:
    dogs = {
        "name": "dog",
        "synonyms": ["puppy"],
        "count": 2,
        "attributes": ["small"],
        "relations": [{"phrase": "asleep"}],
    }
    samples = [sample(0, "two dogs", objects=[dogs]), sample(1, "a cat", objects=["cat"]), sample(2, "a zebra")]
    scores = evaluate_captioning(Writer(["a small puppy asleep", "a small dog", "a cow"]), ListSource(samples))
    said = [row.get("hallucinated") for row in scores["predictions"]]
    assert said == [{"count": ["a small puppy"]}, {"object": ["dog"]}, None]
    assert scores["hallucination"]["chair_i"] == pytest.approx(1 / 2)
    assert scores["hallucination"]["relations"] == 0.0
    assert (scores["calibration"]["confidence"], scores["calibration"]["accuracy"]) == (pytest.approx(0.6), 0.0)
    with_cows = evaluate_captioning(Writer(["a calf"]), ListSource(samples[:1]), synonyms={"cow": ["calf"]})
    assert with_cows["predictions"][0]["hallucinated"] == {"object": ["calf"]}


def test_without_objects_captions_are_judged_by_their_references() -> None:
    samples = [sample(0, "Two puppies", "a man with dogs"), sample(1, "a cat", objects={"bbox": []}), sample(2)]
    scores = evaluate_captioning(
        Writer(["a woman with a dog", "an orange kitten in a car", "a dog"]), ListSource(samples)
    )
    assert [row.get("hallucinated") for row in scores["predictions"]] == [{}, {"object": ["car"]}, None]
    assert scores["hallucination"]["object_recall"] == 1.0
    by_list = evaluate_captioning(Writer(["a woman and a dog"]), ListSource(samples[:1]), synonyms={"woman": []})
    assert by_list["predictions"][0]["hallucinated"] == {"object": ["woman"]}


def test_objects_of_a_wrong_form_are_named() -> None:
    hostile = [
        {"name": 1},
        {"name": "dog", "count": "2"},
        {"name": "dog", "relations": ["x"]},
        {"name": "a", "synonyms": 5},
    ]
    source = ListSource([sample(i, "a dog", objects=[each]) for i, each in enumerate(hostile)] + [sample(4, "a dog")])
    scores = evaluate_captioning(Writer(["a dog"] * 5), source)
    assert [reject["key"] for reject in scores["rejects"]] == ["000", "001", "002", "003"]
    assert all("`objects` must be" in reject["reason"] for reject in scores["rejects"])


def test_domains_are_scored_apart_and_together() -> None:
    """NoCaps."""
    domains = ["in-domain", "near-domain", "out-domain", "out-domain"]
    texts = ["a red dog", "one blue cat", "two birds", "a green tree"]
    source = ListSource([sample(i, texts[i], domain=domains[i]) for i in range(4)])
    scores = evaluate_captioning(Writer(["a red dog", "one blue cat", "a cow", "a green tree"]), source)
    by_domain = scores["by_domain"]
    assert set(by_domain) == {"in-domain", "near-domain", "out-domain", "entire"}
    assert scores["cider"] == by_domain["entire"]["cider"]
    assert by_domain["in-domain"]["bleu_1"] == pytest.approx(1.0)
    assert by_domain["out-domain"]["bleu_1"] < 1.0
    assert scores["exact_match"] == pytest.approx(3 / 4)


def test_images_without_captions_are_captioned_and_not_scored() -> None:
    scores = evaluate_captioning(Writer(["a dog", "a cow"]), ListSource([sample(0, "a dog"), sample(1)]))
    assert (scores["num_images"], scores["num_scored"]) == (2, 1)
    assert scores["exact_match"] == 1.0
    assert len(scores["results"]) == 2
    unlabelled = evaluate_captioning(Writer(["a dog"]), ListSource([sample(0)]))
    assert "cider" not in unlabelled
    assert unlabelled["num_scored"] == 0


def test_what_cannot_be_read_is_skipped_and_named() -> None:
    broken = Sample("001", "s0", b"x", ("a cow",), "list/1")
    hostile = sample(2, "a dog", references=5)
    source = ListSource([sample(0, "a dog"), broken, hostile, "gone"])
    scores = evaluate_captioning(Writer(["a dog"]), source)
    assert scores["num_images"] == 1
    assert scores["num_rejects"] == 3
    reasons = {reject["key"]: reject["reason"] for reject in scores["rejects"]}
    assert "no number" in reasons["001"]
    assert "references" in reasons["002"]
    assert reasons["gone"] == "damaged"
    with pytest.raises(SourceError, match="no sample that can be used"):
        evaluate_captioning(Writer([]), ListSource([]))


def test_a_limit_and_a_decoding_are_passed_on() -> None:
    writer = Writer(["a dog"] * 5)
    source = ListSource([sample(i, "a dog") for i in range(5)])
    assert evaluate_captioning(writer, source, limit=2)["num_images"] == 2
    assert writer.decoding == Beam(num_beams=3, max_new_tokens=20)
    evaluate_captioning(writer, source, decoding=Beam(num_beams=2, max_new_tokens=5))
    assert writer.decoding.num_beams == 2


def test_references_are_what_training_reads() -> None:
    assert reference_captions(sample(0, "x", references=["A big  Dog!", "two"])) == ["a big dog", "two"]
    assert reference_captions(sample(0, "x", references="One Dog.")) == ["one dog"]
    assert reference_captions(sample(0, "X.")) == ["x"]
    with pytest.raises(SourceError, match="s0/000: references"):
        reference_captions(sample(0, "x", references=[1]))
