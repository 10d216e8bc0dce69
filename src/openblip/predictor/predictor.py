"""The calls of a loaded checkpoint: caption, answer, match, search, judge, rank answers.

B pairs, I images, T texts, C candidates, E embedding width.
"""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from openblip.checkpoints.loading import Format, save_as
from openblip.checkpoints.native import Checkpoint
from openblip.errors import UnsupportedTaskError
from openblip.generation.decoding import Decoding
from openblip.models.config import Head
from openblip.predictor import answering, captioning, judging, matching
from openblip.predictor import dialogs as dialog_ranking
from openblip.predictor.answering import Candidates
from openblip.predictor.batching import as_list
from openblip.predictor.dialogs import Dialog
from openblip.predictor.explaining import explain_image
from openblip.predictor.explanation import Explanation
from openblip.predictor.features import Features, extract_features
from openblip.predictor.images import Images, is_single
from openblip.predictor.judging import ImagePair
from openblip.predictor.runtime import Runtime
from openblip.predictor.writing import ANSWER_DECODING, CAPTION_DECODING

_CALLS: dict[Head, tuple[str, ...]] = {
    "itc": ("similarity", "embed_images", "embed_texts"),
    "itm": ("match", "match_matrix"),
    "lm": ("caption",),
    "vqa": ("answer",),
    "nlvr": ("judge",),
    "visdial": ("rank_answers",),
}


class Predictor(Runtime):
    """A checkpoint ready for use. Results do not depend on batch size, order or padding.

    `images` is one or a list of path, PIL.Image, encoded bytes or uint8 HxWx3 array; or what `prepare`,
    `encode` or `encode_videos` returned. `batch_size` is how many pictures are encoded at a time; a clip
    counts as its frames and a pair as two.

    Every call raises UnsupportedTaskError when the checkpoint has no weights for it, ImageError for a picture
    that cannot be read, by its name, and ConfigError when what it was given does not belong together.
    """

    @property
    def tasks(self) -> frozenset[str]:
        """The calls that this checkpoint has weights for."""
        return frozenset(call for head in self.model.config.heads for call in _CALLS[head])

    def caption(
        self,
        images: Images,
        prompt: str | None = None,
        decoding: Decoding = CAPTION_DECODING,
        num_captions: int = 1,
        batch_size: int | None = None,
        return_scores: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Any:
        """Captions: a string per image, or a list of `num_captions` strings if that is more than one.

        prompt: words the caption goes on from; None is the checkpoint's own, "" is none. The result is
        without it. return_scores: `ScoredText` objects instead of strings. seeds: one integer per image for
        `Nucleus`; by default they come from its seed and the picture.
        """
        self._require("caption")
        found = captioning.write_captions(
            self, images, prompt, decoding, num_captions=num_captions, batch_size=batch_size, seeds=seeds
        )
        several: list[list[Any]] = [
            list(captions) if return_scores else [caption.text for caption in captions] for captions in found
        ]
        results = [captions[0] for captions in several] if num_captions == 1 else several
        return results[0] if is_single(images) else results

    def answer(
        self,
        images: Images,
        questions: str | Sequence[str],
        candidates: Candidates | None = None,
        decoding: Decoding = ANSWER_DECODING,
        batch_size: int | None = None,
        return_scores: bool = False,
        num_candidates: int = 128,
    ) -> Any:
        """Answers, a string per question; questions go with images in pairs, or several with one image.

        candidates: texts to choose from, for all questions or a list for each, instead of writing freely: the
        `num_candidates` likeliest to begin the answer are compared by their whole log-probability.
        return_scores: `ScoredText` objects instead of strings.
        """
        self._require("answer")
        asked = as_list(questions)
        found = (
            answering.write_answers(self, images, asked, decoding, batch_size)
            if candidates is None
            else answering.choose_answers(
                self, images, asked, candidates, num_candidates=num_candidates, batch_size=batch_size
            )
        )
        results: list[Any] = list(found) if return_scores else [answer.text for answer in found]
        return results[0] if isinstance(questions, str) and is_single(images) else results

    def match(self, images: Images, texts: str | Sequence[str], batch_size: int | None = None) -> Tensor:
        """P(match) of each pair by ITM, float32 (B,) on the CPU."""
        self._require("match")
        return matching.match_pairs(self, images, texts, batch_size)

    def match_matrix(
        self, images: Images, texts: str | Sequence[str], batch_size: int | None = None
    ) -> Tensor:
        """P(match) of every image with every text by ITM, float32 (I, T) on the CPU."""
        self._require("match_matrix")
        return matching.match_matrix(self, images, texts, batch_size)

    def similarity(self, images: Images, texts: str | Sequence[str], batch_size: int | None = None) -> Tensor:
        """ITC cosine of every image with every text, float32 (I, T) on the CPU."""
        self._require("similarity")
        return self.embed_images(images, batch_size) @ self.embed_texts(texts, batch_size).T

    def embed_images(self, images: Images, batch_size: int | None = None) -> Tensor:
        """Unit vectors, float32 (I, E) on the CPU."""
        self._require("embed_images")
        return matching.embed_images(self, images, batch_size)

    def embed_texts(self, texts: str | Sequence[str], batch_size: int | None = None) -> Tensor:
        """Unit vectors, float32 (T, E) on the CPU."""
        self._require("embed_texts")
        return matching.embed_texts(self, texts, batch_size)

    def judge(
        self,
        images: ImagePair | Sequence[ImagePair],
        statements: str | Sequence[str],
        batch_size: int | None = None,
    ) -> Tensor:
        """P(true) of each statement about its pair of images, float32 (B,) on the CPU.

        images: one (left, right) pair or a list of them.
        """
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
        """P(right) of every candidate answer: for each image a tensor, float32 (C,) on the CPU.

        Each image has a caption, a dialog and a list of candidates of its own; with one image they are not
        in lists. A dialog is a list of the earlier rounds, each as (question, answer) or in one string, and
        last the open question.
        """
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
        """The states behind the heads: of images, of texts, or of pairs of both, then also read together.

        UnsupportedTaskError says which head is missing for what was asked.
        """
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

    def save(self, folder: str | os.PathLike[str], format: Format = "openblip") -> None:
        """Write a checkpoint that `load` reads; "huggingface": that transformers reads as well; "original": a
        file (.pth) as the released code has them.

        Raises CheckpointError when the format has no place for these heads.
        """
        checkpoint = Checkpoint(
            self.model, self.tokenizer, self.preprocessing, self.prompt, self.encoder_token
        )
        save_as(checkpoint, folder, format)

    def _require(self, call: str) -> None:
        if call not in self.tasks:
            raise UnsupportedTaskError(
                f"This checkpoint has no weights to {call}; it can do {', '.join(sorted(self.tasks))}."
            )
