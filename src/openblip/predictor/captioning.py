"""Captions: what a model says about images by itself."""

from collections.abc import Sequence

import torch

from openblip.errors import ConfigError
from openblip.generation.decoding import Decoding
from openblip.generation.generate import generate
from openblip.predictor.images import Images
from openblip.predictor.runtime import Runtime
from openblip.predictor.scored_text import ScoredText, scored_text
from openblip.predictor.writing import check_length, sampling_seeds


@torch.inference_mode()
def write_captions(
    runtime: Runtime,
    images: Images,
    prompt: str | None,
    decoding: Decoding,
    *,
    num_captions: int,
    batch_size: int | None,
    seeds: Sequence[int] | None,
) -> list[list[ScoredText]]:
    """`num_captions` per image."""
    prompt_ids = runtime.tokenizer.prompt(runtime.prompt if prompt is None else prompt).to(runtime.device)
    check_length(len(prompt_ids), decoding, runtime.model.config.text.max_positions)
    results: list[list[ScoredText]] = []
    for where, encoded in runtime.encoded_batches(images, batch_size):
        generated = generate(
            runtime.model,
            runtime.model.image_kv(encoded.tokens, "decode"),
            prompt_ids,
            len(encoded),
            decoding,
            num_captions=num_captions,
            eos_id=runtime.tokenizer.sep_id,
            pad_id=runtime.tokenizer.pad_id,
            seeds=sampling_seeds(decoding, encoded.seeds) if seeds is None else seeds[where],
        )
        results += [[scored_text(found, runtime.tokenizer) for found in captions] for captions in generated]
    if seeds is not None and len(seeds) != len(results):
        raise ConfigError(f"{len(seeds)} seeds for {len(results)} images: give one per image.")
    return results
