"""The words of a checkpoint of another format."""

import os
from pathlib import Path
from typing import Any

from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError

BERT = "bert-base-uncased"  # whose vocabulary all released models have


def find_tokenizer(source: Path, folder: Path, named: str | os.PathLike[str] | None) -> Tokenizer:
    """The one that `named` names, else the folder's, else BERT's from the hub.

    Raises CheckpointError that says what to provide for `source`, where there is none of these.
    """
    if named is not None:
        return Tokenizer.load(os.fspath(named))
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file():
        return Tokenizer.load(folder)
    try:
        return Tokenizer.load(BERT)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source} has no vocabulary. Put the tokenizer.json or vocab.txt of {BERT} into {folder}, or "
            f"name its folder as the tokenizer; by name it could not be fetched: {error}."
        ) from error


def tokenizer_of_file(path: Path, entry: Any, named: str | os.PathLike[str] | None) -> Tokenizer:
    """As `find_tokenizer`, for a .pth file: before what lies beside it goes what OpenBLIP wrote into it."""
    if named is None and entry is not None and "tokenizer" in entry:
        try:
            return Tokenizer.from_json(str(entry["tokenizer"]))
        except CheckpointError as error:
            raise CheckpointError(f"{path}, its openblip entry: {error}") from error
    return find_tokenizer(path, path.parent, named)
