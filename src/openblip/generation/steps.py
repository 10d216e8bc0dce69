"""The steps of a search, one operation after the other or, on CUDA, recorded as a graph that one launch replays.

A step of BLIP-base is some hundred small operations, which the CPU launches more slowly than a GPU runs them. A graph
repeats them on the same memory. So recorded steps have tensors of their own, for one shape of texts; what a call
writes is copied into them, and when images leave a search, their number in this memory shrinks. A shape is recorded
when it comes for the second time, and a few are kept for each model.

A images, R texts.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Protocol, Self
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor, nn

from openblip.generation.decoding import Decoding, Nucleus
from openblip.models.decoder import CachedDecoder, tensors_of


class TextDecoder(Protocol):
    """The texts that a model is writing, R = A * K of A images, with what was read of them (`models.decoder`)."""

    def step(self, ids: Tensor, parents: Tensor | None = None) -> Tensor:
        """Read the next token of every text, ids int64 (R,), and return the logits (R, V), float32, for what follows.
        With parents, int64 (A, K), beam k of an image first becomes what its beam parents[k] was.
        """

    def select(self, images: Tensor) -> Self:
        """The texts of these images only, int64 (A')."""


@dataclass
class Steps:
    """Texts in the middle of a search, and their next steps."""

    decoder: Any
    """The `TextDecoder`."""
    state: Any
    """What was chosen: a tuple of tensors with one entry per image, `search.Samples` or `search.Beams`."""
    number: Tensor
    """int64 (1,): that of the last step, counted from 0."""
    decoding: Decoding
    eos_id: int

    def advance(self) -> None:
        """Let the decoder read the last token of every text, and choose the next one."""
        self.number.add_(1)
        logits = self.decoder.step(self.state.last.flatten(), self.state.parents)
        self.state = self.state.take(logits, self.number, self.decoding, self.eos_id)

    def select(self, images: Tensor | slice) -> "Steps":
        """The texts of these images: copies of those in int64 (A'), views of a slice."""
        number = self.number if isinstance(images, slice) else self.number.clone()
        return Steps(self.decoder.select(images), select_images(self.state, images), number, self.decoding, self.eos_id)

    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads or changes, except for the weights; for a `CachedDecoder`."""
        return [*self.decoder.tensors(), *tensors_of(self.state), self.number]


def select_images(state: Any, images: Tensor | slice) -> Any:
    """The state of these images: of a tensor, or of all in a tuple."""
    return state[images] if isinstance(state, Tensor) else type(state)(*(select_images(x, images) for x in state))


@contextmanager
def recorded(steps: Steps) -> Iterator[Steps]:
    """The same steps, recorded if they can be and their shape came before. Recorded steps are one thread's at a time;
    those of another thread meanwhile run one operation after the other.
    """
    if not _can_record(steps) or not _in_use.acquire(blocking=False):
        yield steps
        return
    try:
        yield _find_recorded(steps)
    finally:
        _in_use.release()


NUM_SHAPES = 4
"""Shapes of texts that are kept for each model."""
MEMORY_SHARE = 1 / 16
"""The most that one shape may take of the device's memory; more rows keep a GPU busy without a graph."""
_in_use = Lock()
_by_model: WeakKeyDictionary[nn.Module, OrderedDict[Any, "RecordedSteps | None"]] = WeakKeyDictionary()


def _can_record(steps: Steps) -> bool:
    """Whether a step is our own decoder's, on CUDA, does the same every time, and has not too much memory."""
    device = steps.number.device
    if device.type != "cuda" or not isinstance(steps.decoder, CachedDecoder):
        return False
    if steps.decoder.transformer.training or torch.is_autocast_enabled("cuda"):
        return False
    num_bytes = sum(x.numel() * x.element_size() for x in steps.tensors())
    return num_bytes <= MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory


def _find_recorded(steps: Steps) -> Steps:
    """The recorded steps of this shape and these weights, at the same point as `steps`; itself at the first time."""
    transformer = steps.decoder.transformer
    decoding = replace(steps.decoding, seed=None) if isinstance(steps.decoding, Nucleus) else steps.decoding
    key = (
        *(decoding, steps.eos_id, steps.decoder.samples),
        *((x.shape, x.dtype, x.device) for x in steps.tensors()),
        *(x.data_ptr() for x in (*transformer.parameters(), *transformer.buffers())),
    )
    shapes = _by_model.setdefault(transformer, OrderedDict())
    if key not in shapes:
        shapes[key] = None
        if len(shapes) > NUM_SHAPES:
            shapes.popitem(last=False)
        return steps
    shapes.move_to_end(key)
    memory = shapes[key] = shapes[key] or RecordedSteps(steps)
    return memory.load(steps)


class RecordedSteps:
    """Recorded steps of texts of one shape, at every number of images that it was asked for, in the same memory."""

    def __init__(self, steps: Steps) -> None:
        self._whole = steps.select(torch.arange(len(steps.state.last), device=steps.number.device))
        decoder = self._whole.decoder  # what belongs to a model does not keep it alive
        self._whole.decoder = replace(decoder, transformer=proxy(decoder.transformer))
        self._record = GraphRecorder(steps.number.device)
        self._parts: dict[int, Replayed | None] = {}  # None where recording failed

    def load(self, steps: Steps) -> Steps:
        """The recorded steps at the point of `steps`, in the memory of as many images; itself if recording fails."""
        num_images = len(steps.state.last)
        if num_images not in self._parts:
            part = self._whole.select(slice(num_images))
            try:
                replay = self._record(lambda: _advance_in_place(part), lambda: _copy(steps, part))
                self._parts[num_images] = Replayed(**vars(part), memory=proxy(self), replay=replay)
            except RuntimeError as error:
                self._parts[num_images] = None
                warnings.warn(f"Decoding goes on without a CUDA graph, which failed: {error}", stacklevel=2)
        replayed = self._parts[num_images]
        if replayed is None:
            return steps
        _copy(steps, replayed)
        return replayed


@dataclass
class Replayed(Steps):
    """Steps that are a graph."""

    memory: RecordedSteps
    replay: Callable[[], None]

    def advance(self) -> None:
        self.replay()

    def select(self, images: Tensor | slice) -> Steps:
        return self.memory.load(super().select(images))


def _advance_in_place(steps: Steps) -> None:
    """Take a step whose results stand where the state was before."""
    before = steps.state
    steps.advance()
    for old, new in zip(tensors_of(before), tensors_of(steps.state), strict=True):
        old.copy_(new)
    steps.state = before


def _copy(source: Steps, target: Steps) -> None:
    for old, new in zip(target.tensors(), source.tensors(), strict=True):
        old.copy_(new)


class GraphRecorder:
    """Records functions as CUDA graphs that are replayed one at a time, so that they may share what memory they need
    for the results of their operations.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None], reset: Callable[[], None]) -> Callable[[], None]:
        """What repeats `function` on the same tensors. reset: puts them back to where the function can be run."""
        current = torch.cuda.current_stream(self.device)
        try:
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):  # libraries allocate what they need at the first times
                for _ in range(2):
                    reset()
                    function()
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with work of their own.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                function()
        finally:
            torch.cuda.set_stream(current)  # which a failed recording does not do
        return graph.replay
