"""Visual dialog, VisDial: which of the candidates answers the question? (BLIP section 5.5) R rounds, C candidates."""

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from openblip.data.sample import Sample, Source
from openblip.data.texts import Round, open_rounds, text_field
from openblip.evaluation.run import run_evaluation
from openblip.metrics.ranking import answer_ranking, ndcg
from openblip.predictor import BasePredictor
from openblip.text_counts import count_texts, warn_caller

DIALOGS_PER_BATCH = 8  # of ten rounds each


@count_texts(warn_caller)
def evaluate_visdial(
    predictor: BasePredictor, source: Source, *, limit: int | None = None, batch_size: int | None = None
) -> dict[str, Any]:
    """Return MRR, R@k and mean rank of the right answers, NDCG where relevance is annotated, and all ranks.

    Every round that has candidates is ranked, after the true answers of the rounds before it. `results` is the list
    that VisDial's evaluation server takes: rounds and ranks count from 1. Raises `SourceError` when no sample can be
    used.
    """

    def predict(samples: list[Sample]) -> list[list[tuple[Round, list[float]]]]:
        """For each sample its rounds with P(right) of each candidate."""
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
        remaining = iter(scores)
        return [[(each, next(remaining).tolist()) for each in rounds_of_image] for rounds_of_image in rounds]

    def check_sample(sample: Sample) -> None:
        text_field(sample, "caption")
        open_rounds(sample)

    options: dict[str, Any] = {"limit": limit, "samples_per_batch": DIALOGS_PER_BATCH}
    run = run_evaluation(source, predict, label="ranking", check_sample=check_sample, **options)
    ranks = []
    for sample, dialog in run.pairs():
        for each, values in dialog:
            order = np.argsort(-np.array(values), kind="stable")  # of equal scores the first comes first
            own = {"round_id": each.number + 1, "ranks": (np.argsort(order) + 1).tolist()}
            ranks.append({"image_id": sample.info.get("image_id", sample.key), **own})
    ranked = [pair for dialog in run.results for pair in dialog]
    answered = [(values, each.answer_index) for each, values in ranked if each.answer_index is not None]
    judged = [(values, each.relevance) for each, values in ranked if each.relevance and any(each.relevance)]
    scores: dict[str, float] = {}
    if answered:
        of_rounds, index = zip(*answered, strict=True)
        scores |= answer_ranking(_filled_up(of_rounds, -np.inf), np.array(index))
    if judged:
        of_rounds, relevance = zip(*judged, strict=True)
        scores["ndcg"] = ndcg(_filled_up(of_rounds, -np.inf), _filled_up(relevance, 0.0))
    num_scored = sum(each.answer_index is not None or any(each.relevance or ()) for each, _ in ranked)
    counts = {"num_dialogs": len(run.results), "num_rounds": len(ranked), "num_scored": num_scored}
    return run.report(counts, scores, predictions=ranks, results=ranks)


def _filled_up(rows: Iterable[Iterable[float]], fill: float) -> NDArray[np.float64]:
    """(R, C) from rows of unequal length."""
    return np.array(list(zip_longest(*rows, fillvalue=fill)), dtype=np.float64).T
