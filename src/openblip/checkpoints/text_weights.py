"""What the text weights of transformers' and of the original files say; both name them as BERT does.

D width, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from openblip.checkpoints.key_table import Homes
from openblip.errors import CheckpointError
from openblip.models.config import Sharing

_SELF_ATTENTION = ".attention."  # with its output and its norm; cross-attention is .crossattention.
_DECODER = "text_decoder"


def infer_sharing(theirs: Mapping[str, Tensor], homes: Homes) -> Sharing:
    """What encoder and decoder share: as in the paper where their tensors are the same, else nothing."""
    if len(homes) == 1:
        return "all_but_sa"  # one reading: nothing to share it with
    encoder, decoder = homes["encode"], homes["decode"]
    for name, tensor in theirs.items():
        is_text = name.startswith(f"{encoder}.") and not name.endswith(".position_ids")
        if is_text and _SELF_ATTENTION not in name:
            twin = theirs.get(decoder + name.removeprefix(encoder))
            if twin is None or not torch.equal(tensor, twin):
                return "none"
    return "all_but_sa"


def _tied(decoder: str) -> dict[str, str]:
    """What a decoder keeps twice: the copy's name -> the name of what it is a copy of."""
    head = f"{decoder}.cls.predictions"
    return {
        f"{head}.decoder.weight": f"{decoder}.bert.embeddings.word_embeddings.weight",
        f"{head}.decoder.bias": f"{head}.bias",
    }


def check_tied(theirs: Mapping[str, Tensor], source: str, decoder: str = _DECODER) -> None:
    """The decoder's matrix (V, D) and bias, where a file has them, are those that ours computes with."""
    for copy, original in _tied(decoder).items():
        if copy in theirs and original in theirs and not torch.equal(theirs[copy], theirs[original]):
            raise CheckpointError(f"{source}: {copy} differs from {original}; BLIP's decoder has them tied.")


def tied_copies(theirs: Mapping[str, Tensor], decoder: str = _DECODER) -> dict[str, Tensor]:
    """What `check_tied` looks at, for a file that is to have it."""
    if f"{decoder}.cls.predictions.bias" not in theirs:
        return {}
    return {copy: theirs[original] for copy, original in _tied(decoder).items()}
