"""Cutting texts in two for prefix language modelling: an encoder reads the prefix, a decoder writes the rest.

BLIP-2 section 3.3. The paper does not say where a text is cut; here it is cut as its author describes in LAVIS issue
139. All shares are uniform from 0 to 1.

G joint batch of all processes.
"""

from collections.abc import Sequence

import torch

from openblip.distributed import local_rows, world_size


def split_prefixes(texts: Sequence[str], generator: torch.Generator) -> tuple[list[str], list[str]]:
    """The prefix and the rest of each of this process's texts, cut by `split_at_random`."""
    draws = _draws(len(texts), 1, generator)
    pairs = [split_at_random(text, share) for text, (share,) in zip(texts, draws, strict=True)]
    return [prefix for prefix, _ in pairs], [rest for _, rest in pairs]


def split_documents(texts: Sequence[str], generator: torch.Generator) -> list[tuple[str, str]]:
    """The prefix and the rest of each of this process's texts, cut by `split_document`."""
    draws = _draws(len(texts), 3, generator)
    return [split_document(text, *shares) for text, shares in zip(texts, draws, strict=True)]


def split_at_random(text: str, share: float) -> tuple[str, str]:
    """The first words of a text, and the rest, without the space between them.

    The number of first words is uniform from 1 to half of all. A text of one word has an empty prefix.
    """
    words = text.split(" ")
    if len(words) < 2:
        return "", text
    cut = _integer_between(1, len(words) // 2, share)
    return " ".join(words[:cut]), " ".join(words[cut:])


def split_document(text: str, line_share: float, cut_share: float, word_share: float) -> tuple[str, str]:
    """A text of several lines: one line after the first is cut, and the lines after it are left out.

    The prefix holds all lines before the cut. In a random half of the cases the line is cut at a natural place: after
    its last colon, where an answer begins, and without a colon before the line; otherwise at random. A text of one line
    is cut at random.
    """
    lines = text.split("\n")
    if len(lines) == 1:
        return split_at_random(text, word_share)
    number = _integer_between(1, len(lines) - 1, line_share)
    line = lines[number]
    if cut_share < 0.5:
        question, colon, answer = line.rpartition(": ")
        prefix, rest = question + colon.strip(), answer
    else:
        prefix, rest = split_at_random(line, word_share)
    return "\n".join([*lines[:number], prefix]), rest


def _draws(num_texts: int, num_shares: int, generator: torch.Generator) -> list[list[float]]:
    """Shares for this process's texts, out of those for all G, which every process draws alike.

    So several processes cut as one process would, whatever the lengths of their texts.
    """
    joint = torch.rand(num_texts * world_size(), num_shares, generator=generator, dtype=torch.float64)
    draws: list[list[float]] = local_rows(joint, num_texts).tolist()
    return draws


def _integer_between(low: int, high: int, share: float) -> int:
    """A number from `low` to `high`, both included, uniform for `share` uniform from 0 to 1."""
    return low + int(share * (high - low + 1))
