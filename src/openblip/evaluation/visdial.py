"""Visual dialog, VisDial, measured: which of the candidates answers the question? (BLIP section 5.5)."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from openblip.data.dialogs import open_rounds
from openblip.data.readings import text_field
from openblip.data.sample import Sample, Source
from openblip.evaluation.run import walk
from openblip.metrics.ranking import answer_ranking, ndcg


class DialogRanker(Protocol):
    """What dialogs need of a model."""

    def encode(self, images: Any, batch_size: int | None) -> Any: ...
    def rank_answers(
        self, images: Any, captions: Any, dialogs: Any, candidates: Any, *, batch_size: int | None
    ) -> list[Tensor]: ...


class _Ranked(NamedTuple):
    image_id: Any
    round_id: int
    """From 1, as the challenge counts."""
    scores: list[float]
    answer_index: int | None
    relevance: list[float] | None


def evaluate_visdial(
    model: DialogRanker, source: Source, *, limit: int | None = None, batch_size: int | None = None
) -> dict[str, Any]:
    """MRR, R@1/5/10 and mean rank of the right answers, NDCG where relevance is annotated, and all ranks.

    Every round that has candidates is ranked, behind the true answers of the rounds before it. `results` are
    what VisDial's server takes.
    """

    def work(samples: list[Sample]) -> list[list[_Ranked]]:
        rounds = [open_rounds(sample) for sample in samples]
        owners = [i for i, own in enumerate(rounds) for _ in own]
        encoded = model.encode([sample.image for sample in samples], batch_size)
        scores = iter(
            model.rank_answers(
                encoded.select(torch.tensor(owners)),
                [samples[i].info["caption"] for i in owners],
                [[*turn.history, turn.question] for own in rounds for turn in own],
                [turn.options for own in rounds for turn in own],
                batch_size=batch_size,
            )
        )
        return [
            [
                _Ranked(
                    sample.info.get("image_id", sample.key),
                    turn.number + 1,
                    next(scores).tolist(),
                    turn.answer_index,
                    turn.relevance,
                )
                for turn in own
            ]
            for sample, own in zip(samples, rounds, strict=True)
        ]

    def accept(sample: Sample) -> None:
        text_field(sample, "caption")
        open_rounds(sample)

    found, rejects = walk(source, work, label="ranking", accept=accept, limit=limit, at_once=8)
    ranked = [turn for dialog in found for turn in dialog]
    results = [
        {"image_id": turn.image_id, "round_id": turn.round_id, "ranks": _ranks(turn.scores)}
        for turn in ranked
    ]
    return {
        "num_dialogs": len(found),
        "num_rounds": len(ranked),
        "num_rejects": len(rejects),
        **_scores(ranked),
        "predictions": results,
        "results": results,
        "rejects": [asdict(reject) for reject in rejects],
    }


def _scores(ranked: Sequence[_Ranked]) -> dict[str, float]:
    answered = [turn for turn in ranked if turn.answer_index is not None]
    judged = [turn for turn in ranked if turn.relevance is not None and any(turn.relevance)]
    scores: dict[str, float] = {}
    if answered:
        index = np.array([turn.answer_index for turn in answered])
        scores |= answer_ranking(_filled([turn.scores for turn in answered], -np.inf), index)
    if judged:
        relevance = _filled([turn.relevance or [] for turn in judged], 0.0)
        scores["ndcg"] = ndcg(_filled([turn.scores for turn in judged], -np.inf), relevance)
    return scores


def _filled(rows: Sequence[Sequence[float]], fill: float) -> "np.ndarray[Any, Any]":
    """(R, C) of rows of unequal length."""
    longest = max(map(len, rows))
    return np.array([[*row, *[fill] * (longest - len(row))] for row in rows])


def _ranks(scores: Sequence[float]) -> list[int]:
    """The place of every candidate, from 1."""
    order = np.argsort(-np.array(scores), kind="stable")
    places = np.empty(len(scores), dtype=int)
    places[order] = np.arange(1, len(scores) + 1)
    found: list[int] = places.tolist()
    return found
