"""What decoding returns."""

import math
from dataclasses import dataclass

from torch import Tensor

from openblip.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """One generated text.

    `ids`: the tokens without prompt and end token. `token_logprobs`: natural log-probability of every
    generated token under the model's own distribution (temperature 1, no nucleus, no penalty, no minimum
    length), in order; one longer than `ids` when the end token was generated, which counts. `logprob`: their
    sum.
    """

    ids: list[int]
    token_logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        return sum(self.token_logprobs)


def to_generated(tokens: Tensor, token_logprobs: Tensor, length: int, eos_id: int) -> Generated:
    """The text in the first `length` of tokens (S,) and token_logprobs (S,), both on the CPU.

    Raises:
        CheckpointError: a log-probability is not a number.
    """
    ids: list[int] = tokens[:length].tolist()
    logprobs: list[float] = token_logprobs[:length].tolist()
    if any(math.isnan(logprob) for logprob in logprobs):
        raise CheckpointError(
            "The model gave probabilities that are not numbers while writing; "
            "its weights are damaged, or the dtype is too narrow: try float32"
        )
    if ids and ids[-1] == eos_id:
        ids.pop()
    return Generated(ids=ids, token_logprobs=tuple(logprobs))
