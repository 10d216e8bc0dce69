"""The calls of a loaded BLIP-2: caption, answer, chat, match, search."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.generation.decoding import Beam, Decoding
from openblip.models.config import Blip2Head
from openblip.predictor import captioning, prompting
from openblip.predictor.batching import as_list
from openblip.predictor.blip2_explaining import explain_image
from openblip.predictor.blip2_features import extract_features
from openblip.predictor.blip2_runtime import Blip2Runtime
from openblip.predictor.calls import BasePredictor
from openblip.predictor.candidates import Candidates
from openblip.predictor.captioning import Prompts
from openblip.predictor.conversations import Conversation
from openblip.predictor.explanation import Explanation
from openblip.predictor.features import Features
from openblip.predictor.images import Images
from openblip.predictor.scored_text import ScoredText
from openblip.predictor.writing import LANGUAGE_ANSWER_DECODING

_CALLS: dict[Blip2Head, tuple[str, ...]] = {
    "itc": ("similarity", "embed_images", "embed_texts"),
    "itm": ("match", "match_matrix"),
    "itg": ("caption",),
    "llm": ("caption", "answer", "chat"),
}


class Blip2Predictor(Blip2Runtime, BasePredictor):
    """A BLIP-2 ready for use. Captions are the language model's, where there is one, else the Q-Former's.

    dtype is that of the image encoder and the language model; the Q-Former computes in float32.
    """

    answer_decoding: ClassVar[Beam] = LANGUAGE_ANSWER_DECODING

    @property
    def tasks(self) -> frozenset[str]:
        return frozenset(call for head in self.model.config.heads for call in _CALLS[head])

    @property
    def checkpoint(self) -> Blip2Checkpoint:
        return Blip2Checkpoint(
            self.model, self.tokenizer, self.preprocessing, self.prompt, self.question_prompt
        )

    def features(
        self,
        images: Images | None = None,
        texts: str | Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> Features:
        return extract_features(self, images, None if texts is None else as_list(texts), batch_size)

    def explain(self, image: Images, text: str | None = None, layer: int | None = None) -> Explanation:
        """Where in one image the queries looked, for each word.

        With a text that is for P(match), where the checkpoint has an ITM head; the text is a question, where
        there is a language model, and the words are the answer's; and otherwise for the text as a caption.
        Without, for the caption it writes itself.

        A word of a match looks where the queries look that it attends to; a word that is written, where more
        attention of the queries would make it likelier. layer: one of the Q-Former with cross-attention; by
        default the one in the middle. UnsupportedTaskError says which head is missing, or that the image
        encoder's tokens are no grid; ConfigError for a layer that is not there or a text without words.
        """
        return explain_image(self, image, text, layer)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "preprocessing": asdict(self.preprocessing),
            "prompt": self.prompt,
            "question_prompt": self.question_prompt,
        }

    def save_vocabularies(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        if self.model.language is not None:
            self.model.language.tokenizer.save_pretrained(folder / "language_model")

    def _write_captions(
        self,
        images: Images,
        prompt: Prompts,
        decoding: Decoding,
        num_captions: int,
        batch_size: int | None,
        seeds: Sequence[int] | None,
    ) -> list[list[ScoredText]]:
        write = captioning.write_captions if self.model.language is None else prompting.write_prompted
        return write(
            self, images, prompt, decoding, num_captions=num_captions, batch_size=batch_size, seeds=seeds
        )

    def _write_answers(
        self, images: Images, questions: Sequence[str], decoding: Decoding, batch_size: int | None
    ) -> list[ScoredText]:
        return prompting.write_answers(self, images, questions, decoding, batch_size)

    def _choose_answers(
        self,
        images: Images,
        questions: Sequence[str],
        candidates: Candidates,
        num_candidates: int,
        batch_size: int | None,
    ) -> list[ScoredText]:
        return prompting.choose_answers(
            self, images, questions, candidates, num_candidates=num_candidates, batch_size=batch_size
        )

    def _write_replies(
        self,
        images: Images,
        conversations: Sequence[Conversation],
        decoding: Decoding,
        batch_size: int | None,
    ) -> list[ScoredText]:
        return prompting.write_replies(self, images, conversations, decoding, batch_size)
