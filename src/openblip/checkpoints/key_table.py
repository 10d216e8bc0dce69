"""Key tables: which of another format's tensors each of our parameters is made of.

Ours on the left, theirs on the right; several of theirs are stacked along the first axis. `{i}` is a layer. A
name without .weight or .bias stands for both. Ours are without the mode of `ByMode`: all readings are made of
the same tensors.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from openblip.errors import CheckpointError

Table = Mapping[str, str | tuple[str, ...]]


def translate(
    table: Table, theirs: Mapping[str, Tensor], ours: set[str], unused: tuple[str, ...], source: str
) -> dict[str, Tensor]:
    """Their weights by our names; CheckpointError lists what is missing and what is left over."""
    origins = {name: their_names(table, name) for name in ours}
    used = {name for names in origins.values() for name in names}
    refuse(source, used - theirs.keys(), {n for n in theirs.keys() - used if not n.startswith(unused)})
    return {name: torch.cat([theirs[n] for n in names]) for name, names in origins.items()}


def their_names(table: Table, ours: str) -> tuple[str, ...]:
    """What one of our parameters is made of: the table's row, with the layer's number and weight or bias."""
    ours = re.sub(r"\.variants\.[a-z]+\.", ".", ours)
    number = re.search(r"\.(\d+)\.", ours)
    row = ours if number is None else ours.replace(number[0], ".{i}.", 1)
    suffix = ""
    if row not in table:
        row, _, kind = row.rpartition(".")
        suffix = f".{kind}"
    theirs = table[row]
    names = (theirs,) if isinstance(theirs, str) else theirs
    return tuple(name.format(i=number[1] if number else "") + suffix for name in names)


def translate_back(table: Table, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by their names: the inverse of `translate`, what was stacked apart again."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        names = their_names(table, name)
        theirs |= zip(names, tensor.chunk(len(names)), strict=True)
    return theirs


def refuse(source: str, missing: set[str], left_over: set[str]) -> None:
    """CheckpointError that lists what is missing and left over, if anything is."""
    problems = [f"missing {name}" for name in sorted(missing)]
    problems += [f"left over {name}" for name in sorted(left_over)]
    if problems:
        raise CheckpointError(
            f"{source} does not have the weights that its kind of model has: {'; '.join(problems)}."
        )
