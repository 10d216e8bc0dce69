"""A model in a process of its own, as a deployment of Ray Serve: calls in batches, and no image encoded twice.

`@serve.batch` joins the calls that wait, drops those whose client has gone away, and gives results back. It would close
a batch before the model is free for it, so that under load batches are of one call each; so calls wait at a gate while
the model works. Within a batch, calls that can be one are one call of the predictor.

I images, T texts.
"""

import asyncio
import hashlib
import logging
import threading
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from ray import serve
from torch import Tensor

import openblip
from openblip.data.images import read_image
from openblip.data.reader import num_cores
from openblip.errors import OpenBlipError
from openblip.predictor.base import BasePredictor
from openblip.predictor.values import EncodedImages


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """A call of the predictor: caption, answer, chat or explain; or one of two that are made of several: compare, which
    gives P(match) and similarity of all images with all texts, and embed, for images, texts or both.

    Of caption, answer and chat each row has an image and its own arguments.
    """

    name: str
    images: tuple[bytes, ...] = ()
    rows: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def can_join(self, other: "ModelCall") -> bool:
        """Whether this call and another can be one call of the predictor."""
        alike = self.name == other.name and self.rows.keys() == other.rows.keys() and self.settings == other.settings
        return alike and self.name != "explain"


@dataclass(frozen=True, kw_only=True)
class WorkerReply:
    """The result of a call, or why there is none, and what was done for it."""

    result: Any = None
    error: Exception | None = None
    batch_size: int = 1
    """Calls that were answered together."""
    num_cached: int = 0
    """Images that had been encoded before."""
    num_tokens: int = 0
    """Of the questions, turns or texts that the model has read."""


class CompareResult(NamedTuple):
    """What `compare` gives: of each image a number for each text, [I][T]; None where the model has no such head."""

    match: list[list[float]] | None
    similarity: list[list[float]] | None


class EmbedResult(NamedTuple):
    """What `embed` gives: (I, E), or (I, Q, E) of a model with queries, and (T, E); None for what was not given."""

    images: Tensor | None
    texts: Tensor | None


class EncodedImageCache:
    """The last encoded images by a hash of their files, at most `max_bytes` of their tokens; for several threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.entries: OrderedDict[bytes, EncodedImages] = OrderedDict()
        self.changing = threading.Lock()

    def get(self, name: bytes) -> EncodedImages | None:
        """The image, which is now the last used."""
        with self.changing:
            if name in self.entries:
                self.entries.move_to_end(name)
            return self.entries.get(name)

    def put(self, name: bytes, image: EncodedImages) -> None:
        """Keep an image, and let go of those that were not used for longest."""
        with self.changing:
            if name in self.entries:
                return
            self.entries[name] = image
            self.num_bytes += image.tokens.nbytes
            while self.num_bytes > self.max_bytes:
                _, oldest = self.entries.popitem(last=False)
                self.num_bytes -= oldest.tokens.nbytes


class PreparedCall(NamedTuple):
    """A call, the hashes of its images, and the pixels of those that were not in the cache when it came."""

    call: ModelCall
    names: list[bytes]
    pixels: dict[bytes, Any]


class ModelWorker:
    """A predictor that answers `ModelCall`s; its results do not depend on which calls come together."""

    def __init__(
        self,
        load: Mapping[str, Any],
        *,
        batch_size: int,
        batch_wait: float,
        cache_bytes: int,
        max_pixels: int,
        num_threads: int | None = None,
    ) -> None:
        """load: the arguments of `openblip.load`, with the name of the model as `source`. num_threads: of torch."""
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self.predictor: BasePredictor = openblip.load(**load)
        self.cache, self.max_pixels, self.batch_size = EncodedImageCache(cache_bytes), max_pixels, batch_size
        # The model does not wait for a thread behind images that are decoded, and always works in the same one.
        self.decoding, self.computing = ThreadPoolExecutor(num_cores()), ThreadPoolExecutor(1)
        self.id = uuid.uuid4().hex
        self.free = asyncio.Event()
        self.free.set()
        batch: Any = self._answer_batch
        batch.set_max_batch_size(batch_size)
        batch.set_batch_wait_timeout_s(batch_wait)

    async def stay(self, known: Collection[str]) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Give an id of this process and what `GET /models` says of the model, and then wait: the call fails when the
        process ends, which tells the one who waits for it at once. The call ends at once where `known` has the id.
        """
        if self.id in known:
            return
        predictor = self.predictor
        yield (
            self.id,
            {
                "tasks": sorted(predictor.tasks),
                "dtype": predictor.precision,
                "device": str(predictor.device),
                "num_parameters": predictor.num_parameters,
                "answer_decoding": predictor.answer_decoding,
            },
        )
        await asyncio.Event().wait()

    async def __call__(self, call: ModelCall) -> WorkerReply:
        """Answer a call, together with others that wait."""
        loop = asyncio.get_running_loop()
        try:
            prepared = await loop.run_in_executor(self.decoding, self.prepare, call)
        except OpenBlipError as error:
            return WorkerReply(error=error)
        while not self.free.is_set():
            await self.free.wait()
        reply: WorkerReply = await self._answer_batch(prepared)
        if not isinstance(reply.error, OpenBlipError | None):
            raise reply.error  # which no client could do anything about
        return reply

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def _answer_batch(self, calls: list[PreparedCall]) -> list[WorkerReply]:
        self.free.clear()
        try:
            return await asyncio.get_running_loop().run_in_executor(self.computing, self.answer, calls)
        finally:
            self.free.set()

    def prepare(self, call: ModelCall) -> PreparedCall:
        """Decode and resize the images of a call that are not in the cache. Raises ImageError."""
        names = [hashlib.sha256(image).digest() for image in call.images]
        pixels: dict[bytes, Any] = {}
        for position, (name, image) in enumerate(zip(names, call.images, strict=True)):
            if name not in pixels and self.cache.get(name) is None:
                pixels[name] = self._decode(image, position)
        return PreparedCall(call, names, pixels)

    def _decode(self, image: bytes, position: int) -> Any:
        decoded = read_image(image, name=f"image {position}", max_pixels=self.max_pixels)
        return self.predictor.preprocessing(decoded)

    def answer(self, calls: Sequence[PreparedCall]) -> list[WorkerReply]:
        """Answer calls, in as few calls of the predictor as can be."""
        encoded, num_cached = self._encode(calls)
        groups: list[list[int]] = []
        for position, each in enumerate(calls):
            joined = next((group for group in groups if calls[group[0]].call.can_join(each.call)), None)
            if joined is None:
                groups.append([position])
            else:
                joined.append(position)
        replies: list[WorkerReply] = [WorkerReply()] * len(calls)
        for group in groups:
            results = self._answer_group([calls[position] for position in group], encoded)
            for position, result in zip(group, results, strict=True):
                reply = WorkerReply(batch_size=len(calls), num_cached=num_cached[position])
                if isinstance(result, Exception):
                    replies[position] = replace(reply, error=result)
                else:
                    num_tokens = self._count_tokens(calls[position].call)
                    replies[position] = replace(reply, result=result, num_tokens=num_tokens)
        return replies

    def _encode(self, calls: Sequence[PreparedCall]) -> tuple[dict[bytes, EncodedImages], list[int]]:
        """All images by their hash, those that are new in batches; and how many of each call's were in the cache."""
        encoded: dict[bytes, EncodedImages] = {}
        new: dict[bytes, Any] = {}
        num_cached = []
        for call, names, pixels in calls:
            num_cached.append(0)
            for position, name in enumerate(names):
                if name in encoded or name in new:
                    continue
                if (known := self.cache.get(name)) is not None:
                    encoded[name] = known
                    num_cached[-1] += 1
                elif name in pixels:
                    new[name] = pixels[name]
                else:  # it left the cache while the call waited
                    new[name] = self._decode(call.images[position], position)
        if new:
            together = self.predictor.encode(self.predictor.stack(list(new.values())), self.batch_size)
            for row, (name, seed) in enumerate(zip(new, together.seeds, strict=True)):
                encoded[name] = EncodedImages(together.tokens[row : row + 1].clone(), (seed,))
                self.cache.put(name, encoded[name])
        return encoded, num_cached

    def _answer_group(self, calls: Sequence[PreparedCall], encoded: Mapping[bytes, EncodedImages]) -> list[Any]:
        """The results of calls that can be one; where that fails, each by itself, so that none fails for another."""
        others = {"compare": self._compare, "embed": self._embed, "explain": self._explain}
        try:
            answer: Callable[..., list[Any]] = others.get(calls[0].call.name, self._write)
            return answer(calls, encoded)
        except Exception as error:
            if len(calls) == 1:
                return [error]
            return [result for call in calls for result in self._answer_group([call], encoded)]

    def _write(self, calls: Sequence[PreparedCall], encoded: Mapping[bytes, EncodedImages]) -> list[Any]:
        """Captions, answers and replies in conversations: of each call a list, with one for each of its rows."""
        names = [name for each in calls for name in each.names]
        if not names:
            return [[] for _ in calls]
        first = calls[0].call
        arguments = dict(first.settings)
        for key in first.rows:
            arguments[key] = [value for each in calls for value in each.call.rows[key]]
        if "prompt" in arguments:
            own = self.predictor.prompt
            arguments["prompt"] = [own if prompt is None else prompt for prompt in arguments["prompt"]]
        distinct = {name: row for row, name in enumerate(dict.fromkeys(names))}
        images = EncodedImages.join([encoded[name] for name in distinct])
        images = images.select(torch.tensor([distinct[name] for name in names]))
        texts = iter(getattr(self.predictor, first.name)(images, **arguments))
        return [list(islice(texts, len(each.names))) for each in calls]

    def _compare(self, calls: Sequence[PreparedCall], encoded: Mapping[bytes, EncodedImages]) -> list[CompareResult]:
        """A `CompareResult` for each call; a text of an image is read once, however many calls have the two."""
        texts: dict[bytes, dict[str, None]] = {}  # of each image
        for call, names, _ in calls:
            for name in names:
                texts.setdefault(name, {}).update(dict.fromkeys(call.rows["texts"]))
        match, similarity = self._scores([encoded[name] for name in texts], list(map(list, texts.values())))

        def matrix(scores: list[list[float]] | None, each: PreparedCall) -> list[list[float]] | None:
            if scores is None:
                return None
            by_text = {n: dict(zip(texts[n], row, strict=True)) for n, row in zip(texts, scores, strict=True)}
            return [[by_text[name][text] for text in each.call.rows["texts"]] for name in each.names]

        return [CompareResult(matrix(match, each), matrix(similarity, each)) for each in calls]

    def _scores(self, images: Sequence[EncodedImages], texts: Sequence[list[str]]) -> CompareResult:
        """P(match) and cosine of each image with each of its texts; of these what the model has a head for."""
        predictor = self.predictor
        if images and {"match", "similarity"} <= predictor.tasks:
            scores = predictor.score_texts(EncodedImages.join(images), texts)
            return CompareResult([[s.itm for s in row] for row in scores], [[s.itc for s in row] for row in scores])

        def rows(call: Callable[[Any, list[str]], Tensor]) -> list[list[float]]:
            return [call(image, given)[0].tolist() for image, given in zip(images, texts, strict=True)]

        match = rows(predictor.match_matrix) if "match" in predictor.tasks else None
        return CompareResult(match, rows(predictor.similarity) if "similarity" in predictor.tasks else None)

    def _embed(self, calls: Sequence[PreparedCall], encoded: Mapping[bytes, EncodedImages]) -> list[EmbedResult]:
        """`EmbedResult` for each call; each image and each text once, however many calls have it."""
        names = {name: row for row, name in enumerate(dict.fromkeys(n for each in calls for n in each.names))}
        given = (text for each in calls for text in each.call.rows.get("texts", ()))
        texts = {text: row for row, text in enumerate(dict.fromkeys(given))}
        of_images = self.predictor.embed_images(EncodedImages.join([encoded[n] for n in names])) if names else None
        of_texts = self.predictor.embed_texts(list(texts)) if texts else None

        def rows(vectors: Tensor | None, places: Sequence[int]) -> Tensor | None:
            return None if vectors is None or not places else vectors[list(places)]

        return [
            EmbedResult(
                rows(of_images, [names[name] for name in each.names]),
                rows(of_texts, [texts[text] for text in each.call.rows.get("texts", ())]),
            )
            for each in calls
        ]

    def _explain(self, calls: Sequence[PreparedCall], encoded: Mapping[bytes, EncodedImages]) -> list[Any]:
        """The explanation of the only call."""
        ((call, (name,), _),) = calls
        return [self.predictor.explain(encoded[name], **call.settings)]

    def _count_tokens(self, call: ModelCall) -> int:
        """Tokens of what the model has read as a question, a conversation or a text."""
        if call.name == "chat":
            turns = [turn for conversation in call.rows["turns"] for turn in conversation]
            texts = [text for turn in turns for text in ((turn,) if isinstance(turn, str) else turn)]
            return sum(self.predictor.count_tokens(texts, "chat"))
        if call.name == "answer":
            return sum(self.predictor.count_tokens(call.rows["questions"], "answer"))
        if call.name == "embed" and call.rows.get("texts"):
            return sum(self.predictor.count_tokens(call.rows["texts"], "embed_texts"))
        return 0
