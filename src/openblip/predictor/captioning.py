"""Captions: what a model says about images by itself."""

from collections.abc import Iterator, Sequence

import torch

from openblip.errors import ConfigError
from openblip.generation.decoding import Decoding
from openblip.generation.search import generate
from openblip.predictor.images import EncodedImages, Images, listed
from openblip.predictor.runtime import Runtime
from openblip.predictor.scored_text import ScoredText, scored_text
from openblip.predictor.writing import check_length, sampling_seeds

Prompts = str | Sequence[str] | None
"""What captions go on from: the same for all images, one for each, or the checkpoint's own."""


@torch.inference_mode()
def write_captions(
    runtime: Runtime,
    images: Images,
    prompt: Prompts,
    decoding: Decoding,
    *,
    num_captions: int,
    batch_size: int | None,
    seeds: Sequence[int] | None,
) -> list[list[ScoredText]]:
    """`num_captions` per image, by the model's own decoder, which reads one prompt at a time."""
    tokenizer = runtime.require_tokenizer()
    for text in {prompt} if isinstance(prompt, str) else set(prompt or [runtime.prompt]):
        check_length(len(tokenizer.prompt(text)), decoding, runtime.max_positions)
    results: list[list[ScoredText]] = []
    for encoded, prompts, own_seeds in prompted_batches(runtime, images, prompt, decoding, batch_size, seeds):
        image_kv = runtime.image_kv(encoded.tokens, "decode")
        found: dict[int, list[ScoredText]] = {}
        for text in dict.fromkeys(prompts):
            places = [place for place, own in enumerate(prompts) if own == text]
            alone = len(places) < len(prompts)  # the usual case: no copy of keys and values
            written = generate(
                runtime.model,
                image_kv.select(torch.tensor(places, device=runtime.device)) if alone else image_kv,
                tokenizer.prompt(text).to(runtime.device),
                len(places),
                decoding,
                num_captions=num_captions,
                eos_id=tokenizer.sep_id,
                pad_id=tokenizer.pad_id,
                seeds=None if own_seeds is None else [own_seeds[place] for place in places],
            )
            for place, captions in zip(places, written, strict=True):
                found[place] = [scored_text(caption, tokenizer) for caption in captions]
        results += [found[place] for place in range(len(prompts))]
    return results


def prompted_batches(
    runtime: Runtime,
    images: Images,
    prompt: Prompts,
    decoding: Decoding,
    batch_size: int | None,
    seeds: Sequence[int] | None,
) -> Iterator[tuple[EncodedImages, list[str], Sequence[int] | None]]:
    """Batches of images with a prompt for each and, for `Nucleus`, a seed.

    ConfigError unless there are as many prompts and seeds as images, where they are in lists.
    """
    images = listed(images)
    shared = runtime.prompt if prompt is None else prompt
    prompts = [shared] * len(images) if isinstance(shared, str) else list(shared)
    if len(prompts) != len(images):
        raise ConfigError(f"{len(prompts)} prompts for {len(images)} images: give one for all, or one each.")
    if seeds is not None and len(seeds) != len(images):
        raise ConfigError(f"{len(seeds)} seeds for {len(images)} images: give one per image.")
    for where, encoded in runtime.encoded_batches(images, batch_size):
        own = sampling_seeds(decoding, encoded.seeds) if seeds is None else seeds[where]
        yield encoded, prompts[where], own
