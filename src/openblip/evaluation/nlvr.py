"""NLVR2, measured: is a statement about two images true? (BLIP section 5.4)."""

from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from openblip.data.readings import label_of, text_field
from openblip.data.sample import Sample, Source
from openblip.errors import SourceError
from openblip.evaluation.run import walk


class Judge(Protocol):
    """What statements need of a model."""

    def judge(self, images: Any, statements: Any, *, batch_size: int | None) -> Tensor: ...


class _Judged(NamedTuple):
    name: dict[str, Any]
    probability: float
    label: bool | None


def evaluate_nlvr(
    model: Judge, source: Source, *, limit: int | None = None, batch_size: int | None = None
) -> dict[str, Any]:
    """Accuracy of P(true) > 0.5 over statements about two pictures, with the predictions.

    Statements without a label are judged and not scored.
    """

    def work(samples: list[Sample]) -> list[_Judged]:
        pairs = [(sample.image, sample.second_image) for sample in samples]
        statements = [sample.info["statement"] for sample in samples]
        true: list[float] = model.judge(pairs, statements, batch_size=batch_size).tolist()
        return [_Judged(_named(s), p, s.info.get("label")) for s, p in zip(samples, true, strict=True)]

    found, rejects = walk(source, work, label="judging", accept=_check, limit=limit)
    right = [(row.probability > 0.5) == row.label for row in found if row.label is not None]
    return {
        "num_statements": len(found),
        "num_rejects": len(rejects),
        **({"accuracy": sum(right) / len(right)} if right else {}),
        "predictions": [{**row.name, "probability": row.probability, "label": row.label} for row in found],
        "rejects": [asdict(reject) for reject in rejects],
    }


def _named(sample: Sample) -> dict[str, Any]:
    return {"shard": sample.shard, "key": sample.key, "statement": sample.info["statement"]}


def _check(sample: Sample) -> None:
    text_field(sample, "statement")
    label_of(sample)
    if sample.second_image is None:
        raise SourceError("no second picture")
