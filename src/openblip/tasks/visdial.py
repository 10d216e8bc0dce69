"""Visual dialog, VisDial: which of the candidates answers the question? (BLIP section 5.5)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.data.batch import DialogBatch
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.models.blip import Blip
from openblip.tasks.protocol import TrainingTask
from openblip.tasks.tokens import replace_first


class Visdial(TrainingTask):
    """A model with the head visdial, and the loss that trains it."""

    def __init__(self, model: Blip, tokenizer: Tokenizer, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.enc_id = tokenizer.enc_id

    def forward(self, batch: DialogBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss itm of a batch, a scalar: right against wrong answers, the dialog before them the same."""
        image_tokens = self.model.encode_image(self.preprocessing.normalize(batch.pixels))
        context_kv = self.model.dialog_kv(image_tokens, batch.captions.ids, batch.captions.mask)
        dialogs = replace_first(batch.dialogs, self.enc_id)
        logits = self.model.match_logits(dialogs.ids, dialogs.mask, context_kv)  # (B * K, 2)
        return {"itm": F.cross_entropy(logits.float(), batch.labels)}
