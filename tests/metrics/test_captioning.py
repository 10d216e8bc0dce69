import random
import subprocess
import sys

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from openblip.errors import ConfigError, MissingExtraError
from openblip.metrics import captioning
from openblip.metrics.captioning import bleu, cider, exact_match, normalise_caption
from openblip.metrics.tokenization import tokenize_in_python

WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "dog",
    "cat",
    "tree",
    "on",
    "left",
    "of",
    "under",
    "two",
    "small",
    "big",
    "ball",
]


@pytest.fixture(autouse=True)
def python_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens on every machine; test_tokenization compares the tokenizers."""
    monkeypatch.setattr(captioning, "tokenize_captions", tokenize_in_python)


def random_set(seed: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)
    texts = [
        [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(rng.randint(1, 4))]
        for _ in range(12)
    ]
    return [
        rng.choice(of) if rng.random() < 0.5 else " ".join(rng.choices(WORDS, k=6)) for of in texts
    ], texts


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_pycocoevalcap_on_the_same_tokens(seed: int) -> None:
    predictions, references = random_set(seed)
    truth = dict(enumerate(references))
    written = {i: [p] for i, p in enumerate(predictions)}
    assert cider(predictions, references) == pytest.approx(float(Cider().compute_score(truth, written)[0]))
    assert bleu(predictions, references) == pytest.approx(Bleu(4).compute_score(truth, written, verbose=0)[0])


def test_perfect_captions() -> None:
    predictions = ["a red dog on the left", "two small cats under a tree", "the big blue ball of wool"]
    assert cider(predictions, [[p] for p in predictions]) == pytest.approx(10.0)
    assert bleu(predictions, [[p] for p in predictions]) == pytest.approx((1.0, 1.0, 1.0, 1.0))


def test_bleu_by_hand() -> None:
    # 3 of 4 words, 1 of 3 pairs; as long as the closest reference: no brevity penalty.
    one, two, three, _ = bleu(["a red cat sits"], [["a red dog sits", "nothing"]])
    assert one == pytest.approx(3 / 4)
    assert two == pytest.approx((3 / 4 * 1 / 3) ** 0.5)
    assert three == pytest.approx(0.0, abs=1e-3)


def test_case_and_punctuation_do_not_count() -> None:
    references = [["a red dog, on the left"], ["two cats"]]
    assert cider(["A red dog on the left.", "Two cats!"], references) == pytest.approx(
        cider(["a red dog on the left", "two cats"], references)
    )


def test_an_empty_caption_scores_nothing_and_breaks_nothing() -> None:
    predictions, references = ["", "two cats"], [["a red dog"], ["two cats"]]
    assert 0.0 < cider(predictions, references) < 10.0
    assert bleu(["", ""], references)[3] == pytest.approx(0.0, abs=1e-6)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    predictions, references = random_set(0)
    cider(predictions, references)
    bleu(predictions, references)
    assert capfd.readouterr() == ("", "")


def test_exact_match_by_hand() -> None:
    references = [["a dog", "the dog"], ["a cat"], ["two balls"]]
    assert exact_match(["The  dog.", "a dog", "two balls"], references) == pytest.approx(2 / 3)
    assert exact_match(["The dog", "a cat", "x"], references, normalise=str) == pytest.approx(1 / 3)
    assert normalise_caption('  A two-door CAR, it\'s "red"! ') == "a two-door car it's red"


@pytest.mark.parametrize("metric", [cider, bleu, exact_match])
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
        "import sys, openblip.metrics.captioning, openblip.metrics.retrieval, openblip.metrics.filtering; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'pycocoevalcap')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
