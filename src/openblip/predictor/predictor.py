"""The calls of a loaded BLIP: caption, answer, match, search, judge, rank answers."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.generation.decoding import Beam, Decoding
from openblip.models.config import Head
from openblip.predictor import answering, captioning, judging
from openblip.predictor import dialogs as dialog_ranking
from openblip.predictor.batching import as_list
from openblip.predictor.blip_runtime import BlipRuntime
from openblip.predictor.calls import BasePredictor
from openblip.predictor.candidates import Candidates
from openblip.predictor.captioning import Prompts
from openblip.predictor.conversations import Dialog
from openblip.predictor.explaining import explain_image
from openblip.predictor.explanation import Explanation
from openblip.predictor.features import Features, extract_features
from openblip.predictor.images import Images, is_single
from openblip.predictor.judging import ImagePair
from openblip.predictor.scored_text import ScoredText
from openblip.predictor.writing import ANSWER_DECODING

_CALLS: dict[Head, tuple[str, ...]] = {
    "itc": ("similarity", "embed_images", "embed_texts"),
    "itm": ("match", "match_matrix"),
    "lm": ("caption",),
    "vqa": ("answer",),
    "nlvr": ("judge",),
    "visdial": ("rank_answers",),
}


class BlipPredictor(BlipRuntime, BasePredictor):
    """A BLIP ready for use."""

    answer_decoding: ClassVar[Beam] = ANSWER_DECODING

    @property
    def tasks(self) -> frozenset[str]:
        return frozenset(call for head in self.model.config.heads for call in _CALLS[head])

    @property
    def checkpoint(self) -> BlipCheckpoint:
        return BlipCheckpoint(self.model, self.tokenizer, self.preprocessing, self.prompt, self.encoder_token)

    def judge(
        self,
        images: ImagePair | Sequence[ImagePair],
        statements: str | Sequence[str],
        batch_size: int | None = None,
    ) -> Tensor:
        self._require("judge")
        return judging.judge_statements(self, images, statements, batch_size)

    def rank_answers(
        self,
        images: Images,
        captions: str | Sequence[str],
        dialogs: Dialog | Sequence[Dialog],
        candidates: Sequence[str] | Sequence[Sequence[str]],
        batch_size: int | None = None,
    ) -> Any:
        self._require("rank_answers")
        one = is_single(images)
        own: list[Any] = [[each] if one else each for each in (captions, dialogs, candidates)]
        found = dialog_ranking.rank_answers(self, images, own[0], own[1], own[2], batch_size)
        return found[0] if one else found

    def features(
        self,
        images: Images | None = None,
        texts: str | Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> Features:
        return extract_features(self, images, None if texts is None else as_list(texts), batch_size)

    def explain(self, image: Images, text: str | None = None, layer: int | None = None) -> Explanation:
        """Where in one image the model looked, for each word of a text.

        With a text that is for P(match), where the checkpoint has an ITM head; for the answer, where it
        answers questions; and otherwise for the text as a caption. Without, for the caption it writes itself.

        layer: of the text transformer, from 0 on; by default the one in the middle. In the last one the words
        of a match no longer count, only the first token. UnsupportedTaskError says which head is missing;
        ConfigError for a layer that is not there or a text without words.
        """
        return explain_image(self, image, text, layer)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "preprocessing": asdict(self.preprocessing),
            "prompt": self.prompt,
            "encoder_token": self.encoder_token,
        }

    def save_vocabularies(self, folder: Path) -> None:
        self.tokenizer.save(folder)

    def _write_captions(
        self,
        images: Images,
        prompt: Prompts,
        decoding: Decoding,
        num_captions: int,
        batch_size: int | None,
        seeds: Sequence[int] | None,
    ) -> list[list[ScoredText]]:
        return captioning.write_captions(
            self, images, prompt, decoding, num_captions=num_captions, batch_size=batch_size, seeds=seeds
        )

    def _write_answers(
        self, images: Images, questions: Sequence[str], decoding: Decoding, batch_size: int | None
    ) -> list[ScoredText]:
        return answering.write_answers(self, images, questions, decoding, batch_size)

    def _choose_answers(
        self,
        images: Images,
        questions: Sequence[str],
        candidates: Candidates,
        num_candidates: int,
        batch_size: int | None,
    ) -> list[ScoredText]:
        return answering.choose_answers(
            self, images, questions, candidates, num_candidates=num_candidates, batch_size=batch_size
        )
