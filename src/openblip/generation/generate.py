"""The one entry to decoding: images in, token ids and their log-probabilities out.

B images, P prompt tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from openblip.errors import ConfigError
from openblip.generation.beam import beam_search
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus
from openblip.generation.generated import Generated
from openblip.generation.interface import DecoderContext, TextDecoder
from openblip.generation.sampling import choose_most_likely, decode_rows, nucleus_chooser


@torch.inference_mode()
def generate(
    model: TextDecoder,
    context_kv: DecoderContext,
    prompt_ids: Tensor,
    num_images: int,
    decoding: Decoding,
    *,
    num_captions: int = 1,
    eos_id: int,
    pad_id: int,
    seeds: Sequence[int] | None = None,
) -> list[list[Generated]]:
    """Write `num_captions` texts for each of `num_images` images.

    `context_kv` holds the images once; beams and samples share it. `prompt_ids` int64 (P,) starts with the
    decoder's first token ([DEC]) and is the same for all images; it lies on the model's device. A text ends
    with `eos_id` or after `decoding.max_new_tokens` tokens.

    Several captions are the best beams (`Beam`, best first) or independent samples (`Nucleus`). A `Nucleus`
    token depends only on the logits and on (seed of the image, number of the caption, step): not on the other
    images, their order or their number. `seeds` gives the B seeds (any integers, taken modulo 2**64);
    without, they come from `decoding.seed` and the image's position, or from fresh entropy when that is None
    too. No global random state is read or changed.

    Returns: per image, `num_captions` of `Generated`.

    Raises:
        ConfigError: `num_captions` that the strategy cannot give, a prompt that is empty or not
            one-dimensional, or a number of seeds other than `num_images`.
        CheckpointError: the model's logits are not numbers.
    """
    if prompt_ids.dim() != 1 or len(prompt_ids) == 0:
        raise ConfigError(
            f"generate: prompt_ids has the shape {tuple(prompt_ids.shape)}; "
            "give one row with at least the first token"
        )
    check_request(num_images, decoding, num_captions, seeds)
    if num_images == 0:
        return []
    if isinstance(decoding, Beam) and decoding.num_beams > 1:
        return beam_search(
            model, context_kv, prompt_ids, num_images, decoding,
            num_captions=num_captions, eos_id=eos_id, pad_id=pad_id,
        )  # fmt: skip
    if isinstance(decoding, Nucleus):
        image_seeds = derive_seeds(decoding.seed, num_images) if seeds is None else seeds
        choose = nucleus_chooser(decoding, image_seeds, num_captions, prompt_ids.device)
    else:
        choose = choose_most_likely
    return decode_rows(
        model, context_kv, prompt_ids, num_images, decoding, choose,
        num_captions=num_captions, eos_id=eos_id, pad_id=pad_id,
    )  # fmt: skip


def derive_seeds(seed: int | None, num_images: int) -> list[int]:
    """One seed per image position, from `seed` (the first n are the same for every number of images >= n)."""
    root = np.random.SeedSequence(seed)
    return [int(child.generate_state(1, np.uint64)[0]) for child in root.spawn(num_images)]


def check_request(
    num_images: int, decoding: Decoding, num_captions: int, seeds: Sequence[int] | None
) -> None:
    """ConfigError unless the strategy gives so many texts, and there is a seed for each image."""
    if num_captions < 1:
        raise ConfigError(f"generate: num_captions is {num_captions}; it must be at least 1")
    if isinstance(decoding, Greedy) and num_captions > 1:
        raise ConfigError(
            f"generate: {num_captions} captions per image were asked for, but Greedy writes one; "
            "use Nucleus or Beam"
        )
    if isinstance(decoding, Beam) and num_captions > decoding.num_beams:
        raise ConfigError(
            f"generate: {num_captions} captions per image were asked for, but Beam has num_beams "
            f"{decoding.num_beams}; raise num_beams"
        )
    if seeds is not None and len(seeds) != num_images:
        raise ConfigError(f"generate: {len(seeds)} seeds for {num_images} images; give one per image")
