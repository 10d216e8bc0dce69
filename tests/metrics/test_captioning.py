import json
import random
import subprocess
import sys

import pytest
from pycocoevalcap import eval as coco_evaluation
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from openblip.errors import ConfigError, MissingExtraError
from openblip.metrics import captioning
from openblip.metrics.captioning import caption_scores, exact_match, java_runs, scores_by_domain

WORDS = ["a", "the", "red", "blue", "dog", "cat", "tree", "on", "left", "of", "under", "two", "small", "big", "ball"]


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens on every machine, and no wait for METEOR; test_java_programs compares the tokenizers."""
    monkeypatch.setattr(captioning, "java_runs", lambda: False)


def cider(predictions: list[str], references: list[list[str]]) -> float:
    return caption_scores(predictions, references)["cider"]


def rouge_l(predictions: list[str], references: list[list[str]]) -> float:
    return caption_scores(predictions, references)["rouge_l"]


def bleu(predictions: list[str], references: list[list[str]]) -> tuple[float, float, float, float]:
    scores = caption_scores(predictions, references)
    return scores["bleu_1"], scores["bleu_2"], scores["bleu_3"], scores["bleu_4"]


def random_set(seed: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)
    texts = [[" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(rng.randint(1, 4))] for _ in range(12)]
    return [rng.choice(of) if rng.random() < 0.5 else " ".join(rng.choices(WORDS, k=6)) for of in texts], texts


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_pycocoevalcap_on_the_same_tokens(seed: int) -> None:
    predictions, references = random_set(seed)
    truth = dict(enumerate(references))
    written = {i: [p] for i, p in enumerate(predictions)}
    assert cider(predictions, references) == pytest.approx(100 * float(Cider().compute_score(truth, written)[0]))
    assert bleu(predictions, references) == pytest.approx(Bleu(4).compute_score(truth, written, verbose=0)[0])
    assert rouge_l(predictions, references) == pytest.approx(float(Rouge().compute_score(truth, written)[0]))


def test_perfect_captions() -> None:
    predictions = ["a red dog on the left", "two small cats under a tree", "the big blue ball of wool"]
    assert cider(predictions, [[p] for p in predictions]) == pytest.approx(1000)
    assert bleu(predictions, [[p] for p in predictions]) == pytest.approx((1.0, 1.0, 1.0, 1.0))


def test_bleu_by_hand() -> None:
    # 3 of 4 words, 1 of 3 pairs; as long as the closest reference: no brevity penalty.
    one, two, three, _ = bleu(["a red cat sits"], [["a red dog sits", "nothing"]])
    assert one == pytest.approx(3 / 4)
    assert two == pytest.approx((3 / 4 * 1 / 3) ** 0.5)
    assert three == pytest.approx(0.0, abs=1e-3)


def test_rouge_by_hand() -> None:
    # "a red sits" is common to both: precision 3/4, recall 3/5.
    score = rouge_l(["a red cat sits"], [["a big red dog sits"]])
    assert score == pytest.approx((1 + 1.2**2) * 3 / 4 * 3 / 5 / (3 / 5 + 1.2**2 * 3 / 4))


def test_what_cannot_be_computed_is_absent_with_a_reason() -> None:
    scores = caption_scores(*random_set(0))
    assert set(scores["absent"]) == {"meteor", "spice"}
    assert all("is a Java program, and no Java runs here" in text for text in scores["absent"].values())
    assert {"meteor", "spice"}.isdisjoint(scores)
    json.dumps(scores)


def test_domains_share_their_weights_of_words() -> None:
    predictions, references = random_set(1)
    domains = ["near-domain"] * 5 + ["in-domain"] * 3 + ["out-domain"] * 4
    scores = scores_by_domain(predictions, references, domains)
    assert list(scores) == ["in-domain", "near-domain", "out-domain", "entire"]
    assert scores["entire"] == caption_scores(predictions, references)
    truth, written = dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)}
    of_images = Cider().compute_score(truth, written)[1]
    assert scores["near-domain"]["cider"] == pytest.approx(100 * sum(of_images[:5]) / 5)
    assert scores["in-domain"]["cider"] == pytest.approx(100 * sum(of_images[5:8]) / 3)
    assert scores["out-domain"]["rouge_l"] == pytest.approx(rouge_l(predictions[8:], references[8:]))
    # BLEU counts over the domain's own images.
    assert scores["out-domain"]["bleu_4"] == pytest.approx(bleu(predictions[8:], references[8:])[3])


def test_domains_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 predictions and 2 domains"):
        scores_by_domain(["a dog"], [["a dog"]], ["in-domain", "out-domain"])
    with pytest.raises(ConfigError, match="rename that domain"):
        scores_by_domain(["a dog"], [["a dog"]], ["entire"])
    with pytest.raises(ConfigError, match="scores_by_domain: 0 predictions"):
        scores_by_domain([], [], [])


class Captions:
    """What pycocotools' COCO is to COCOEvalCap."""

    def __init__(self, captions: list[list[str]]) -> None:
        self.imgToAnns = {image: [{"caption": text} for text in texts] for image, texts in enumerate(captions)}

    def getImgIds(self) -> list[int]:
        return list(self.imgToAnns)


class NoSpice:
    """Stands in for the metric that would start a download."""

    def method(self) -> str:
        return "SPICE"

    def compute_score(self, truth: dict[int, object], written: object) -> tuple[float, list[float]]:
        return 0.0, [0.0] * len(truth)


@pytest.mark.slow
@pytest.mark.skipif(not java_runs(), reason="METEOR and the official tokenizer are Java programs")
def test_scores_are_those_of_coco_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "java_runs", java_runs)
    predictions, references = random_set(2)
    predictions[:3] = ["", "A café, (big) dog's ball!", references[2][0].title() + "."]
    domains = ["in-domain"] * 4 + ["out-domain"] * 8
    scores = scores_by_domain(predictions, references, domains)

    their_meteor = Meteor()
    monkeypatch.setattr(coco_evaluation, "Meteor", lambda: their_meteor)
    monkeypatch.setattr(coco_evaluation, "Spice", NoSpice)
    for name, images in (("entire", slice(None)), ("out-domain", slice(4, None))):
        theirs = coco_evaluation.COCOEvalCap(
            Captions(references[images]), Captions([[text] for text in predictions[images]])
        )
        theirs.evaluate()
        ours, same = scores[name], ["METEOR", "ROUGE_L", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"]
        for metric in [*same, "CIDEr"] if name == "entire" else same:
            expected = theirs.eval[metric] * (100 if metric == "CIDEr" else 1)
            assert ours[metric.lower()] == pytest.approx(expected), metric  # type: ignore[literal-required]


def test_case_and_punctuation_do_not_count() -> None:
    references = [["a red dog, on the left"], ["two cats"]]
    assert cider(["A red dog on the left.", "Two cats!"], references) == pytest.approx(
        cider(["a red dog on the left", "two cats"], references)
    )


def test_an_empty_caption_scores_nothing_and_breaks_nothing() -> None:
    predictions, references = ["", "two cats"], [["a red dog"], ["two cats"]]
    assert 0.0 < cider(predictions, references) < 1000
    assert bleu(["", ""], references)[3] == pytest.approx(0.0, abs=1e-6)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    predictions, references = random_set(0)
    cider(predictions, references)
    bleu(predictions, references)
    assert capfd.readouterr() == ("", "")


def test_exact_match_by_hand() -> None:
    references = [["a dog", "the dog"], ["a cat"], ["two balls"]]
    assert exact_match(["The  Dog", "a dog", "two balls"], references, str.lower) == pytest.approx(1 / 3)
    assert exact_match(["The Dog", "a cat", "x"], references, str.lower) == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", [caption_scores, lambda p, r: exact_match(p, r, str)])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "0 predictions"),
        (["a"], [["a"], ["b"]], "1 predictions and 2 lists"),
        (["a", "b"], [["a"], []], "image 1 has no references"),
        (["a"], ["a"], "list of references"),
    ],
)
def test_lists_that_do_not_fit_are_refused(
    metric: object, predictions: list[str], references: list[list[str]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        metric(predictions, references)  # type: ignore[operator]


def test_references_without_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="no reference of image 0 has a word"):
        cider(["a dog"], [["...", ""]])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(MissingExtraError, match=r"openblip\[metrics\]"):
        cider(["a dog"], [["a dog"]])


def test_metrics_import_neither_torch_nor_the_extra() -> None:
    code = (
        "import sys, openblip.metrics.captioning, openblip.metrics.ranking; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'pycocoevalcap')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
