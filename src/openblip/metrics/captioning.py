"""Caption metrics: those of COCO evaluation by pycocoevalcap's scorers, and exact match.

CIDEr, BLEU and ROUGE-L are always there; METEOR needs Java, and SPICE Java and Stanford's models. The scorers
are called one by one because pycocoevalcap's own frame needs Java for its tokenizer and downloads models.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from openblip.errors import ConfigError, MissingExtraError
from openblip.metrics.java_programs import meteor_scores, spice_scores
from openblip.metrics.tokenization import tokenize_captions

ENTIRE = "entire"


class CaptionScores(TypedDict):
    """The scores of COCO evaluation of one prediction per image.

    All are in [0, 1] but CIDEr, which is on pycocoevalcap's scale, where 1.333 is what papers print as 133.3.
    """

    cider: float
    """CIDEr-D (arXiv 1411.5726). The weights of n-grams come from the references given, so scores of different
    sets do not compare, and a set of one image scores 0."""
    bleu_1: float
    """BLEU over the whole set, with the closest reference length."""
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    """The F score (beta 1.2) of the longest common subsequence, a mean over images; precision and recall are each
    the best over the references, as pycocoevalcap computes them."""
    meteor: NotRequired[float]
    """METEOR 1.5 (English, normalised) over the whole set."""
    spice: NotRequired[float]
    """SPICE (arXiv 1607.08822), the mean F score over images."""
    absent: dict[str, str]
    """The metrics that could not be computed here, each with the reason."""


def caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Score one prediction per image against that image's references.

    Raises:
        ConfigError: no predictions, lists of unequal length, or an image without a reference that has words.
        MissingExtraError: pycocoevalcap is not installed. Where METEOR or SPICE cannot run, it is among `absent`.
    """
    everything = {ENTIRE: range(len(predictions))}
    return _scores_of_groups("caption_scores", predictions, references, everything)[ENTIRE]


def scores_by_domain(
    predictions: Sequence[str], references: Sequence[Sequence[str]], domains: Sequence[str]
) -> dict[str, CaptionScores]:
    """Score the images of each domain, by its name, and all of them as "entire" (NoCaps).

    CIDEr weights n-grams by all references together, so that "entire" is the mean of the domains weighted by
    their numbers of images. NoCaps' server is not public, but its published scores are such means: 78.1, 57.7
    and 31.3 of 648, 2938 and 914 images are 55.3 together (nocaps-org/updown-baseline). Scripts that evaluate
    a file per domain weight by the domain's own references, as `caption_scores` of its images does.

    Raises as `caption_scores`, and `ConfigError` for a domain called "entire".
    """
    if len(domains) != len(predictions):
        raise ConfigError(f"scores_by_domain: {len(predictions)} predictions and {len(domains)} domains")
    if ENTIRE in domains:
        raise ConfigError(f'scores_by_domain: "{ENTIRE}" is the name of all images; rename that domain')
    groups: dict[str, Sequence[int]] = {
        name: [image for image, domain in enumerate(domains) if domain == name] for name in sorted(set(domains))
    }
    groups[ENTIRE] = range(len(predictions))
    return _scores_of_groups("scores_by_domain", predictions, references, groups)


def exact_match(
    predictions: Sequence[str], references: Sequence[Sequence[str]], normalise: Callable[[str], str]
) -> float:
    """Return the share of predictions that are, both sides normalised, one of their references.

    Raises `ConfigError` for no predictions, lists of unequal length, or an image without references.
    """
    check_references("exact_match", predictions, references)
    matches = [
        normalise(prediction) in map(normalise, allowed)
        for prediction, allowed in zip(predictions, references, strict=True)
    ]
    return sum(matches) / len(matches)


def check_references(
    metric: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    item: str = "image",
    reference: str = "reference",
) -> None:
    """Raise `ConfigError` unless there is a prediction and each one has a list of at least one reference."""
    if isinstance(predictions, str) or any(isinstance(texts, str) for texts in references):
        raise ConfigError(f"{metric}: give a list of predictions and a list of {reference}s for each of them")
    if not predictions or len(predictions) != len(references):
        raise ConfigError(
            f"{metric}: {len(predictions)} predictions and {len(references)} lists of {reference}s; "
            "give one list per prediction, and at least one"
        )
    for number, texts in enumerate(references):
        if not texts:
            raise ConfigError(f"{metric}: {item} {number} has no {reference}s; leave it out")


def _scores_of_groups(
    metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]], groups: Mapping[str, Sequence[int]]
) -> dict[str, CaptionScores]:
    """The scores of each group of images; every Java program starts once."""
    check_references(metric, predictions, references)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise MissingExtraError(
            'Caption metrics need pycocoevalcap; install it with: pip install "openblip[metrics]"'
        ) from error
    tokens = iter(tokenize_captions([*predictions, *(text for texts in references for text in texts)]))
    tokenized = {image: [next(tokens)] for image in range(len(predictions))}
    truth = {image: [next(tokens) for _ in texts] for image, texts in enumerate(references)}
    for image, texts in truth.items():
        if not any(texts):
            raise ConfigError(f"{metric}: no reference of image {image} has a word: {references[image]}")
    # Scores of images, of which a group's score is the mean; BLEU and METEOR count over a group as a whole.
    of_images = {
        "cider": Cider().compute_score(truth, tokenized)[1],
        "rouge_l": Rouge().compute_score(truth, tokenized)[1],
    }
    meteors: dict[str, float] = {}
    absent: dict[str, str] = {}
    try:
        meteors = dict(zip(groups, meteor_scores(tokenized, truth, list(groups.values())), strict=True))
    except MissingExtraError as error:
        absent["meteor"] = str(error)
    try:
        of_images["spice"] = np.array(spice_scores(tokenized, truth))
    except MissingExtraError as error:
        absent["spice"] = str(error)
    scores = {}
    for name, images in groups.items():
        bleus, _ = Bleu(4).compute_score({i: truth[i] for i in images}, {i: tokenized[i] for i in images}, verbose=0)
        means = {key: float(np.mean(values[list(images)])) for key, values in of_images.items()}
        one, two, three, four = map(float, bleus)
        scores[name] = CaptionScores(
            cider=means["cider"], bleu_1=one, bleu_2=two, bleu_3=three, bleu_4=four, rouge_l=means["rouge_l"],
            absent=dict(absent),
        )  # fmt: skip
        if name in meteors:
            scores[name]["meteor"] = meteors[name]
        if "spice" in means:
            scores[name]["spice"] = means["spice"]
    return scores
