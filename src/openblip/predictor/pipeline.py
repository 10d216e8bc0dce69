"""`openblip.pipeline`: the pipelines of transformers 4 for images and texts, with the same arguments and results.

transformers 5 removed two of them, `image-to-text` and `visual-question-answering`. Code that was written for them
runs with the import changed. N image tokens, D width.
"""

import os
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, get_args

import torch
from PIL import Image

from openblip.checkpoints.backbones import Quantization
from openblip.data.images import ImageInput
from openblip.errors import ConfigError, ImageError, UnsupportedTaskError
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus
from openblip.predictor import load
from openblip.predictor.base import BasePredictor
from openblip.predictor.blip import BlipPredictor

MAX_NEW_TOKENS = 20
"""What BLIP's configurations say, and transformers 4 follows for them."""
SAMPLED_TOP_K = 50  # transformers samples from so many tokens when nothing is said
_SHORTEST_BASE64 = 64  # of an image; shorter texts are paths
_PAGE = "migration.md#pipelines-of-transformers-4"  # of the documentation
LOADING = {
    "config": "the checkpoint has its own",
    "feature_extractor": "the checkpoint says how images are prepared",
    "image_processor": "the checkpoint says how images are prepared",
    "processor": "the checkpoint says how images and texts are prepared",
    "revision": "download that revision and give its folder as model",
    "token": "log in with `hf auth login` or set HF_TOKEN",
    "use_auth_token": "log in with `hf auth login` or set HF_TOKEN",
    "pipeline_class": "the task decides",
}
"""Arguments of transformers that cannot be given, and what to do in place of them."""
WITHOUT_EFFECT = ("framework", "use_fast", "trust_remote_code", "device_map", "num_workers")
"""Arguments of transformers that change no result here: there is one framework, and no code is ever downloaded."""


class Pipeline:
    """A model with the call of one task. `model` is the predictor, with all its other calls.

    An image is a path, an http(s) URL, a data URI or base64, a `PIL.Image`, encoded bytes or an array. A call with one
    input returns its result; with a list, a list of results; with a generator or a data set, a generator, which reads
    its input batch by batch.
    """

    task: str
    needed: frozenset[str] = frozenset()
    """What the checkpoint must be able to do."""
    options: frozenset[str]
    """Arguments of the call, which `pipeline` takes as well, as defaults."""
    run: Callable[..., list[Any]]
    """Of a list of inputs and the options of the call: a list of results."""

    def __init__(self, model: BasePredictor, batch_size: int | None, defaults: Mapping[str, Any]) -> None:
        self.model, self.batch_size = model, batch_size
        if missing := self.needed - model.tasks:
            raise UnsupportedTaskError(
                f"{self.task} needs a checkpoint that can {', '.join(sorted(missing))}; this one can "
                f"{', '.join(sorted(model.tasks))}. `openblip models` lists checkpoints and what they are for."
            )
        self.defaults = self._checked(defaults)

    def _call(self, inputs: Any, options: Mapping[str, Any]) -> Any:
        chosen = {**self.defaults, **self._checked(options)}
        size, timeout = chosen.pop("batch_size", self.batch_size), chosen.pop("timeout", None)

        def run(items: Iterable[Any]) -> list[Any]:
            return self.run([_opened(item, timeout) for item in items], batch_size=size, **chosen)

        if isinstance(inputs, list | tuple):
            return run(inputs)
        if isinstance(inputs, Iterator) or _is_data_set(inputs):
            return _in_batches(inputs, size or 1, run)
        return run([inputs])[0]

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        known = self.options | {"batch_size", "timeout"}
        given = {name: value for name, value in options.items() if name not in WITHOUT_EFFECT}
        if unknown := sorted(given.keys() - known):
            raise ConfigError(f"{self.task}: no argument {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        return given


class ImageToText(Pipeline):
    """Captions. `prompt`: words that a BLIP's caption begins with, which the result repeats; what a BLIP-2 is asked."""

    task, needed = "image-to-text", frozenset({"caption"})
    options = frozenset({"prompt", "max_new_tokens", "generate_kwargs"})

    def __call__(self, inputs: Any = None, **options: Any) -> Any:
        """`[{"generated_text": ...}]` for an image, a list of such lists for a list of images.

        prompt; max_new_tokens; generate_kwargs: a dict of what transformers' `generate` takes and BLIP can do (see
        `read_generation`); timeout: seconds to wait for an image of the web; batch_size.
        """
        return self._call(_one_of("image-to-text", inputs, options.pop("images", None)), options)

    def run(
        self,
        inputs: list[Any],
        *,
        batch_size: int | None,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        decoding, num_captions = read_generation(max_new_tokens, generate_kwargs)
        captions = self.model.caption(
            inputs, prompt=prompt, decoding=decoding, num_captions=num_captions, batch_size=batch_size
        )
        start = f"{prompt.strip()} " if prompt and isinstance(self.model, BlipPredictor) else ""
        return [
            [{"generated_text": start + text} for text in ([texts] if num_captions == 1 else texts)]
            for texts in captions
        ]


class VisualQuestionAnswering(Pipeline):
    """Answers to questions about images."""

    task, needed = "visual-question-answering", frozenset({"answer"})
    options = frozenset({"top_k", "padding", "truncation", "max_new_tokens", "generate_kwargs"})

    def __call__(self, image: Any, question: str | list[str] | None = None, **options: Any) -> Any:
        """`[{"answer": ...}]` for an image and a question, a list of such lists for several.

        image: an image or a list, with `question`; or {"image": ..., "question": ...}, or a list or generator of these.
        One question is asked about all images; several questions, each about all images, question by question. The
        model writes one answer, so `top_k` changes nothing; nor do `padding` and `truncation`. max_new_tokens;
        generate_kwargs; timeout; batch_size.
        """
        if question is None:
            return self._call(image, options)
        are_several = isinstance(image, list | tuple) or _is_data_set(image)
        images = list(image) if are_several else [image]
        asked = [question] if isinstance(question, str) else question
        pairs = [{"image": each, "question": text} for text in asked for each in images]
        is_single = isinstance(question, str) and not are_several
        return self._call(pairs[0] if is_single else pairs, options)

    def run(
        self,
        inputs: list[Any],
        *,
        batch_size: int | None,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Any]:
        if any(not isinstance(pair, Mapping) or not {"image", "question"} <= pair.keys() for pair in inputs):
            raise ConfigError('visual-question-answering: give image and question, or {"image": ..., "question": ...}')
        decoding = None
        if max_new_tokens is not None or generate_kwargs:
            decoding, _ = read_generation(max_new_tokens, generate_kwargs)
        images, questions = [pair["image"] for pair in inputs], [pair["question"] for pair in inputs]
        answers = self.model.answer(images, questions, decoding=decoding, batch_size=batch_size)
        return [[{"answer": text}] for text in answers]


class ZeroShotImageClassification(Pipeline):
    """Which of several labels an image shows, by ITC."""

    task, needed = "zero-shot-image-classification", frozenset({"similarity"})
    options = frozenset({"candidate_labels", "hypothesis_template"})

    def __call__(self, image: Any = None, candidate_labels: Sequence[str] | None = None, **options: Any) -> Any:
        """`[{"score": ..., "label": ...}, ...]`, the likeliest label first, for an image; a list of them for a list.

        Scores are the softmax of the ITC similarities over the model's temperature. hypothesis_template: a text with
        {} for the label; "This is a photo of {}." by default. timeout; batch_size.
        """
        if candidate_labels is not None:
            options["candidate_labels"] = candidate_labels
        return self._call(_one_of(self.task, image, options.pop("images", None)), options)

    def run(
        self,
        inputs: list[Any],
        *,
        batch_size: int | None,
        candidate_labels: Sequence[str] = (),
        hypothesis_template: str = "This is a photo of {}.",
    ) -> list[Any]:
        if isinstance(candidate_labels, str):
            candidate_labels = [label.strip() for label in candidate_labels.split(",")]
        if not candidate_labels:
            raise ConfigError("zero-shot-image-classification: give candidate_labels, a list of texts")
        if hypothesis_template.format("x") == hypothesis_template.format("y"):
            raise ConfigError(f"hypothesis_template {hypothesis_template!r} has no {{}} where the label belongs")
        texts = [hypothesis_template.format(label) for label in candidate_labels]
        similarity = self.model.similarity(inputs, texts, batch_size=batch_size)
        temperature = self.model.checkpoint.model.temperature.detach().float().cpu()
        scores = (similarity / temperature).softmax(dim=-1)
        results = []
        for row in scores.tolist():
            ranked = sorted(zip(row, candidate_labels, strict=True), key=lambda pair: -pair[0])
            results.append([{"score": score, "label": label} for score, label in ranked])
        return results


class ImageFeatureExtraction(Pipeline):
    """The states of the image encoder."""

    task = "image-feature-extraction"
    options = frozenset({"pool", "return_tensors"})

    def __call__(self, images: Any, **options: Any) -> Any:
        """Nested lists of numbers of the shape (1, N, D) for an image, a list of them for a list of images.

        pool: only the state of the class token, (1, D). return_tensors: torch tensors, not lists. timeout; batch_size.
        """
        return self._call(images, options)

    def run(
        self, inputs: list[Any], *, batch_size: int | None, pool: bool = False, return_tensors: bool = False
    ) -> list[Any]:
        states = self.model.features(inputs, batch_size=batch_size).image
        assert states is not None  # there are images
        chosen = [state[None, 0] if pool else state[None] for state in states]
        return list(chosen) if return_tensors else [state.tolist() for state in chosen]


_KINDS: tuple[type[Pipeline], ...] = (
    ImageToText,
    VisualQuestionAnswering,
    ZeroShotImageClassification,
    ImageFeatureExtraction,
)
PIPELINES = {kind.task: kind for kind in _KINDS} | {"vqa": VisualQuestionAnswering}


def pipeline(
    task: str | None = None,
    model: str | os.PathLike[str] | BasePredictor | None = None,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    device: int | str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> Any:
    """A `Pipeline` as transformers 4 had it: "image-to-text", "visual-question-answering" (or "vqa"),
    "zero-shot-image-classification" or "image-feature-extraction".

    Args:
        task: without, the first of these that the checkpoint can do.
        model: what `openblip.load` reads, or what it returned.
        tokenizer: folder or hub name of the vocabulary, for a checkpoint that has none.
        device: a number is that CUDA GPU, -1 the CPU; a name or torch.device; the best there is by default.
        dtype, torch_dtype: as in `openblip.load`; one name for both is enough. model_kwargs may hold them as well, and
            load_in_8bit or load_in_4bit, which are the `quantization` of a BLIP-2.
        batch_size: inputs that are worked on together, and that a generator is read ahead by.
        options: defaults of the call's arguments. Arguments of transformers that change no result are accepted.

    Raises ConfigError for a task or an argument that does not exist, and without a model; UnsupportedTaskError when the
    checkpoint cannot do the task; else what `openblip.load` raises.
    """
    if task is not None and task not in PIPELINES:
        raise ConfigError(f"There is no pipeline {task!r}; there are {', '.join(PIPELINES)}", page=_PAGE)
    if model is None:
        raise ConfigError("pipeline: give a model; `openblip models` lists checkpoints and what they are for")
    for name, advice in LOADING.items():
        if options.pop(name, None) is not None:
            raise ConfigError(f"pipeline: {name} cannot be given here: {advice}", page=_PAGE)
    extra = dict(model_kwargs or {})
    dtypes = [
        given for given in (dtype, torch_dtype, extra.pop("dtype", None), extra.pop("torch_dtype", None)) if given
    ]
    bits: list[Quantization] = [name for name in get_args(Quantization) if extra.pop(f"load_in_{name}", False)]
    if extra:
        raise ConfigError(
            f"pipeline: no argument {', '.join(sorted(extra))} in model_kwargs; there are dtype, load_in_8bit and "
            "load_in_4bit"
        )
    if isinstance(model, BasePredictor):
        if dtypes or bits or device is not None or tokenizer is not None:
            raise ConfigError(
                "pipeline: the model is loaded already; give device, dtype, quantization and tokenizer to openblip.load"
            )
    else:
        place: str | torch.device | None
        place = ("cpu" if device < 0 else f"cuda:{device}") if isinstance(device, int) else device
        quantization = bits[0] if bits else None
        model = load(
            model, device=place, dtype=dtypes[0] if dtypes else None, tokenizer=tokenizer, quantization=quantization
        )
    if task is None:
        task = next(kind.task for kind in _KINDS if kind.needed <= model.tasks)
    return PIPELINES[task](model, batch_size, options)


def read_generation(max_new_tokens: int | None, generate_kwargs: Mapping[str, Any] | None) -> tuple[Decoding, int]:
    """The decoding that transformers' arguments of `generate` describe, and how many texts it gives per image.

    Known are max_new_tokens, min_new_tokens, num_beams, do_sample, top_p, top_k, temperature, repetition_penalty,
    length_penalty, no_repeat_ngram_size and num_return_sequences. Raises ConfigError for others, and for what cannot
    go together, such as sampling with beams.
    """
    given = {name: value for name, value in dict(generate_kwargs or {}).items() if value is not None}
    if max_new_tokens is not None:
        if "max_new_tokens" in given:
            raise ConfigError("max_new_tokens is given twice: as an argument and in generate_kwargs")
        given["max_new_tokens"] = max_new_tokens
    if "max_length" in given:
        raise ConfigError("generate_kwargs: max_length counts the prompt as well; give max_new_tokens", page=_PAGE)
    num_captions, beams = int(given.pop("num_return_sequences", 1)), int(given.pop("num_beams", 1))
    do_sample = bool(given.pop("do_sample", False))
    sampling = {name: given.pop(name) for name in ("top_p", "top_k", "temperature") if name in given}
    length_penalty = given.pop("length_penalty", 1.0)
    given.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    known = {"max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"generate_kwargs: BLIP has no {', '.join(unknown)}", page=_PAGE)
    if do_sample and beams > 1:
        raise ConfigError("generate_kwargs: do_sample with num_beams is not there; choose one of them")
    if do_sample:
        return Nucleus(**{"top_p": 1.0, "top_k": SAMPLED_TOP_K, **sampling}, **given), num_captions
    if beams > 1:
        return Beam(num_beams=beams, length_penalty=length_penalty, **given), num_captions
    return Greedy(**given), num_captions


def _one_of(task: str, inputs: Any, images: Any) -> Any:
    """What is given as `inputs` or, by an older name, as `images`."""
    given = inputs if images is None else images
    if given is None:
        raise ConfigError(f"{task}: give an image, or a list of images")
    return given


def _is_data_set(inputs: Any) -> bool:
    """Whether this is a data set of images by its methods: neither an image nor one question."""
    if isinstance(inputs, str | bytes | bytearray | Mapping | Image.Image | torch.Tensor | os.PathLike):
        return False
    return hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__") and not hasattr(inputs, "__array__")


def _in_batches(inputs: Any, size: int, run: Callable[[Iterable[Any]], list[Any]]) -> Iterator[Any]:
    """Results one by one, for inputs that are read batch by batch."""
    items = inputs if isinstance(inputs, Iterator) else (inputs[position] for position in range(len(inputs)))
    while batch := list(islice(items, size)):
        yield from run(batch)


def _opened(item: Any, timeout: float | None) -> Any:
    """An input whose image, if it is a URL, is read. Raises ImageError when it cannot be."""
    if isinstance(item, Mapping):
        return {**item, "image": _opened(item["image"], timeout)} if "image" in item else item
    if not isinstance(item, str):
        return item
    if not item.startswith(("http://", "https://")):
        return _of_base64(item)
    request = urllib.request.Request(item, headers={"User-Agent": "openblip"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            image: ImageInput = response.read()
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise ImageError(f"{item}: cannot be read: {error}") from error
    return image


def _of_base64(item: str) -> str | bytes:
    """The file that a data URI or plain base64 holds; a path as it is. Raises ImageError for a data URI without one."""
    is_uri = item.startswith("data:image/")
    if not is_uri and (os.path.isfile(item) or len(item) < _SHORTEST_BASE64):
        return item
    try:
        return b64decode(item.partition(",")[2] if is_uri else item, validate=not is_uri)
    except ValueError as error:
        if is_uri:
            raise ImageError(f"{item[:40]}...: no image as base64: {error}") from error
        return item
