"""The calls that BLIP and BLIP-2 have in common: one or many, batches, scores, and what a checkpoint can do.

B pairs, I images, T texts, C candidates, Q queries, E embedding width.
"""

import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from openblip.checkpoints.checkpoint import Checkpoint
from openblip.checkpoints.loading import Format, save_checkpoint
from openblip.errors import CheckpointError, ConfigError, UnsupportedTaskError
from openblip.generation.decoding import Beam, Decoding
from openblip.models.blip import similarity_matrix, similarity_of_pairs
from openblip.predictor import matching
from openblip.predictor.batching import MAX_ROWS, as_list, chunks
from openblip.predictor.candidates import Candidates
from openblip.predictor.captioning import Prompts
from openblip.predictor.conversations import Conversation, Dialog
from openblip.predictor.explanation import Explanation
from openblip.predictor.features import Features
from openblip.predictor.images import EncodedImages, Images, is_single, listed
from openblip.predictor.judging import ImagePair
from openblip.predictor.runtime import Runtime
from openblip.predictor.scored_text import ScoredText, TextScore
from openblip.predictor.writing import CAPTION_DECODING, CHAT_DECODING

MAX_TEXTS_PER_IMAGE = 64
"""Texts of one image that `score_texts` reads in one pass; an image with more is read in several."""


class BasePredictor(Runtime):
    """A checkpoint ready for use. Results do not depend on batch size, order or padding.

    `images` is one or a list of path, PIL.Image, encoded bytes or uint8 HxWx3 array; or what `prepare`,
    `encode` or `encode_videos` returned. `batch_size` is how many pictures are encoded at a time; a clip
    counts as its frames and a pair as two.

    Every call raises UnsupportedTaskError when the checkpoint has no weights for it, ImageError for a picture
    that cannot be read, by its name, and ConfigError when what it was given does not belong together.
    """

    answer_decoding: ClassVar[Beam]
    """How answers are written unless the caller says otherwise."""

    @property
    @abstractmethod
    def tasks(self) -> frozenset[str]:
        """The calls that this checkpoint has weights for."""

    @property
    @abstractmethod
    def checkpoint(self) -> Checkpoint:
        """What `save` writes."""

    def caption(
        self,
        images: Images,
        prompt: Prompts = None,
        decoding: Decoding = CAPTION_DECODING,
        num_captions: int = 1,
        batch_size: int | None = None,
        return_scores: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Any:
        """Captions: a string per image, or a list of `num_captions` strings if that is more than one.

        prompt: words the caption goes on from, for all images or in a list one for each; None is the
        checkpoint's own, "" is none. The result is without it. With a language model the prompt may be any
        instruction. return_scores: `ScoredText` objects instead of strings. seeds: one integer per image for
        `Nucleus`; by default they come from its seed and the picture.
        """
        self._require("caption")
        with torch.inference_mode():
            found = self._write_captions(images, prompt, decoding, num_captions, batch_size, seeds)
        several = [_as_asked(captions, return_scores) for captions in found]
        results = [captions[0] for captions in several] if num_captions == 1 else several
        return results[0] if is_single(images) else results

    def answer(
        self,
        images: Images,
        questions: str | Sequence[str],
        candidates: Candidates | None = None,
        decoding: Decoding | None = None,
        batch_size: int | None = None,
        return_scores: bool = False,
        num_candidates: int = 128,
    ) -> Any:
        """Answers, a string per question; questions go with images in pairs, or several with one image.

        candidates: texts to choose from, for all questions or a list for each, instead of writing freely: the
        `num_candidates` likeliest to begin the answer are compared by their whole log-probability. decoding:
        by default `answer_decoding`. return_scores: `ScoredText` objects instead of strings.
        """
        self._require("answer")
        asked = as_list(questions)
        with torch.inference_mode():
            found = (
                self._write_answers(images, asked, decoding or self.answer_decoding, batch_size)
                if candidates is None
                else self._choose_answers(images, asked, candidates, num_candidates, batch_size)
            )
        results = _as_asked(found, return_scores)
        return results[0] if isinstance(questions, str) and is_single(images) else results

    def chat(
        self,
        images: Images,
        turns: Conversation | Sequence[Conversation],
        decoding: Decoding = CHAT_DECODING,
        batch_size: int | None = None,
        return_scores: bool = False,
    ) -> Any:
        """What the model replies, a string for each image.

        turns: the conversation about the image: (question, answer) pairs, and last the open question; a
        question alone begins one. For a list of images a list of conversations. The language model reads all
        of it: "Question: ... Answer: .... Question: ... Answer:", in the words of the checkpoint's
        `question_prompt`. return_scores: `ScoredText` objects instead of strings.
        """
        self._require("chat")
        one = is_single(images)
        conversations: list[Any] = [turns] if one else list(turns)
        with torch.inference_mode():
            found = self._write_replies(images, conversations, decoding, batch_size)
        replies = _as_asked(found, return_scores)
        return replies[0] if one else replies

    def judge(
        self,
        images: ImagePair | Sequence[ImagePair],
        statements: str | Sequence[str],
        batch_size: int | None = None,
    ) -> Tensor:
        """P(true) of each statement about its pair of images, float32 (B,) on the CPU.

        images: one (left, right) pair or a list of them.
        """
        raise self._unable("judge")

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
        raise self._unable("rank_answers")

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

    @torch.inference_mode()
    def score_texts(
        self, images: Images, texts: Sequence[Sequence[str]], batch_size: int | None = None
    ) -> list[list[TextScore]]:
        """ITM and ITC of the texts of each image; the image is encoded and projected once for all of them.

        texts: a list for each image, of any and different lengths. An empty text describes nothing: it is not
        shown to the model and scores 0. Raises CheckpointError when a score is not a number.
        """
        self._require("match")
        self._require("similarity")
        images = listed(images)
        if len(images) != len(texts):
            raise ConfigError(
                f"score_texts takes a list of texts for each image: {len(images)} images and {len(texts)} "
                "lists were given."
            )
        scores: list[list[TextScore]] = []
        for rows, encoded in self.encoded_batches(images, batch_size):
            scores += self._score_batch(encoded, texts[rows])
        return scores

    def _score_batch(self, images: EncodedImages, texts: Sequence[Sequence[str]]) -> list[list[TextScore]]:
        flat = [text for own in texts for text in own]  # R
        owners = [image for image, own in enumerate(texts) for _ in own]
        scored = [row for row, text in enumerate(flat) if text.strip()]
        itm, itc = torch.zeros(len(flat)), torch.zeros(len(flat))
        if scored:
            image_kv = self.image_kv(images.tokens, "encode")
            for group in _equal_counts(scored, owners):
                rows = [row for _, own in group for row in own]
                tokens = self.tokenize([flat[row] for row in rows], self.encoder_id)
                places = [image for image, _ in group]
                alone = places != list(range(len(texts)))  # the usual case is all: no copy of keys and values
                kv = image_kv.select(torch.tensor(places, device=self.device)) if alone else image_kv
                itm[rows] = matching.match_probability(self, tokens, kv)
            image_vectors = self.embed_images(images)[[owners[row] for row in scored]]  # (R, E) or (R, Q, E)
            text_vectors = self.embed_texts([flat[row] for row in scored], MAX_ROWS)
            itc[scored] = similarity_of_pairs(image_vectors, text_vectors)
        if not (itm.isfinite().all() and itc.isfinite().all()):
            raise CheckpointError("The scores are not numbers (NaN or infinite): the weights are broken.")
        pairs = iter(zip(itm.tolist(), itc.tolist(), strict=True))
        return [[TextScore(*next(pairs)) for _ in own] for own in texts]

    def similarity(self, images: Images, texts: str | Sequence[str], batch_size: int | None = None) -> Tensor:
        """ITC cosine of every image with every text, float32 (I, T) on the CPU; BLIP-2: of the best query."""
        self._require("similarity")
        return similarity_matrix(self.embed_images(images, batch_size), self.embed_texts(texts, batch_size))

    def embed_images(self, images: Images, batch_size: int | None = None) -> Tensor:
        """Unit vectors, float32 on the CPU: (I, E), of BLIP-2 one for each query, (I, Q, E)."""
        self._require("embed_images")
        return matching.embed_images(self, images, batch_size)

    def embed_texts(self, texts: str | Sequence[str], batch_size: int | None = None) -> Tensor:
        """Unit vectors, float32 (T, E) on the CPU."""
        self._require("embed_texts")
        return matching.embed_texts(self, texts, batch_size)

    @abstractmethod
    def features(
        self,
        images: Images | None = None,
        texts: str | Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> Features:
        """The states behind the heads: of images, of texts, or of pairs of both, then also read together.

        UnsupportedTaskError says which head is missing for what was asked.
        """

    @abstractmethod
    def explain(self, image: Images, text: str | None = None, layer: int | None = None) -> Explanation:
        """Where in one image the model looked, for each word of a text."""

    def save(self, folder: str | os.PathLike[str], format: Format = "openblip") -> None:
        """Write a checkpoint that `load` reads; "huggingface": that transformers reads as well; "original": a
        file (.pth) as the released code has them.

        Raises CheckpointError when the format has no place for these heads.
        """
        save_checkpoint(self.checkpoint, folder, format)

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What besides weights and vocabularies decides the results, ready for json."""

    @abstractmethod
    def save_vocabularies(self, folder: Path) -> None:
        """Write a tokenizer.json for each vocabulary into the folder or one in it."""

    @abstractmethod
    def _write_captions(
        self,
        images: Images,
        prompt: Prompts,
        decoding: Decoding,
        num_captions: int,
        batch_size: int | None,
        seeds: Sequence[int] | None,
    ) -> list[list[ScoredText]]:
        """`num_captions` per image."""

    @abstractmethod
    def _write_answers(
        self, images: Images, questions: Sequence[str], decoding: Decoding, batch_size: int | None
    ) -> list[ScoredText]:
        """One per question."""

    @abstractmethod
    def _choose_answers(
        self,
        images: Images,
        questions: Sequence[str],
        candidates: Candidates,
        num_candidates: int,
        batch_size: int | None,
    ) -> list[ScoredText]:
        """The most likely candidate for each question."""

    def _write_replies(
        self,
        images: Images,
        conversations: Sequence[Conversation],
        decoding: Decoding,
        batch_size: int | None,
    ) -> list[ScoredText]:
        """One per conversation."""
        raise self._unable("chat")

    def _require(self, call: str) -> None:
        if call not in self.tasks:
            raise self._unable(call)

    def _unable(self, call: str) -> UnsupportedTaskError:
        return UnsupportedTaskError(
            f"This checkpoint has no weights to {call}; it can do {', '.join(sorted(self.tasks))}."
        )


def _as_asked(texts: Sequence[ScoredText], return_scores: bool) -> list[Any]:
    """With their scores, or the strings alone."""
    return list(texts) if return_scores else [text.text for text in texts]


def _equal_counts(rows: Sequence[int], owners: Sequence[int]) -> list[list[tuple[int, list[int]]]]:
    """Groups texts for the model, which reads equally many of each image in one pass.

    A group holds images with the rows of their texts, at most `MAX_ROWS` rows together. Usually all images
    have the same number of texts, and this is one group.
    """
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        rows_of[owners[row]].append(row)
    by_count: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for image, own in rows_of.items():
        for part in chunks(own, MAX_TEXTS_PER_IMAGE):
            by_count[len(part)].append((image, list(part)))
    return [
        list(part)
        for count, images in sorted(by_count.items())
        for part in chunks(images, max(1, MAX_ROWS // count))
    ]
