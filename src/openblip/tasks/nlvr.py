"""Natural language visual reasoning, NLVR2: is a statement about two images true? (BLIP section 5.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.data.batch import StatementBatch
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.models.blip import Blip
from openblip.tasks.protocol import TrainingTask
from openblip.tasks.tokens import replace_first


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
