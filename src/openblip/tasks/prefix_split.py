"""Texts cut in two for prefix language modelling: an encoder reads the prefix, a decoder writes the rest.

BLIP-2 section 3.3; the place of the cut is its author's word (LAVIS issue 139).

G joint batch of all processes.
"""

from collections.abc import Sequence

import torch

from openblip.distributed import local_rows, world_size


def split_prefixes(texts: Sequence[str], generator: torch.Generator) -> tuple[list[str], list[str]]:
    """The prefixes and the rest of this process's texts, each cut by `split_at_random`."""
    drawn = _shares(len(texts), 1, generator)
    cut = [split_at_random(text, share) for text, (share,) in zip(texts, drawn, strict=True)]
    return [prefix for prefix, _ in cut], [rest for _, rest in cut]


def split_documents(texts: Sequence[str], generator: torch.Generator) -> list[tuple[str, str]]:
    """The prefix and the rest of each of this process's texts, cut by `split_document`."""
    drawn = _shares(len(texts), 3, generator)
    return [split_document(text, *shares) for text, shares in zip(texts, drawn, strict=True)]


def split_at_random(text: str, share: float) -> tuple[str, str]:
    """The first words and the rest; for `share` uniform from 0 to 1 their number is, from 1 to half of them.

    A single word is all rest. Blanks around the cut are left out.
    """
    words = text.split(" ")
    if len(words) < 2:
        return "", text
    cut = _between(1, len(words) // 2, share)
    return " ".join(words[:cut]), " ".join(words[cut:])


def split_document(text: str, line_share: float, way: float, word_share: float) -> tuple[str, str]:
    """A text of several lines: one after the first is cut, those before it are read, those after it left out.

    Every other time it is cut where an answer begins, behind its last colon, or else the line is all rest;
    otherwise as `split_at_random`. A text of one line is cut at random. All shares: uniform from 0 to 1.
    """
    lines = text.split("\n")
    if len(lines) == 1:
        return split_at_random(text, word_share)
    place = _between(1, len(lines) - 1, line_share)
    line = lines[place]
    if way < 0.5:
        question, colon, answer = line.rpartition(": ")
        prefix, rest = question + colon.strip(), answer
    else:
        prefix, rest = split_at_random(line, word_share)
    return "\n".join([*lines[:place], prefix]), rest


def _shares(num_texts: int, num_draws: int, generator: torch.Generator) -> list[list[float]]:
    """Draws for this process's texts, out of those for all G, which every process draws alike.

    So several processes cut as one process would, whatever the length of each one's texts.
    """
    joint = torch.rand(num_texts * world_size(), num_draws, generator=generator, dtype=torch.float64)
    shares: list[list[float]] = local_rows(joint, num_texts).tolist()
    return shares


def _between(low: int, high: int, share: float) -> int:
    """A number from `low` to `high`, both included."""
    return low + int(share * (high - low + 1))
