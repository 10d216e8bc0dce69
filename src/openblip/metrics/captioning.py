"""Caption metrics: CIDEr and BLEU by pycocoevalcap's scorers, and exact match."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from openblip.errors import ConfigError, MissingExtraError
from openblip.metrics.tokenization import tokenize_captions

_PUNCTUATION = re.compile(r"[^\w\s'-]")


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (arXiv 1411.5726) of one prediction per image against that image's references.

    On pycocoevalcap's scale, where 1.333 is what papers print as 133.3. The weights of n-grams come from the
    references given, so scores of different sets do not compare, and a set of one image scores 0.

    Raises:
        ConfigError: no predictions, lists of unequal length, or an image without a reference that has words.
        MissingExtraError: pycocoevalcap is not installed.
    """
    truth, written = _tokenized("cider", predictions, references)
    score, _ = _scorers()[0]().compute_score(truth, written)
    return float(score)


def bleu(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 over the whole set, in [0, 1], with the closest reference length.

    Raises:
        ConfigError, MissingExtraError: as `cider`.
    """
    truth, written = _tokenized("bleu", predictions, references)
    (one, two, three, four), _ = _scorers()[1](4).compute_score(truth, written, verbose=0)
    return float(one), float(two), float(three), float(four)


def normalise_caption(text: str) -> str:
    """Lower-case, without punctuation other than ' and -, with single blanks."""
    return " ".join(_PUNCTUATION.sub(" ", text.lower()).split())


def exact_match(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    normalise: Callable[[str], str] = normalise_caption,
) -> float:
    """Share of predictions that are, both sides normalised, one of their references.

    Raises:
        ConfigError: no predictions, lists of unequal length, or an image without references.
    """
    _check("exact_match", predictions, references)
    right = [
        normalise(prediction) in {normalise(reference) for reference in allowed}
        for prediction, allowed in zip(predictions, references, strict=True)
    ]
    return sum(right) / len(right)


def _tokenized(
    metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and predictions by image position, as the scorers want them; tokenized in one call."""
    _check(metric, predictions, references)
    tokens = iter(tokenize_captions([*predictions, *(text for texts in references for text in texts)]))
    written = {image: [next(tokens)] for image in range(len(predictions))}
    truth = {image: [next(tokens) for _ in texts] for image, texts in enumerate(references)}
    for image, texts in truth.items():
        if not any(texts):
            raise ConfigError(f"{metric}: no reference of image {image} has a word: {references[image]}")
    return truth, written


def _check(metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(predictions, str) or any(isinstance(texts, str) for texts in references):
        raise ConfigError(f"{metric}: give a list of predictions and a list of references for each of them")
    if not predictions or len(predictions) != len(references):
        raise ConfigError(
            f"{metric}: {len(predictions)} predictions and {len(references)} lists of references; "
            "give one list per prediction, and at least one"
        )
    for image, texts in enumerate(references):
        if not texts:
            raise ConfigError(f"{metric}: image {image} has no references; leave it out")


def _scorers() -> tuple[Any, Any]:
    """pycocoevalcap's Cider and Bleu classes."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise MissingExtraError(
            'Caption metrics need pycocoevalcap; install it with: pip install "openblip[metrics]"'
        ) from error
    return Cider, Bleu
