"""What goes into the calls of a predictor, checked and in batches, and the texts, scores and states that come out.

B images, videos or pairs, F frames of a video, N image tokens, Dv their width, S side of a prepared image, I images, T
texts, L text tokens, Q queries, D width of text states, E embedding width.
"""

import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openblip.data.images import FileInput, ImageInput, input_name
from openblip.errors import ConfigError
from openblip.files import hash_int
from openblip.generation.decoding import Decoding, Nucleus

DEFAULT_BATCH_SIZE = 64
MAX_ROWS = 512  # texts that the model reads at a time where many go with one image
USUAL_TOKENS = 64  # of such a text; of longer ones fewer are read at a time
MAX_TEXTS_PER_IMAGE = 64  # that `score_texts` reads in one pass; an image with more is read in several

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class EncodedImages:
    """Images or videos that a predictor has encoded; its calls take them as `images`."""

    tokens: Tensor  # (B, F * N, Dv), on the model's device; the tokens of a video's frames follow each other
    prepared: tuple[Tensor | int, ...]
    """Each prepared image or video, uint8 (3, S, S) or (F, 3, S, S), or its seed, which is made of it when needed."""
    num_frames: int = 1  # F

    def __len__(self) -> int:
        return len(self.prepared)

    @property
    def seeds(self) -> tuple[int, ...]:
        """A hash of each prepared image: what is sampled depends on the image and not on its place in a list."""
        different = {id(image): image for image in self.prepared}
        seeds = {
            name: image if isinstance(image, int) else hash_int(image.cpu().numpy().tobytes())
            for name, image in different.items()
        }
        return tuple(seeds[id(image)] for image in self.prepared)

    @classmethod
    def join(cls, parts: "Sequence[EncodedImages]") -> "EncodedImages":
        """The images of all parts, of which there is at least one, in order."""
        if len(parts) == 1:
            return parts[0]
        seeds = tuple(seed for part in parts for seed in part.seeds)  # so that the pixels need not be kept
        return cls(torch.cat([part.tokens for part in parts]), seeds, parts[0].num_frames)

    def select(self, index: Tensor) -> "EncodedImages":
        """The images that `index` (B') of int64 names, repeats allowed."""
        return replace(self, tokens=self.tokens[index], prepared=tuple(self.prepared[i] for i in index.tolist()))

    def part(self, rows: slice) -> "EncodedImages":
        """Consecutive images."""
        return replace(self, tokens=self.tokens[rows], prepared=self.prepared[rows])

    def beside(self, rows: slice) -> "EncodedImages":
        """The images of some rows of texts: those of the rows, or the only one, which goes with all texts."""
        return self if len(self) == 1 else self.part(rows)


Images = ImageInput | Iterable[ImageInput] | Tensor | EncodedImages
ListedImages = list[ImageInput] | Tensor | EncodedImages  # with a length; a tensor is what `prepare` returned
Videos = FileInput | Iterable[FileInput]
ImagePair = Iterable[ImageInput]  # left and right
ImagePairs = ImagePair | Iterable[ImagePair]
TextInput = str | Iterable[str]
Candidates = Iterable[str] | Iterable[Iterable[str]]  # texts for all questions or images, or a list for each
DialogInput = Sequence[str | tuple[str, str]]  # rounds, as (question, answer) or one string, then the open question
Dialogs = DialogInput | Iterable[DialogInput]
ConversationInput = str | Sequence[str | tuple[str, str]]  # turns as (question, answer), then the open question
Conversations = ConversationInput | Iterable[ConversationInput]
AnsweredQuestion = tuple[ImageInput, str, str]  # an image, a question about it, the answer
Rounds = tuple[list[tuple[str, str]], str]  # of a dialog or conversation: what was answered, and the open question
Seeds = Sequence[int] | None  # one for each image or text that `Nucleus` continues; None for the other strategies


def is_single(item: Any) -> bool:
    """Whether this is one image, video or text, or nothing of the kind, and not several."""
    if isinstance(item, np.ndarray | Tensor):
        is_numeric = isinstance(item, Tensor) or item.dtype.kind not in "OSU"  # else these are paths, say
        return item.ndim == 0 or (is_numeric and item.ndim < 4)
    if isinstance(item, str | os.PathLike | Image.Image | bytes | bytearray | memoryview | Mapping):
        return True
    return hasattr(item, "read") or not isinstance(item, Iterable | EncodedImages)


def as_list(items: Any) -> list[Any]:
    """One item or several, as a list."""
    return [items] if is_single(items) else list(items)


def as_texts(texts: Any, name: str) -> list[str]:
    """One text or several, as a list; ConfigError, which calls them `name`, for what is no text."""
    items = as_list(texts)
    for position, text in enumerate(items):
        if not isinstance(text, str):
            raise ConfigError(f"{name} {position} must be a string, not {type(text).__name__}: {text!r:.60}")
    return items


def as_lists_of_texts(texts: Any, num_images: int) -> list[list[str]]:
    """A list of texts for each image, from such lists or from texts for all images; ConfigError for what is no text."""
    items = as_list(texts)
    if items and all(isinstance(item, str) for item in items):
        return [items] * num_images
    return [as_texts(item, "text") for item in items]


def chunks(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    """Consecutive parts of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def batches(num_items: int, batch_size: int | None, images_per_item: int = 1) -> Iterator[slice]:
    """The rows of batches of about `batch_size` images, where an item is several of them (frames, a pair).

    None takes the default size. Raises ConfigError for a batch size that is no whole number from 1 on.
    """
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ConfigError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1.")
    size = max(1, (batch_size or DEFAULT_BATCH_SIZE) // images_per_item)
    for start in range(0, num_items, size):
        yield slice(start, min(start + size, num_items))


def texts_beside(call: str, items: Sized, texts: TextInput, kinds: tuple[str, str], is_one_item: bool) -> list[str]:
    """The texts that go with images, or with pairs of them; `kinds` is what errors call an item and a text. A text that
    is not in a list is repeated for all items; one item stays one for any number of texts.
    """
    item_kind, text_kind = kinds
    given = as_texts(texts, text_kind)
    if isinstance(texts, str):
        return given * len(items)
    if not is_one_item:
        advice = f" One {item_kind} or {text_kind} that is not in a list goes with all."
        check_equal(call, advice, **{f"{item_kind}s": items, f"{text_kind}s": given})
    return given


def check_equal(call: str, advice: str = "", **inputs: Sized) -> None:
    """ConfigError, which names the call, unless its inputs have equal lengths."""
    if len({len(values) for values in inputs.values()}) > 1:
        *names, last = inputs
        *counts, last_count = (f"{len(values)} {name}" for name, values in inputs.items())
        raise ConfigError(
            f"{call} takes equally many {', '.join(names)} and {last}: {', '.join(counts)} and {last_count} were given."
            + advice
        )


def name_or_position(item: Any, position: int, kind: str) -> str:
    """How errors call an image, pair or video (`kind`): by its path, or by its position in the list."""
    return input_name(item) or f"{kind} {position}"


def check_candidates(candidates: Candidates, num_questions: int) -> list[list[str]]:
    """The candidates of each question; ConfigError for none or the wrong number of lists."""
    items = as_list(candidates)
    if not items:
        raise ConfigError("answer: the list of candidates is empty; leave it out to have answers written.")
    lists = as_lists_of_texts(items, num_questions)
    if len(lists) != num_questions or not all(lists):
        raise ConfigError(
            f"answer: candidates are texts for all {num_questions} questions, or one list that is not empty "
            "for each of them."
        )
    return lists


def read_conversation(conversation: ConversationInput, position: int) -> Rounds:
    """The answered turns and the open question of a conversation; ConfigError for anything else."""
    *earlier, question = as_list(conversation) or [""]
    answered = [turn for turn in earlier if _is_round(turn)]
    if not isinstance(question, str) or not question.strip() or len(answered) != len(earlier):
        raise ConfigError(
            f"chat: conversation {position} is no list of (question, answer) pairs that ends with the open "
            "question, a string."
        )
    return answered, question.strip()


def read_dialog(dialog: DialogInput, position: int) -> Rounds:
    """The answered rounds and the open question of a dialog; ConfigError when there is no open question."""
    turns: list[Any] = [] if isinstance(dialog, str) else as_list(dialog)
    *earlier, question = turns or [None]
    if not isinstance(question, str) or not all(isinstance(turn, str) or _is_round(turn) for turn in earlier):
        raise ConfigError(
            f"rank_answers: dialog {position} is no list that ends with the open question, a string; before "
            "it stand earlier rounds, as (question, answer) or in one string each."
        )
    return [(turn, "") if isinstance(turn, str) else turn for turn in earlier], question


def _is_round(turn: object) -> TypeGuard[tuple[str, str]]:
    """Whether this is a question with its answer."""
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def read_pairs(images: ImagePairs) -> tuple[list[list[ImageInput]], bool]:
    """One pair of images or several pairs, as a list, and whether it was one; ConfigError for anything else."""
    given = as_list(images)
    if len(given) == 2 and all(is_single(image) for image in given):
        return [given], True
    pairs = [as_list(pair) for pair in given]
    for position, pair in enumerate(pairs):
        if len(pair) != 2 or not all(is_single(image) for image in pair):
            raise ConfigError(f"judge takes pairs (left, right) of images; item {position} is none.")
    return pairs, False


def sampling_seeds(decoding: Decoding, count: int, inputs: Callable[[], Iterable[object]]) -> Seeds:
    """`count` seeds from the strategy's seed and each input (an image's hash, a question), or fresh ones without a
    seed. Hashes take time, so `inputs` is called only where they are needed.
    """
    if not isinstance(decoding, Nucleus):
        return None
    if decoding.seed is None:
        return [secrets.randbits(63) for _ in range(count)]
    return [hash_int(f"{decoding.seed},{each}") for each in inputs()]


def group_by_count(owners: Sequence[int], lengths: Sequence[int]) -> list[Sequence[tuple[int, Sequence[int]]]]:
    """Groups of images with the rows of their texts, at most `MAX_ROWS` rows in each: in one pass the model reads
    the same number of texts of each image. Usually all images have the same number, and there is one group. Images with
    a text of more than `USUAL_TOKENS` are in groups of their own, with fewer rows.

    owners, lengths: of each row, its image, ascending, and the number of its tokens.
    """
    groups: dict[tuple[int, int], list[tuple[int, Sequence[int]]]] = defaultdict(list)
    for image, image_rows in groupby(range(len(owners)), key=owners.__getitem__):
        for part in chunks(list(image_rows), MAX_TEXTS_PER_IMAGE):
            longest = max(lengths[row] for row in part)
            times_longer = 1 << (-(-longest // USUAL_TOKENS) - 1).bit_length()  # 1, 2, 4, ...
            groups[len(part) * times_longer, len(part)].append((image, part))
    return [part for (rows, _), images in sorted(groups.items()) for part in chunks(images, max(1, MAX_ROWS // rows))]


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A caption or an answer with its log-probability under the model (natural logarithm)."""

    text: str
    logprob: float
    """Of the whole text: the sum of `token_logprobs`."""
    tokens: tuple[str, ...]
    """The word pieces as the vocabulary has them. The last one is the end ([SEP]), unless the text was cut off at its
    greatest length. In BLIP "##s" continues a word; language models have marks of their own ("Ġdog", "▁dog")."""
    token_logprobs: tuple[float, ...]
    """Of each of `tokens`, given those before it; `math.exp` turns one into a probability."""
    ids: tuple[int, ...]
    """The positions of `tokens` in the vocabulary."""
    has_end: bool
    """Whether the last of `tokens` is the end; else the text was cut off at its greatest length."""


def as_asked(texts: Sequence[ScoredText], return_scores: bool, single: bool) -> Any:
    """The texts with their scores, or as strings; the first alone where `single`."""
    results = list(texts) if return_scores else [text.text for text in texts]
    return results[0] if single else results


class TextScore(NamedTuple):
    """How well a text describes its image."""

    itm: float  # P(match) of the ITM head
    itc: float  # cosine of the ITC embeddings


class CaptionScore(NamedTuple):
    """How likely a given text is as the caption of its image."""

    logprob: float  # natural logarithm, the sum over the tokens with the end
    num_tokens: int  # with the end


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """States of the model, float32 on the CPU; None for what was not asked for or the model does not have.

    The first token stands for the whole image, and for the whole text. A text that is shorter than the longest is
    padded with zeros.
    """

    image: Tensor | None = None
    """(I, N, Dv), for videos (I, F * N, Dv): the class token, then the patches row by row."""
    queries: Tensor | None = None
    """BLIP-2: (I, Q, D), the output of the queries, which the language model reads after a projection."""
    image_projected: Tensor | None = None
    """(I, N, E), unit vectors in the space of ITC; the first is what `embed_images` returns. For BLIP-2 those of the
    queries, (I, Q, E), which are all that `embed_images` returns."""
    text: Tensor | None = None
    """(T, L, D), of texts that are read alone."""
    text_projected: Tensor | None = None
    """(T, L, E), unit vectors in the space of ITC; the first is what `embed_texts` returns."""
    text_mask: Tensor | None = None
    """bool (T, L), True at real tokens."""
    multimodal: Tensor | None = None
    """(B, L, D), each text read together with its image; for BLIP-2 the queries that read it, (B, Q, D)."""
