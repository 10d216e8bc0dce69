"""Training a language model on text alone, before BLIP-2 freezes it, and examining what it has learned.

R texts, Dl width of the language model.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openblip.data.batch import TextBatch
from openblip.data.readings import answers_of, text_field
from openblip.data.sample import Sample, Source
from openblip.metrics.captioning import exact_match
from openblip.metrics.vqa import mean_vqa_accuracy, vqa_accuracy_by_type
from openblip.models.language_model import LanguageModel
from openblip.objectives.language_modeling import lm_loss
from openblip.tasks.captioning import references
from openblip.tasks.config import LanguagePretrainingConfig
from openblip.tasks.prefix_split import split_documents
from openblip.tasks.protocol import TrainingTask
from openblip.tasks.walk import walk

MAX_WRITTEN_TOKENS = 30


class LanguagePretraining(TrainingTask):
    """A language model and its loss: of all words, or of an encoder-decoder of what follows a prefix."""

    def __init__(self, language: LanguageModel, config: LanguagePretrainingConfig) -> None:
        super().__init__()
        self.language = language
        self.max_text_tokens = config.max_text_tokens

    def forward(self, batch: TextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm of a batch, a scalar."""
        pairs = list(zip(batch.prompts, batch.texts, strict=True))
        if self.language.is_encoder_decoder:
            pairs = split_documents(batch.texts, generator)
        prompts, texts = zip(*pairs, strict=True)
        nothing_seen = no_visual(self.language, len(texts))
        logits, labels = self.language.predict(nothing_seen, prompts, texts, self.max_text_tokens)
        return {"lm": lm_loss(logits, labels, label_smoothing=0.0)}


def no_visual(language: LanguageModel, num_rows: int) -> Tensor:
    """The visual prompts (R, 0, Dl) of texts without pictures."""
    return torch.zeros(num_rows, 0, language.hidden_dim, dtype=language.dtype, device=language.device)


class _Examined(NamedTuple):
    answer: str
    answers: list[str]
    kind: str
    caption: str
    references: list[str]


def evaluate_language(
    language: LanguageModel,
    source: Source,
    *,
    question_prompt: str = "Question: {} Answer:",
    caption_prompt: str = "a photo of",
    limit: int | None = None,
) -> dict[str, Any]:
    """How a language model answers and captions after a line that says all, which visual prompts can at best.

    `source` has documents of emoji scenes: samples with `context`, `question`, `answers`, `question_kind` and
    `references`. `answers` is VQA's accuracy, `captions` the share of true ones; both written greedily.

    Raises SourceError for a source without such samples.
    """

    def accept(sample: Sample) -> None:
        text_field(sample, "context")
        text_field(sample, "question")

    def write(samples: Sequence[Sample], prompt: str) -> list[str]:
        prompts = [f"{s.info['context']}\n{prompt.format(s.info['question'])}" for s in samples]
        visual = no_visual(language, len(prompts))
        rows = language.generate(visual, prompts, max_new_tokens=MAX_WRITTEN_TOKENS, do_sample=False)
        return [language.decode(row) for row in rows]

    def work(samples: list[Sample]) -> list[_Examined]:
        written = zip(samples, write(samples, question_prompt), write(samples, caption_prompt), strict=True)
        return [
            _Examined(answer, answers_of(s), str(s.info["question_kind"]), caption, references(s))
            for s, answer, caption in written
        ]

    was_training = language.training
    language.eval()
    results, rejects = walk(source, work, label="language", accept=accept, limit=limit)
    language.train(was_training)
    answers, truths = [r.answer for r in results], [r.answers for r in results]
    return {
        "num_texts": len(results),
        "answers": mean_vqa_accuracy(answers, truths),
        "answers_by_kind": vqa_accuracy_by_type(answers, truths, [r.kind for r in results]),
        "captions": exact_match([r.caption for r in results], [r.references for r in results]),
        "predictions": [r._asdict() for r in results],
        "rejects": [asdict(reject) for reject in rejects],
    }
