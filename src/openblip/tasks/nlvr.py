"""Natural language visual reasoning, NLVR2: is a statement about two images true? (BLIP section 5.4)."""

from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.data.batch import StatementBatch
from openblip.data.readings import label_of, text_field
from openblip.data.sample import Sample, Source
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import SourceError
from openblip.models.blip import Blip
from openblip.tasks.protocol import TrainingTask
from openblip.tasks.tokens import replace_first
from openblip.tasks.walk import walk


class Nlvr(TrainingTask):
    """A model with the head nlvr, and the loss that trains it."""

    def __init__(self, model: Blip, tokenizer: Tokenizer, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.enc_id = tokenizer.enc_id

    def forward(self, batch: StatementBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss nlvr of a batch, a scalar: cross-entropy of true and false."""
        image_tokens = self.model.encode_pair(self.preprocessing.normalize(batch.pixels))  # (B, 2, N, D)
        statements = replace_first(batch.statements, self.enc_id)
        logits = self.model.judge_logits(
            statements.ids, statements.mask, self.model.image_kv(image_tokens, "encode")
        )
        return {"nlvr": F.cross_entropy(logits.float(), batch.labels)}


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
