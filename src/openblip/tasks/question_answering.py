"""Visual question answering, of images and of clips: training and evaluation (BLIP sections 5.3 and 5.6)."""

import torch
from torch import Tensor

from openblip.data.batch import QuestionBatch
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.models.blip import Blip
from openblip.objectives.language_modeling import answer_loss, next_token_labels
from openblip.tasks.config import QuestionAnsweringConfig
from openblip.tasks.media import encode_media
from openblip.tasks.protocol import TrainingTask
from openblip.tasks.tokens import replace_first


class QuestionAnswering(TrainingTask):
    """A model with the head vqa, and the loss that trains it."""

    def __init__(
        self,
        model: Blip,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        config: QuestionAnsweringConfig,
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.label_smoothing = config.label_smoothing
        self.enc_id, self.dec_id = tokenizer.enc_id, tokenizer.dec_id

    def forward(self, batch: QuestionBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss vqa of a batch, a scalar: every answer of a question counts by its weight."""
        image_tokens = encode_media(self.model, self.preprocessing.normalize(batch.pixels))
        questions = replace_first(batch.questions, self.enc_id)
        question_kv = self.model.question_kv(
            questions.ids, questions.mask, self.model.image_kv(image_tokens, "encode")
        )
        answers = replace_first(batch.answers, self.dec_id)
        logits = self.model.decode(answers.ids[:, :-1], question_kv.select(batch.owners))  # (A, T, V)
        labels = next_token_labels(answers.ids, answers.mask)
        vqa = answer_loss(logits, labels, batch.weights, len(batch), self.label_smoothing)
        return {"vqa": vqa}
