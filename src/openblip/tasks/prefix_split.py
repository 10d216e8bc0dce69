"""Where a text is cut in two for prefix language modelling: an encoder reads the prefix, a decoder writes the rest.

BLIP-2 section 3.3; the place of the cut is its author's word (LAVIS issue 139).
"""

from collections.abc import Sequence

import torch


def split_prefixes(texts: Sequence[str], generator: torch.Generator) -> tuple[list[str], list[str]]:
    """The prefixes and the rests of texts, each cut by `split_at_random`."""
    cut = [split_at_random(text, generator) for text in texts]
    return [prefix for prefix, _ in cut], [rest for _, rest in cut]


def split_at_random(text: str, generator: torch.Generator) -> tuple[str, str]:
    """The first words and the rest; the number of first words is uniform from 1 to half of them.

    A single word is all rest. Blanks around the cut are left out.
    """
    words = text.split(" ")
    if len(words) < 2:
        return "", text
    cut = _draw(1, len(words) // 2, generator)
    return " ".join(words[:cut]), " ".join(words[cut:])


def split_document(text: str, generator: torch.Generator) -> tuple[str, str]:
    """A text of several lines: one line after the first is cut, lines before it are read, those after it left out.

    Every other time it is cut where an answer begins, behind its last colon, or else the line is all rest;
    otherwise as `split_at_random`. A text of one line is cut at random.
    """
    lines = text.split("\n")
    if len(lines) == 1:
        return split_at_random(text, generator)
    place = _draw(1, len(lines) - 1, generator)
    line = lines[place]
    if _draw(0, 1, generator):
        question, colon, answer = line.rpartition(": ")
        prefix, rest = question + colon.strip(), answer
    else:
        prefix, rest = split_at_random(line, generator)
    return "\n".join([*lines[:place], prefix]), rest


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    """A number from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
