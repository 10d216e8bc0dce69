"""Captions by any image-text-to-text model of transformers: LLaVA, Qwen-VL, PaliGemma, GIT, Idefics and others.

What such a model is asked is a prompt, in its chat template if it has one. Its texts are searched and sampled as those
of a BLIP: the same strategies, seeds per image, and log-probabilities.

B images, K texts of each.
"""

import sys
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from openblip.checkpoints.backbones import PathOrName, Quantization, first_line, quietly
from openblip.checkpoints.state_dict import ChooseDtype
from openblip.checkpoints.transformers_models import TransformersModel
from openblip.data.images import ImageInput, read_image
from openblip.data.reader import read_ahead
from openblip.errors import CheckpointError, ConfigError, OpenBlipError
from openblip.files import hash_int
from openblip.generation import search
from openblip.generation.decoding import Beam, Decoding, Greedy, check_decoding
from openblip.models.language_model import padded_right
from openblip.predictor import values
from openblip.predictor.values import CaptionScore, ScoredText
from openblip.text_counts import count_text, count_texts, warn_caller

CHAT_PROMPT = "Describe this image in one short sentence."
"""What a model with a chat template is asked, unless the caller says otherwise; others are asked nothing."""

MAX_TEXT_TOKENS = 256
"""Of a given text whose log-probability is asked for, with its end."""
PromptedImage = Mapping[str, Tensor]
"""An image with the prompt as the model takes them, a batch of one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePrompter:
    """Makes the input of a model from an RGB image, with the prompt, in any thread."""

    processor: Any
    prompt: str
    image_size: None = None
    """The side to which all images are resized; the model's own processor decides for each image."""

    def __call__(self, image: Image.Image) -> PromptedImage:
        prepared = self._prepare(image)
        return {name: tensor for name, tensor in prepared.items() if isinstance(tensor, Tensor)}

    @cached_property
    def has_chat_template(self) -> bool:
        return getattr(self.processor, "chat_template", None) is not None

    def _prepare(self, image: Image.Image) -> Mapping[str, Any]:
        if self.has_chat_template:
            content = [{"type": "image", "image": image}, {"type": "text", "text": self.prompt}]
            prepared: Mapping[str, Any] = self.processor.apply_chat_template(
                [{"role": "user", "content": content if self.prompt else content[:1]}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            return prepared
        image_token = getattr(self.processor, "image_token", None)
        if image_token is not None:  # which the processor repeats as often as the model has tokens of the image
            text = self.prompt if image_token in self.prompt else image_token + self.prompt
            prepared = self.processor(images=image, text=text, return_tensors="pt")
            return prepared
        # The image is read beside the text, which the caption continues: its last special tokens would end it.
        ids = self.processor.tokenizer(self.prompt).input_ids
        while ids and ids[-1] in self.processor.tokenizer.all_special_ids and len(ids) > 1:
            ids = ids[:-1]
        return {**self.processor.image_processor(images=image, return_tensors="pt"), "input_ids": torch.tensor([ids])}


class TransformersCaptioner:
    """A model of transformers that writes about an image after a prompt. Results do not depend on batch size or order.

    prompt: what it is asked; None is `CHAT_PROMPT` where there is a chat template, and nothing elsewhere.
    """

    tasks = frozenset({"caption"})

    def __init__(self, loaded: TransformersModel, prompt: str | None = None) -> None:
        self.loaded, self.model = loaded, loaded.model
        if prompt is None:
            prompt = CHAT_PROMPT if getattr(loaded.processor, "chat_template", None) is not None else ""
        self.prompt = prompt
        self.preprocessing = ImagePrompter(processor=loaded.processor, prompt=prompt)
        self.tokenizer: Any = loaded.processor.tokenizer
        stated = self.model.generation_config.eos_token_id
        ends = stated if isinstance(stated, list) else [stated]
        own_end = self.tokenizer.eos_token_id
        self.end_ids = [end for end in ends if end is not None] or ([] if own_end is None else [own_end])
        if not self.end_ids:
            raise CheckpointError("This model has no token that ends a text: neither it nor its tokenizer names one.")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.loaded.device

    @property
    def precision(self) -> str:
        """The dtype of the weights as users name it: outputs record it."""
        return str(self.loaded.dtype).removeprefix("torch.")

    @property
    def num_parameters(self) -> int:
        """The number of weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fingerprint(self) -> str:
        """A SHA-256 of everything that decides the captions: settings, prompt, processor and weights."""
        return self.loaded.fingerprint(self.prompt)

    def encodes_alike(self, other: object) -> bool:
        """Whether the images that this model encodes serve another: they are read together with the prompt."""
        return False

    def stack(self, prepared: Sequence[PromptedImage]) -> Sequence[PromptedImage]:
        """A batch of images that `preprocessing` made; they may have different shapes."""
        return prepared

    def encode(self, images: Sequence[PromptedImage], batch_size: int | None = None) -> Sequence[PromptedImage]:
        """The same images: they are encoded once, when captions are written, for all captions of an image."""
        return images

    def read_image(self, image: ImageInput, name: str | None = None) -> PromptedImage:
        """Read one image and make it the model's input. Raises `ImageError`, in which `name` stands for it."""
        return self.preprocessing(read_image(image, name=name))

    @torch.inference_mode()
    def caption(
        self,
        images: Any,
        prompt: str | None = None,
        decoding: Decoding = Beam(num_beams=3, max_new_tokens=20),  # noqa: B008
        num_captions: int = 1,
        batch_size: int | None = None,
        return_scores: bool = False,
        seeds: values.Seeds = None,
    ) -> Any:
        """Captions: a string per image, or a list of `num_captions` strings if that is more than one.

        images: one or several, as of `BasePredictor.caption`, or what `read_image` returned. prompt: the captioner's
        own; another is refused, since images are prepared together with it. The other arguments are those of
        `BasePredictor.caption`. Images whose inputs have equal shapes are read together, without padding.
        """
        self._check_prompt(prompt)
        check_decoding(decoding, num_captions)
        single, items = values.is_single(images), values.as_list(images)
        seeds = None if seeds is None else list(seeds)
        values.check_equal("caption", images=items, seeds=items if seeds is None else seeds)
        captions: list[list[ScoredText]] = []
        for rows, batch in self._prepared_batches(items, batch_size):
            captions += self._write(batch, decoding, num_captions, seeds and seeds[rows])
        results = [values.as_asked(texts, return_scores, single=num_captions == 1) for texts in captions]
        return results[0] if single else results

    @count_texts(warn_caller)
    @torch.inference_mode()
    def score_captions(
        self, images: Any, texts: values.Candidates, prompt: str | None = None, batch_size: int | None = None
    ) -> list[list[CaptionScore]]:
        """The log-probability of each given text as what the model writes about its image, which is read once.

        texts: a list for each image, of any and different lengths, or texts for all images; of each the first
        `MAX_TEXT_TOKENS` tokens count. images, prompt: as in `caption`. Raises CheckpointError when a score is not a
        number.
        """
        self._check_prompt(prompt)
        items = values.as_list(images)
        lists = values.as_lists_of_texts(texts, len(items))
        values.check_equal("score_captions", images=items, lists=lists)
        scores: list[list[CaptionScore]] = []
        for rows, batch in self._prepared_batches(items, batch_size):
            scores += self._score(batch, lists[rows])
        return scores

    def _check_prompt(self, prompt: str | None) -> None:
        if prompt not in (None, self.prompt):
            raise ConfigError(f'The captioner was loaded with the prompt "{self.prompt}"; load it with "{prompt}".')

    def _prepared_batches(
        self, items: Sequence[Any], batch_size: int | None
    ) -> Generator[tuple[slice, list[PromptedImage]]]:
        """Batches of prepared images, each with its rows among all. Threads prepare the next ones."""
        size = batch_size or values.DEFAULT_BATCH_SIZE
        with closing(read_ahead(enumerate(items), self._prepare, num_workers=None, ahead=2 * size)) as prepared:
            for rows in values.batches(len(items), batch_size):
                yield rows, list(islice(prepared, size))

    def _prepare(self, numbered: tuple[int, Any]) -> PromptedImage:
        """An image at its position, prepared unless it is already."""
        position, image = numbered
        return (
            image
            if isinstance(image, Mapping)
            else self.read_image(image, values.name_or_position(image, position, "image"))
        )

    def _write(
        self, images: Sequence[PromptedImage], decoding: Decoding, num_captions: int, seeds: values.Seeds
    ) -> list[list[ScoredText]]:
        """`num_captions` of each image; those with inputs of equal shapes in one pass."""
        from openblip.models.image_text_decoder import read_image_prompts  # and transformers

        if seeds is None:
            seeds = values.sampling_seeds(decoding, len(images), lambda: map(_hash, images))
        captions: list[list[ScoredText]] = [[] for _ in images]
        texts_per_image = num_captions
        if isinstance(decoding, Beam) and decoding.num_beams > 1:
            texts_per_image = decoding.num_beams
        for positions in _of_equal_shapes(images):
            inputs = self._join([images[position] for position in positions])
            if decoding.max_new_tokens > self._room(inputs):
                raise ConfigError(
                    f"max_new_tokens is {decoding.max_new_tokens}: after an image and the prompt the model has room "
                    f"for {self._room(inputs)} tokens; ask for fewer."
                )
            decoder, logits = read_image_prompts(self.model, inputs, decoding.max_new_tokens, self.end_ids)
            written = search.write(
                decoder.texts(texts_per_image, decoding.max_new_tokens),
                logits,
                decoding,
                num_captions=num_captions,
                eos_id=self.end_ids[0],
                seeds=None if seeds is None else [seeds[position] for position in positions],
            )
            for position, texts in zip(positions, written, strict=True):
                captions[position] = [self._scored(text) for text in texts]
        return captions

    def _score(self, images: Sequence[PromptedImage], texts: Sequence[Sequence[str]]) -> list[list[CaptionScore]]:
        """The scores of each image's texts."""
        from openblip.models.image_text_decoder import read_image_prompts  # and transformers

        scores: list[list[CaptionScore]] = [[] for _ in images]
        for positions in _of_equal_shapes(images):
            inputs = self._join([images[position] for position in positions])
            limit = min(MAX_TEXT_TOKENS, self._room(inputs))
            ids_of = [[self._text_ids(text, limit) for text in texts[position]] for position in positions]
            longest = max((len(ids) for of_image in ids_of for ids in of_image), default=0)
            if longest == 0:
                continue
            prompts, first_logits = read_image_prompts(self.model, inputs, longest, self.end_ids)
            for number in range(max(map(len, ids_of))):  # one text of each image at a time
                having = [row for row, of_image in enumerate(ids_of) if len(of_image) > number]
                rows = torch.tensor(having, device=self.device)
                ids, mask = padded_right([ids_of[row][number] for row in having], self.end_ids[0], self.device)
                decoder, logits = prompts.texts(1, ids.shape[1]).select(rows), first_logits[rows]
                logprobs = torch.zeros(len(having), device=self.device)
                for column, token in enumerate(ids.T):
                    logits = logits if column == 0 else decoder.step(ids[:, column - 1])
                    chosen = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(dim=1)
                    logprobs += torch.where(mask[:, column], chosen, 0.0)
                if logprobs.isnan().any():
                    raise CheckpointError("The scores are not numbers (NaN): the weights are broken.")
                for row, logprob, count in zip(having, logprobs.tolist(), mask.sum(dim=1).tolist(), strict=True):
                    scores[positions[row]].append(CaptionScore(logprob, count))
        return scores

    def _room(self, inputs: Mapping[str, Tensor]) -> int:
        """How many tokens the model can write after a prompt; ConfigError for none."""
        config = self.model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None or self.model.config.is_encoder_decoder:
            return sys.maxsize
        length = inputs["input_ids"].shape[1]
        if length >= positions:
            raise ConfigError(f"An image with the prompt takes {length} tokens: the model reads at most {positions}.")
        return int(positions) - length + 1  # the last is not read

    def _text_ids(self, text: str, limit: int) -> list[int]:
        """The tokens of a text as the model would write it, with the end, cut to `limit`."""
        ids = self.tokenizer(text.strip(), add_special_tokens=False).input_ids
        kept, unknown = ids[: limit - 1], self.tokenizer.unk_token_id
        num_unknown = 0 if unknown is None else kept.count(unknown)
        is_cut = len(kept) < len(ids)
        count_text(text, num_tokens=len(kept), num_unknown=num_unknown, is_cut=is_cut, limit=limit)
        return [*kept, self.end_ids[0]]

    def _join(self, images: Sequence[PromptedImage]) -> dict[str, Tensor]:
        """Inputs of equal shapes as one batch, on the model's device and in its precision."""
        joined = {name: torch.cat([image[name] for image in images]).to(self.device) for name in images[0]}
        return {name: x.to(self.loaded.dtype) if x.is_floating_point() else x for name, x in joined.items()}

    def _scored(self, generated: search.Generated) -> ScoredText:
        """What was written, as a text."""
        ids, logprobs = generated.ids, generated.token_logprobs
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        has_end = len(logprobs) > len(ids)
        ids = [*ids, self.end_ids[0]] if has_end else ids
        return ScoredText(
            text=text,
            logprob=generated.logprob,
            tokens=tuple(self.tokenizer.convert_ids_to_tokens(ids)),
            token_logprobs=logprobs,
            ids=tuple(ids),
            has_end=has_end,
        )


def _of_equal_shapes(images: Sequence[PromptedImage]) -> Iterable[list[int]]:
    """The positions of images whose inputs have equal shapes, group by group."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for position, image in enumerate(images):
        groups[tuple((name, tensor.shape) for name, tensor in sorted(image.items()))].append(position)
    return groups.values()


def _hash(image: PromptedImage) -> int:
    """A hash of an image's inputs: what is sampled depends on the image and not on its place in a list."""
    return hash_int(b"".join(tensor.numpy().tobytes() for _, tensor in sorted(image.items())))


def load_transformers_captioner(
    source: PathOrName,
    device: torch.device,
    dtype: ChooseDtype,
    *,
    prompt: str | None = None,
    quantization: Quantization | None = None,
) -> TransformersCaptioner:
    """A captioner around any image-text-to-text model of transformers, by folder or hub name, tried with one image.

    dtype: chooses the precision by the number of weights. Raises CheckpointError for any other model, and for one that
    does not write about an image after a prompt alone.
    """
    import transformers

    auto_class = transformers.AutoModelForImageTextToText
    loaded = TransformersModel.load(source, auto_class, device, dtype, quantization=quantization)
    captioner = TransformersCaptioner(loaded, prompt)
    try:
        with quietly():
            captioner.caption(Image.new("RGB", (64, 64), "gray"), decoding=Greedy(max_new_tokens=2))
    except OpenBlipError:
        raise
    except Exception as error:  # of any kind, since the code is that of the architecture
        kind, problem = loaded.model.config.model_type, f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{source} is a {kind}, which writes no caption when it is given an image and a prompt: {problem}"
        ) from error
    return captioner
