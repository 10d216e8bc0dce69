"""What captions and answers have in common: how they are written, and the seeds they are sampled by."""

import hashlib
import secrets
from collections.abc import Sequence

from openblip.errors import ConfigError
from openblip.generation.decoding import Beam, Decoding, Nucleus

CAPTION_DECODING = Beam(num_beams=3, max_new_tokens=20)
ANSWER_DECODING = Beam(num_beams=3, max_new_tokens=10, min_new_tokens=1)  # released code
LANGUAGE_ANSWER_DECODING = Beam(num_beams=5, max_new_tokens=10, min_new_tokens=1, length_penalty=-1.0)
"""BLIP-2 section 4.1."""
CHAT_DECODING = Beam(num_beams=5, max_new_tokens=30, min_new_tokens=1)  # released code


def check_length(prompt_length: int, decoding: Decoding, positions: int) -> None:
    """ConfigError when a text may grow longer than the model has positions."""
    longest = prompt_length + decoding.max_new_tokens - 1  # the last token is not read
    if longest > positions:
        raise ConfigError(
            f"max_new_tokens {decoding.max_new_tokens} after a prompt of {prompt_length} tokens: the "
            f"model reads at most {positions}; ask for {max(positions - prompt_length + 1, 0)} or fewer."
        )


def sampling_seeds(decoding: Decoding, inputs: Sequence[object]) -> list[int] | None:
    """Seeds of `Nucleus`: its own joined with each input (a picture's hash, a question); fresh ones where it
    has none.
    """
    if not isinstance(decoding, Nucleus):
        return None
    if decoding.seed is None:
        return [secrets.randbits(63) for _ in inputs]
    joined = [hashlib.blake2b(f"{decoding.seed},{each}".encode(), digest_size=8) for each in inputs]
    return [int.from_bytes(digest.digest(), "big") >> 1 for digest in joined]
