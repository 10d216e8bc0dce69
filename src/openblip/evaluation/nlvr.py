"""NLVR2: is a statement about two images true? (BLIP section 5.4)."""

from typing import Any

from openblip.data.sample import Sample, Source
from openblip.data.texts import label_of, text_field
from openblip.errors import SourceError
from openblip.evaluation.run import run_evaluation
from openblip.metrics.calibration import calibration_report
from openblip.predictor import BasePredictor
from openblip.text_counts import count_texts, warn_caller


@count_texts(warn_caller)
def evaluate_nlvr(
    predictor: BasePredictor, source: Source, *, limit: int | None = None, batch_size: int | None = None
) -> dict[str, Any]:
    """Return the accuracy of P(true) > 0.5 over statements about two images, with the predictions.

    `calibration` says how far P(true) is the share of true statements. Statements without a label are judged and not
    scored. Raises `SourceError` when no sample can be used.
    """

    def predict(samples: list[Sample]) -> list[float]:
        pairs: list[Any] = [(sample.image, sample.second_image) for sample in samples]
        statements = [sample.info["statement"] for sample in samples]
        return list(predictor.judge(pairs, statements, batch_size=batch_size).tolist())

    def check_sample(sample: Sample) -> None:
        text_field(sample, "statement")
        label_of(sample)
        if sample.second_image is None:
            raise SourceError("no second image")

    run = run_evaluation(source, predict, label="judging", check_sample=check_sample, limit=limit)
    rows = [
        {"statement": sample.info["statement"], "probability": probability, "label": sample.info.get("label")}
        for sample, probability in run.pairs()
    ]
    judged = [(row["probability"], row["label"]) for row in rows if row["label"] is not None]
    scores: dict[str, Any] = {}
    if judged:
        probabilities, labels = zip(*judged, strict=True)
        correct = [(probability > 0.5) == label for probability, label in judged]
        scores["accuracy"] = sum(correct) / len(correct)
        scores["calibration"] = calibration_report(probabilities, labels)
    counts = {"num_statements": len(rows), "num_scored": len(judged)}
    return run.report(counts, scores, predictions=run.named(rows))
