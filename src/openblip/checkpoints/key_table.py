"""Key tables: which of another format's tensors each of our parameters is made of.

Ours on the left, theirs on the right; several of theirs are stacked along the first axis. `{i}` is a layer. A
name without .weight or .bias stands for both. Ours are without the mode of `ByMode`. Theirs may begin with
`{text}`: the home of the reading that a parameter belongs to. Formats that keep an encoder and a decoder have
two homes, and a parameter that both readings share is in both.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openblip.errors import CheckpointError
from openblip.models.config import Head

Table = Mapping[str, str | tuple[str, ...]]
Homes = Mapping[str, str]
"""Where a format keeps the text of each reading: mode -> the names' beginning."""

_VARIANT = re.compile(r"\.variants\.([a-z]+)\.")
_LAYER = re.compile(r"\.(\d+)\.")


class Layout(NamedTuple):
    """How a format keeps one kind of model."""

    heads: tuple[Head, ...]
    table: Table
    homes: Homes
    derived: tuple[str, ...]
    """Beginnings of the names whose tensors say nothing new."""
    pooled: bool = False


def translate(
    table: Table,
    theirs: Mapping[str, Tensor],
    ours: set[str],
    unused: tuple[str, ...],
    source: str,
    homes: Homes | None = None,
) -> dict[str, Tensor]:
    """Their weights by our names; CheckpointError lists what is missing, left over or not shared."""
    places = {name: their_places(table, name, homes) for name in ours}
    used = {their_name for alternatives in places.values() for names in alternatives for their_name in names}
    refuse(source, used - theirs.keys(), {n for n in theirs.keys() - used if not n.startswith(unused)})
    _check_stacked(theirs, [names for alternatives in places.values() for names in alternatives], source)
    found, unlike = {}, []
    for name, alternatives in places.items():
        first, *copies = (_stacked([theirs[n] for n in names]) for names in alternatives)
        unlike += [alternatives[0][0] for copy in copies if not torch.equal(copy, first)]
        found[name] = first
    if unlike:
        raise CheckpointError(
            f"{source} says that encoder and decoder share what differs: {'; '.join(sorted(unlike))}."
        )
    return found


def _check_stacked(theirs: Mapping[str, Tensor], parts: Sequence[tuple[str, ...]], source: str) -> None:
    """CheckpointError that lists tensors that would be stacked and have different shapes."""
    unlike = [
        ", ".join(f"{name} {tuple(theirs[name].shape)}" for name in names)
        for names in parts
        if len({theirs[name].shape for name in names}) > 1
    ]
    if unlike:
        raise CheckpointError(
            f"{source} has weights that belong together and differ in shape: {'; '.join(sorted(unlike))}."
        )


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]  # a scalar does not stack


def their_places(table: Table, ours: str, homes: Homes | None = None) -> list[tuple[str, ...]]:
    """What one of our parameters is made of: the table's row, with the layer's number and weight or bias.

    As many times as the format keeps it; without `homes` once.
    """
    variant = _VARIANT.search(ours)
    ours = _VARIANT.sub(".", ours)
    number = _LAYER.search(ours)
    row = ours if number is None else ours.replace(number[0], ".{i}.", 1)
    suffix = ""
    if row not in table:
        row, _, kind = row.rpartition(".")
        suffix = f".{kind}"
    theirs = table[row]
    patterns = (theirs,) if isinstance(theirs, str) else theirs
    places = {
        tuple(pattern.format(i=number[1] if number else "", text=home) + suffix for pattern in patterns): None
        for home in _homes_of(variant, homes)
    }
    return list(places)


def _homes_of(variant: re.Match[str] | None, homes: Homes | None) -> list[str]:
    if not homes:
        return [""]
    if variant is not None and variant[1] in homes:
        return [homes[variant[1]]]
    return list(homes.values())  # shared by all readings


def translate_back(table: Table, ours: Mapping[str, Tensor], homes: Homes | None = None) -> dict[str, Tensor]:
    """Our weights by their names: the inverse of `translate`, what was stacked apart again."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        for names in their_places(table, name, homes):
            theirs |= zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True)
    return theirs


def within(table: Table, ours: str, theirs: str) -> Table:
    """The table of a part, below `ours` and `theirs`."""
    rows = {name: (row,) if isinstance(row, str) else row for name, row in table.items()}
    return {f"{ours}{name}": tuple(f"{theirs}{part}" for part in row) for name, row in rows.items()}


def refuse(source: str, missing: set[str], left_over: set[str]) -> None:
    """CheckpointError that lists what is missing and left over, if anything is."""
    problems = [f"missing {name}" for name in sorted(missing)]
    problems += [f"left over {name}" for name in sorted(left_over)]
    if problems:
        raise CheckpointError(
            f"{source} does not have the weights that its kind of model has: {'; '.join(problems)}."
        )
