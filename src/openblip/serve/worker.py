"""A model in a process of its own, as a deployment of Ray Serve: calls in batches, and no image encoded twice.

`@serve.batch` joins the calls that wait, drops those whose client has gone away, and gives results back. It would close
a batch before the model is free for it, so that under load batches are of one call each; so calls wait at a gate while
the model works. Within a batch, calls of the same settings are one call of the predictor.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from ray import serve

import openblip
from openblip.data.images import read_image
from openblip.errors import OpenBlipError
from openblip.predictor.values import EncodedImages

MERGED = ("caption", "answer", "chat", "embed_images", "embed_texts")
"""Calls that give a result for each row of their arguments, so that several of them can be one."""


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """A call of the predictor. Of `MERGED` calls, each row has an image (where there are any) and its own arguments."""

    name: str
    images: tuple[bytes, ...] = ()
    rows: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """How many results it has."""
        return len(self.images) or max(map(len, self.rows.values()), default=0)

    @property
    def group(self) -> tuple[Any, ...]:
        """Equal for calls that can be one."""
        return (self.name, tuple(sorted(self.rows)), tuple(sorted(self.settings.items(), key=lambda item: item[0])))


@dataclass(frozen=True, kw_only=True)
class WorkerReply:
    """The result of a call, or why there is none, and what was done for it."""

    result: Any = None
    error: OpenBlipError | None = None
    batch_size: int = 1
    """Calls that were answered together."""
    num_cached: int = 0
    """Images that had been encoded before."""


class EncodedImageCache:
    """The last encoded images by a hash of their files, at most `max_bytes` of their tokens."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.entries: OrderedDict[bytes, EncodedImages] = OrderedDict()

    def get(self, name: bytes) -> EncodedImages | None:
        """The image, which is now the last used."""
        if name in self.entries:
            self.entries.move_to_end(name)
        return self.entries.get(name)

    def put(self, name: bytes, image: EncodedImages) -> None:
        """Keep an image, and let go of those that were not used for longest."""
        if name in self.entries:
            return
        self.entries[name] = image
        self.num_bytes += image.tokens.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self.entries.popitem(last=False)
            self.num_bytes -= oldest.tokens.nbytes


class ModelWorker:
    """A predictor that answers `ModelCall`s; its results do not depend on which calls come together."""

    def __init__(
        self, load: Mapping[str, Any], *, batch_size: int, batch_wait: float, cache_bytes: int, max_pixels: int
    ) -> None:
        """load: the arguments of `openblip.load`, with the name of the model as `source`."""
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self.predictor = openblip.load(**load)
        self.cache, self.max_pixels, self.batch_size = EncodedImageCache(cache_bytes), max_pixels, batch_size
        self.free = asyncio.Event()
        self.free.set()
        batch: Any = self._answer_batch
        batch.set_max_batch_size(batch_size)
        batch.set_batch_wait_timeout_s(batch_wait)

    async def describe(self) -> dict[str, Any]:
        """What `GET /models` says of the model."""
        predictor = self.predictor
        return {
            "tasks": sorted(predictor.tasks),
            "dtype": predictor.precision,
            "device": str(predictor.device),
            "num_parameters": predictor.num_parameters,
            "answer_decoding": predictor.answer_decoding,
        }

    async def stay(self) -> None:
        """Never answers: the call fails when this process ends, which tells the one who waits for it at once."""
        await asyncio.Event().wait()

    async def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens of the vocabulary these texts have."""
        return int(self.predictor._text_tokenizer().encode(list(texts), 512).mask.sum())

    async def __call__(self, call: ModelCall) -> WorkerReply:
        """Answer a call, together with others that wait."""
        names = [hashlib.sha256(image).digest() for image in call.images]
        new = {n: i for n, i in zip(names, call.images, strict=True) if self.cache.get(n) is None}
        try:
            pixels = dict(zip(new, await asyncio.to_thread(self._prepare, call.images, new), strict=True))
        except OpenBlipError as error:
            return WorkerReply(error=error)
        while not self.free.is_set():
            await self.free.wait()
        outcome: WorkerReply = await self._answer_batch((call, names, pixels))
        return outcome

    def _prepare(self, images: Sequence[bytes], new: Mapping[bytes, bytes]) -> list[Any]:
        """Decode and resize images that are not in the cache."""
        prepared = []
        for image in new.values():
            decoded = read_image(image, name=f"image {images.index(image)}", max_pixels=self.max_pixels)
            prepared.append(self.predictor.preprocessing(decoded))
        return prepared

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def _answer_batch(self, items: list[tuple[ModelCall, list[bytes], dict[bytes, Any]]]) -> list[WorkerReply]:
        self.free.clear()
        try:
            return await asyncio.to_thread(self.answer, items)
        finally:
            self.free.set()

    def answer(self, items: Sequence[tuple[ModelCall, list[bytes], dict[bytes, Any]]]) -> list[WorkerReply]:
        """Answer calls with the hashes of their images, and the pixels of those that may not be in the cache."""
        encoded, cached = self._encode(items)
        groups: list[list[int]] = []
        for position, (call, _, _) in enumerate(items):
            same = (g for g in groups if call.name in MERGED and items[g[0]][0].group == call.group)
            found = next(same, None)
            if found is None:
                groups.append([position])
            else:
                found.append(position)
        outcomes: list[WorkerReply] = [WorkerReply()] * len(items)
        for group in groups:
            results = self._answer_group([items[position][:2] for position in group], encoded)
            for position, result in zip(group, results, strict=True):
                about = {"batch_size": len(items), "num_cached": cached[position]}
                is_error = isinstance(result, OpenBlipError)
                outcomes[position] = WorkerReply(**{"error" if is_error else "result": result, **about})
        return outcomes

    def _encode(self, items: Sequence[tuple[Any, list[bytes], dict[bytes, Any]]]) -> tuple[dict[bytes, Any], list[int]]:
        """All images by their hash, those that are new in batches; and how many of each item's were in the cache."""
        encoded: dict[bytes, EncodedImages] = {}
        new: dict[bytes, Any] = {}
        cached = []
        for _, names, pixels in items:
            cached.append(0)
            for name in dict.fromkeys(names):
                if name in encoded or name in new:
                    continue
                if (known := self.cache.get(name)) is not None:
                    encoded[name] = known
                    cached[-1] += 1
                elif name in pixels:
                    new[name] = pixels[name]
                else:  # it left the cache while the call waited: it is encoded by itself
                    new[name] = self._prepare([], {name: self._file_of(items, name)})[0]
        if new:
            together = self.predictor.encode(self.predictor.stack(list(new.values())), self.batch_size)
            for row, (name, seed) in enumerate(zip(new, together.seeds, strict=True)):
                encoded[name] = EncodedImages(together.tokens[row : row + 1].clone(), (seed,))
                self.cache.put(name, encoded[name])
        return encoded, cached

    def _file_of(self, items: Sequence[tuple[Any, list[bytes], Any]], name: bytes) -> bytes:
        files = (file for call, names, _ in items for n, file in zip(names, call.images, strict=True) if n == name)
        return bytes(next(files))

    def _answer_group(
        self, calls: Sequence[tuple[ModelCall, list[bytes]]], encoded: Mapping[bytes, EncodedImages]
    ) -> list[Any]:
        """The results of calls that can be one; where that fails, each by itself, so that none fails for another."""
        first = calls[0][0]
        names = [name for _, image_names in calls for name in image_names]
        arguments = dict(first.settings)
        for key in first.rows:
            arguments[key] = [value for call, _ in calls for value in call.rows[key]]
        if "prompt" in arguments:
            own = self.predictor.prompt
            arguments["prompt"] = [own if prompt is None else prompt for prompt in arguments["prompt"]]
        if names:
            distinct = list(dict.fromkeys(names))
            images = EncodedImages.join([encoded[name] for name in distinct])
            arguments["images"] = images.select(torch.tensor([distinct.index(name) for name in names]))
        if first.name == "explain":
            arguments["image"] = arguments.pop("images")
        try:
            result = getattr(self.predictor, first.name)(**arguments)
        except OpenBlipError as error:
            if len(calls) == 1:
                return [error]
            return [result for call in calls for result in self._answer_group([call], encoded)]
        if len(calls) == 1:
            return [result]
        if isinstance(result, torch.Tensor):
            return list(result.split([call.num_rows for call, _ in calls]))
        rest = iter(result)
        return [list(islice(rest, call.num_rows)) for call, _ in calls]
