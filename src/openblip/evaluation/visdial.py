"""Visual dialog, VisDial: which of the candidates answers the question? (BLIP section 5.5).

R rounds, C candidates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from openblip.data.sample import Sample, Source
from openblip.data.texts import Round, open_rounds, text_field
from openblip.evaluation.run import run_evaluation
from openblip.metrics.ranking import answer_ranking, ndcg
from openblip.predictor import BasePredictor

DIALOGS_PER_BATCH = 8  # of ten rounds each


class _RankedRound(NamedTuple):
    round: Round
    scores: list[float]
    """P(right) of each candidate."""


def evaluate_visdial(
    predictor: BasePredictor, source: Source, *, limit: int | None = None, batch_size: int | None = None
) -> dict[str, Any]:
    """Return MRR, R@k and mean rank of the right answers, NDCG where relevance is annotated, and all ranks.

    Every round that has candidates is ranked, after the true answers of the rounds before it. `results` is
    the list that VisDial's evaluation server takes: rounds and ranks count from 1.

    Raises `SourceError` when no sample can be used.
    """

    def predict(samples: list[Sample]) -> list[list[_RankedRound]]:
        rounds = [open_rounds(sample) for sample in samples]
        flat = [(i, each) for i, rounds_of_image in enumerate(rounds) for each in rounds_of_image]
        images = predictor.encode([sample.image for sample in samples], batch_size)
        scores = predictor.rank_answers(
            images.select(torch.tensor([i for i, _ in flat])),
            [samples[i].info["caption"] for i, _ in flat],
            [[*each.history, each.question] for _, each in flat],
            [each.options for _, each in flat],
            batch_size=batch_size,
        )
        ranked: list[list[_RankedRound]] = [[] for _ in samples]
        for (i, each), of_round in zip(flat, scores, strict=True):
            ranked[i].append(_RankedRound(each, of_round.tolist()))
        return ranked

    def check_sample(sample: Sample) -> None:
        text_field(sample, "caption")
        open_rounds(sample)

    options: dict[str, Any] = {"limit": limit, "samples_per_batch": DIALOGS_PER_BATCH}
    run = run_evaluation(source, predict, label="ranking", check_sample=check_sample, **options)
    ranks = [
        {
            "image_id": sample.info.get("image_id", sample.key),
            "round_id": each.round.number + 1,
            "ranks": _ranks(each.scores),
        }
        for sample, dialog in run.pairs()
        for each in dialog
    ]
    ranked = [each for dialog in run.results for each in dialog]
    answered = [each for each in ranked if each.round.answer_index is not None]
    judged = [each for each in ranked if any(each.round.relevance or ())]
    scores: dict[str, float] = {}
    if answered:
        index = np.array([each.round.answer_index for each in answered])
        scores |= answer_ranking(_matrix([each.scores for each in answered], -np.inf), index)
    if judged:
        relevance = _matrix([each.round.relevance or [] for each in judged], 0.0)
        scores["ndcg"] = ndcg(_matrix([each.scores for each in judged], -np.inf), relevance)
    counts = {"num_dialogs": len(run.results), "num_rounds": len(ranked)}
    return run.report(counts, scores, predictions=ranks, results=ranks)


def _matrix(rows: Sequence[Sequence[float]], fill: float) -> NDArray[np.float64]:
    """(R, C) from rows of unequal length, the shorter ones filled up."""
    longest = max(map(len, rows))
    return np.array([[*row, *[fill] * (longest - len(row))] for row in rows])


def _ranks(scores: Sequence[float]) -> list[int]:
    """The rank of every candidate, from 1; of equal scores the first comes first."""
    order = np.argsort(-np.array(scores), kind="stable")
    ranks: list[int] = (np.argsort(order) + 1).tolist()
    return ranks
