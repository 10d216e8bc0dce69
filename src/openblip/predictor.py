"""The user's side of a checkpoint: caption, match, search. Pictures and strings in, results out.

B images, I images, T texts, R rows, S side of the prepared picture, E embedding width.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openblip.checkpoints.hub import hub_folder, is_hub_name
from openblip.checkpoints.native import Checkpoint, is_checkpoint, load_checkpoint, save_checkpoint
from openblip.data.images import ImageInput, read_image
from openblip.data.tokenizer import Tokens, normalize_caption
from openblip.errors import CheckpointError, ConfigError, UnsupportedTaskError
from openblip.generation.decoding import Beam, Decoding, Nucleus
from openblip.generation.generate import generate
from openblip.models.blip import Blip
from openblip.models.config import Head

PRETRAINED = Path(__file__).parent / "pretrained"
DEFAULT_BATCH_SIZE = 64
MAX_MATCH_TOKENS = 35  # released code: retrieval, matching and questions

_CALLS: dict[Head, tuple[str, ...]] = {
    "itc": ("similarity", "embed_images", "embed_texts"),
    "itm": ("match", "match_matrix"),
    "lm": ("caption",),
}

Item = TypeVar("Item")


@dataclass(frozen=True)
class Caption:
    """A generated caption and its log-probability under the model: the sum over its tokens and the end."""

    text: str
    logprob: float


@dataclass(frozen=True)
class EncodedImages:
    """Images a predictor has already encoded; every `images` argument of that predictor takes them."""

    tokens: Tensor
    """(B, N, Dv), on the model's device."""
    seeds: tuple[int, ...]
    """A hash of each prepared picture, by which seeded sampling does not depend on the order."""

    def select(self, index: Tensor) -> "EncodedImages":
        """Those that `index` (B') of int64 names, repeats allowed."""
        return EncodedImages(self.tokens[index], tuple(self.seeds[i] for i in index.tolist()))


Images = ImageInput | Sequence[ImageInput] | Tensor | EncodedImages


class Predictor:
    """A checkpoint ready for use. Results do not depend on batch size, order or padding.

    `images` is one or a list of path, PIL.Image, encoded bytes or uint8 HxWx3 array; or what `prepare` or
    `encode` returned.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or default)
        self.dtype = dtype or torch.float32
        self.model: Blip = checkpoint.model.to(self.device, self.dtype).eval()
        self.tokenizer = checkpoint.tokenizer
        self.preprocessing = checkpoint.preprocessing
        self.prompt = checkpoint.prompt

    @property
    def tasks(self) -> frozenset[str]:
        """The calls that this checkpoint has weights for."""
        return frozenset(call for head in self.model.config.heads for call in _CALLS[head])

    def prepare(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Read and resize: uint8 (B, 3, S, S) on the CPU. ImageError names the picture that fails."""
        return self._prepare(as_list(images), first=0)

    def _prepare(self, images: Sequence[ImageInput], first: int) -> Tensor:
        """`first`: the place of the first of these images in the caller's list, for errors."""
        resized = []
        for i, image in enumerate(images, start=first):
            with read_image(image, name=image_name(image, i)) as picture:
                resized.append(self.preprocessing(picture))
        return torch.from_numpy(np.stack(resized)) if resized else self._no_pixels()

    @torch.inference_mode()
    def encode(self, images: Images, batch_size: int | None = None) -> EncodedImages:
        """Run the image encoder once, for any number of later calls."""
        if isinstance(images, EncodedImages):
            return images
        tokens: list[Tensor] = []
        seeds: list[int] = []
        for chunk in self._prepared_batches(images, batch_size):
            seeds.extend(picture_seed(picture) for picture in chunk)
            pixels = self.preprocessing.normalize(chunk.to(self.device))
            tokens.append(self.model.encode_image(pixels.to(self.dtype)))
        vision = self.model.config.vision
        if not tokens:
            tokens.append(torch.zeros(0, vision.num_tokens, vision.hidden_dim, device=self.device))
        return EncodedImages(torch.cat(tokens), tuple(seeds))

    @torch.inference_mode()
    def caption(
        self,
        images: Images,
        prompt: str | None = None,
        decoding: Decoding = Beam(num_beams=3, max_new_tokens=20),  # noqa: B008 (frozen)
        num_captions: int = 1,
        batch_size: int | None = None,
        return_scores: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Any:
        """Captions: a string per image, or a list of `num_captions` strings if that is more than one.

        prompt: words the caption goes on from; None is the checkpoint's own, "" is none. The result is
        without it. return_scores: `Caption` objects instead of strings. seeds: one integer per image for
        `Nucleus`; by default they come from its seed and the picture. Raises UnsupportedTaskError.
        """
        self._require("caption")
        prompt_ids = self.tokenizer.prompt(self.prompt if prompt is None else prompt).to(self.device)
        self._check_length(len(prompt_ids), decoding)
        results: list[Any] = []
        for start, encoded in self._encoded_batches(images, batch_size):
            count = len(encoded.seeds)
            generated = generate(
                self.model,
                self.model.image_kv(encoded.tokens, "decode"),
                prompt_ids,
                count,
                decoding,
                num_captions=num_captions,
                eos_id=self.tokenizer.sep_id,
                pad_id=self.tokenizer.pad_id,
                seeds=sampling_seeds(decoding, encoded.seeds)
                if seeds is None
                else seeds[start : start + count],
            )
            for captions in generated:
                found = [Caption(self.tokenizer.decode(g.ids), g.logprob) for g in captions]
                values: list[Any] = list(found) if return_scores else [caption.text for caption in found]
                results.append(values[0] if num_captions == 1 else values)
        if seeds is not None and len(seeds) != len(results):
            raise ConfigError(f"{len(seeds)} seeds for {len(results)} images: give one per image.")
        return results[0] if is_single(images) else results

    @torch.inference_mode()
    def match(self, images: Images, texts: str | Sequence[str], batch_size: int | None = None) -> Tensor:
        """P(match) of each pair by ITM, float32 (B,) on the CPU. ConfigError unless they pair up."""
        self._require("match")
        texts = as_list(texts)
        scores = []
        for start, encoded in self._encoded_batches(images, batch_size):
            count = len(encoded.seeds)
            own = texts[start : start + count]
            if len(own) != count:
                raise ConfigError(f"match compares pairs: {len(texts)} texts do not pair with the images.")
            tokens = self.tokenize(own, self.tokenizer.enc_id)
            image_kv = self.model.image_kv(encoded.tokens, "encode")
            scores.append(self._match_probability(tokens, image_kv))
        result = torch.cat(scores) if scores else torch.zeros(0)
        if len(result) != len(texts):
            raise ConfigError(
                f"match compares pairs: {len(result)} images and {len(texts)} texts were given."
            )
        return result

    @torch.inference_mode()
    def match_matrix(
        self, images: Images, texts: str | Sequence[str], batch_size: int | None = None
    ) -> Tensor:
        """P(match) of every image with every text by ITM, float32 (I, T) on the CPU."""
        self._require("match_matrix")
        texts = as_list(texts)
        rows = []
        for _, encoded in self._encoded_batches(images, batch_size):
            image_kv = self.model.image_kv(encoded.tokens, "encode")  # once for all texts
            count = len(encoded.seeds)
            columns = []
            for chunk in chunks(texts, max(1, 4 * DEFAULT_BATCH_SIZE // count)):
                tokens = self.tokenize(chunk, self.tokenizer.enc_id)
                repeated = Tokens(tokens.ids.repeat(count, 1), tokens.mask.repeat(count, 1))
                columns.append(self._match_probability(repeated, image_kv).view(count, -1))
            rows.append(torch.cat(columns, dim=1) if columns else torch.zeros(count, 0))
        return torch.cat(rows) if rows else torch.zeros(0, len(texts))

    def similarity(self, images: Images, texts: str | Sequence[str], batch_size: int | None = None) -> Tensor:
        """ITC cosine of every image with every text, float32 (I, T) on the CPU."""
        self._require("similarity")
        return self.embed_images(images, batch_size) @ self.embed_texts(texts, batch_size).T

    @torch.inference_mode()
    def embed_images(self, images: Images, batch_size: int | None = None) -> Tensor:
        """Unit vectors, float32 (I, E) on the CPU."""
        self._require("embed_images")
        found = [
            self.model.embed_image(encoded.tokens).float().cpu()
            for _, encoded in self._encoded_batches(images, batch_size)
        ]
        return torch.cat(found) if found else torch.zeros(0, self.model.config.embed_dim)

    @torch.inference_mode()
    def embed_texts(self, texts: str | Sequence[str], batch_size: int | None = None) -> Tensor:
        """Unit vectors, float32 (T, E) on the CPU."""
        self._require("embed_texts")
        found = []
        for chunk in chunks(as_list(texts), checked_batch_size(batch_size)):
            tokens = self.tokenize(chunk, self.tokenizer.cls_id)
            found.append(self.model.embed_text(tokens.ids, tokens.mask).float().cpu())
        return torch.cat(found) if found else torch.zeros(0, self.model.config.embed_dim)

    def tokenize(self, texts: Sequence[str], first_id: int) -> Tokens:
        """Texts as training read them (`normalize_caption`), from `first_id` on, on the model's device."""
        normalized = [normalize_caption(text) for text in texts]
        tokens = self.tokenizer.encode(normalized, MAX_MATCH_TOKENS).to(self.device)
        tokens.ids[:, 0] = first_id
        return tokens

    def save(
        self, folder: str | os.PathLike[str], format: Literal["openblip", "huggingface"] = "openblip"
    ) -> None:
        """Write a checkpoint folder that `load` reads; "huggingface": that transformers reads as well.

        Raises CheckpointError when no model of transformers has these heads.
        """
        checkpoint = Checkpoint(self.model, self.tokenizer, self.preprocessing, self.prompt)
        match format:
            case "openblip":
                save_checkpoint(Path(folder), checkpoint)
            case "huggingface":
                from openblip.checkpoints.huggingface import save_huggingface  # transformers takes seconds

                save_huggingface(Path(folder), checkpoint)
            case _:
                raise ConfigError(f'Format "{format}" cannot be written; choose "openblip" or "huggingface".')

    def _require(self, call: str) -> None:
        if call not in self.tasks:
            raise UnsupportedTaskError(
                f"This checkpoint has no weights to {call}; it can do {', '.join(sorted(self.tasks))}."
            )

    def _check_length(self, prompt_length: int, decoding: Decoding) -> None:
        longest = prompt_length + decoding.max_new_tokens - 1  # the last token is not read
        positions = self.model.config.text.max_positions
        if longest > positions:
            raise ConfigError(
                f"max_new_tokens {decoding.max_new_tokens} after a prompt of {prompt_length} tokens: the "
                f"model reads at most {positions}; ask for {max(positions - prompt_length + 1, 0)} or fewer."
            )

    def _match_probability(self, tokens: Tokens, image_kv: Any) -> Tensor:
        logits = self.model.match_logits(tokens.ids, tokens.mask, image_kv)  # (R, 2)
        return logits.float().softmax(dim=1)[:, 1].cpu()

    def _encoded_batches(self, images: Images, batch_size: int | None) -> Iterator[tuple[int, EncodedImages]]:
        """Batches of encoded images, each with the position of its first."""
        size = checked_batch_size(batch_size)
        if isinstance(images, EncodedImages):
            for start in range(0, len(images.seeds), size):
                stop = start + size
                yield start, EncodedImages(images.tokens[start:stop], images.seeds[start:stop])
            return
        start = 0
        for pixels in self._prepared_batches(images, size):
            yield start, self.encode(pixels, size)
            start += len(pixels)

    def _prepared_batches(self, images: Images, batch_size: int | None) -> Iterator[Tensor]:
        size = checked_batch_size(batch_size)
        if isinstance(images, Tensor):
            check_prepared(images, self.preprocessing.image_size)
            yield from images.split(size) if len(images) else ()
            return
        assert not isinstance(images, EncodedImages)
        first = 0
        for chunk in chunks(as_list(images), size):
            yield self._prepare(chunk, first)
            first += len(chunk)

    def _no_pixels(self) -> Tensor:
        size = self.preprocessing.image_size
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)


def load(
    source: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Predictor:
    """A predictor from a checkpoint folder, OpenBLIP's or transformers', or the name of a shipped model.

    A folder is named by its path, or as owner/model on the Hugging Face hub.

    device: where it runs; by default the GPU if there is one. dtype: of the weights, float32 by default.
    Raises CheckpointError when there is no such checkpoint or it is not whole.
    """
    folder = Path(source)
    if not folder.is_dir() and (PRETRAINED / str(source)).is_dir():
        folder = PRETRAINED / str(source)
    if not folder.exists() and is_hub_name(str(source)):
        folder = hub_folder(str(source))
    if is_checkpoint(folder):
        return Predictor(load_checkpoint(folder), device, dtype)
    if (folder / "config.json").is_file():
        from openblip.checkpoints.huggingface import load_huggingface  # transformers takes seconds

        return Predictor(load_huggingface(folder), device, dtype)
    shipped = ", ".join(sorted(path.name for path in PRETRAINED.glob("*") if path.is_dir()))
    raise CheckpointError(
        f"{source} is no checkpoint: name a folder of OpenBLIP or of transformers' BLIP, a model on the hub "
        f"(owner/model), or a shipped one ({shipped or 'none is installed'})."
    )


def is_single(images: Images) -> bool:
    """Whether one picture was given, so that one result goes back."""
    if isinstance(images, EncodedImages | Tensor):
        return False
    return isinstance(images, str | os.PathLike | Image.Image | bytes | np.ndarray)


def as_list(items: Any) -> list[Any]:
    """One item or a sequence of them, as a list."""
    if isinstance(items, str | os.PathLike | Image.Image | bytes | np.ndarray):
        return [items]
    return list(items)


def image_name(image: ImageInput, position: int) -> str:
    """What an error calls a picture: its path, or its place in the list."""
    return str(image) if isinstance(image, str | os.PathLike) else f"image {position}"


def check_prepared(pixels: Tensor, size: int) -> None:
    """ConfigError unless a tensor is what `prepare` returns."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise ConfigError(
            f"A {str(pixels.dtype).removeprefix('torch.')} tensor of {tuple(pixels.shape)} is no batch of "
            f"prepared images, uint8 (B, 3, {size}, {size}); give pictures, or what `prepare` returned."
        )


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def checked_batch_size(batch_size: int | None) -> int:
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
    return batch_size or DEFAULT_BATCH_SIZE


def picture_seed(picture: Tensor) -> int:
    """A 63-bit hash of a prepared picture, uint8 (3, S, S)."""
    digest = hashlib.blake2b(picture.cpu().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sampling_seeds(decoding: Decoding, picture_seeds: Sequence[int]) -> list[int] | None:
    """Per-image seeds of `Nucleus`: its seed joined with each picture's hash; fresh ones without a seed."""
    if not isinstance(decoding, Nucleus):
        return None
    if decoding.seed is None:
        return [secrets.randbits(63) for _ in picture_seeds]
    joined = [hashlib.blake2b(f"{decoding.seed},{p}".encode(), digest_size=8) for p in picture_seeds]
    return [int.from_bytes(digest.digest(), "big") >> 1 for digest in joined]
