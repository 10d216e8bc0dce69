"""Token ids of a batch, made ready for a reading.

R texts, T text tokens.
"""

import torch
import torch.nn.functional as F

from openblip.data.tokenizer import Tokens


def replace_first(tokens: Tokens, token_id: int) -> Tokens:
    """The same texts (R, T), beginning with `token_id`."""
    ids = tokens.ids.clone()
    ids[:, 0] = token_id
    return Tokens(ids, tokens.mask)


def interleave(first: Tokens, second: Tokens) -> Tokens:
    """Two sets of B texts -> (2B, T): first[0], second[0], first[1], ..., padded to the longer."""
    length = max(first.ids.shape[1], second.ids.shape[1])
    ids = [F.pad(t.ids, (0, length - t.ids.shape[1])) for t in (first, second)]
    mask = [F.pad(t.mask, (0, length - t.mask.shape[1])) for t in (first, second)]
    return Tokens(torch.stack(ids, dim=1).flatten(0, 1), torch.stack(mask, dim=1).flatten(0, 1))
