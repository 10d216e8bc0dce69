"""Visual dialog, VisDial: which of the candidates answers the question? (BLIP section 5.5).

B examples, K answers of a dialog, T text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.data import texts
from openblip.data.batch import Batch, Example, SampleProcessor, shared_fields
from openblip.data.config import DataConfig
from openblip.data.sample import Sample
from openblip.data.tokenizer import BATCH_LENGTH_STEP, Tokenizer, Tokens
from openblip.errors import SourceError
from openblip.tasks.base import BlipTask, replace_first
from openblip.tasks.config import VisdialConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogBatch(Batch):
    """One round of each of B dialogs with K candidate answers."""

    captions: Tokens
    """(B, T): [CLS] ... [SEP]."""
    dialogs: Tokens
    """(B * K, T), each with another answer at its end; those of one dialog stand together."""
    labels: torch.Tensor
    """int64 (B * K,), 1 is the right answer."""


@dataclass(frozen=True, kw_only=True)
class DialogProcessor(SampleProcessor):
    """One round of a dialog, drawn at random, with its right answer and wrong ones out of its candidates."""

    num_negatives: int
    max_text_length: int

    def content(self, sample: Sample, rng: np.random.Generator) -> tuple[str, list[list[str]]]:
        """The caption, and the turns of the dialog with each answer."""
        rounds = [(turn, turn.answer) for turn in texts.open_rounds(sample) if turn.answer is not None]
        if not rounds:
            raise SourceError("no round with options and their right one")
        turn, right = rounds[int(rng.integers(len(rounds)))]
        same = texts.normalize_question(right)  # candidates of VisDial may differ by a period alone
        wrong = [text for text in turn.options if texts.normalize_question(text) != same]
        if not wrong:
            raise SourceError(f"round {turn.number} has no wrong answer among its options")
        drawn = rng.choice(len(wrong), self.num_negatives, replace=len(wrong) < self.num_negatives)
        answers = [right, *(wrong[i] for i in drawn)]
        dialogs = [texts.dialog_turns(turn.history, turn.question, answer) for answer in answers]
        return texts.normalize_caption(texts.text_field(sample, "caption")), dialogs

    def collate(self, examples: Sequence[Example], tokenizer: Tokenizer) -> DialogBatch:
        captions = [example.content[0] for example in examples]
        dialogs = [turns for example in examples for turns in example.content[1]]
        return DialogBatch(
            **shared_fields(examples),
            captions=tokenizer.encode(captions, self.max_text_length, BATCH_LENGTH_STEP),
            dialogs=tokenizer.encode_turns(dialogs, self.max_text_length, BATCH_LENGTH_STEP),
            labels=torch.tensor([1] + [0] * self.num_negatives).repeat(len(examples)),
        )


class Visdial(BlipTask):
    """A BLIP that tells right answers from wrong ones."""

    trained_heads = ("visdial",)

    @classmethod
    def sample_processor(cls, config: VisdialConfig, data: DataConfig, question_prompt: str) -> SampleProcessor:
        return DialogProcessor(num_negatives=config.num_negatives, max_text_length=data.max_text_length)

    def forward(self, batch: DialogBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss itm: cross-entropy of right and wrong answers after the same dialog."""
        image_tokens = self.model.encode_image(self.preprocessing.normalize(batch.pixels))
        context_kv = self.model.dialog_kv(image_tokens, batch.captions.ids, batch.captions.mask)
        dialogs = replace_first(batch.dialogs, self.tokenizer.enc_id)
        logits = self.model.match_logits(dialogs.ids, dialogs.mask, context_kv)  # (B * K, 2)
        return {"itm": F.cross_entropy(logits.float(), batch.labels)}
