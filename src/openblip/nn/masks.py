"""The three self-attention masks of the Q-Former (BLIP-2 section 3.2, Figure 2), as data.

A row may attend to the columns marked #. Q queries come first, then T text tokens:

      contrastive (ITC)       matching (ITM)         generation (ITG)
          Q   T                   Q   T                  Q   T
      Q  ###  ...             Q  ###  ###            Q  ###  ...
      Q  ###  ...             Q  ###  ###            Q  ###  ...
      Q  ###  ...             Q  ###  ###            Q  ###  ...
      T  ...  ###             T  ###  ###            T  ###  #..
      T  ...  ###             T  ###  ###            T  ###  ##.
      T  ...  ###             T  ###  ###            T  ###  ###

ITC keeps image and text apart, so neither can look the other up; ITM lets all look at all; in ITG the text
reads the queries and its own past, and the queries never see the text that they are to bring about.

R rows, S = Q + T.
"""

import torch
from torch import Tensor


def contrastive_mask(num_queries: int, num_tokens: int) -> Tensor:
    """Uni-modal: bool (S, S), True where row may attend to column."""
    is_text = torch.arange(num_queries + num_tokens) >= num_queries
    return is_text[:, None] == is_text[None, :]


def matching_mask(num_queries: int, num_tokens: int) -> Tensor:
    """Bi-directional: bool (S, S), True where row may attend to column."""
    return torch.ones(num_queries + num_tokens, num_queries + num_tokens, dtype=torch.bool)


def generation_mask(num_queries: int, num_tokens: int) -> Tensor:
    """Multimodal causal: bool (S, S), True where row may attend to column."""
    mask = torch.ones(num_queries + num_tokens, num_queries + num_tokens, dtype=torch.bool).tril()
    mask[:num_queries, :num_queries] = True
    return mask


def without_padding(mask: Tensor, text_mask: Tensor) -> Tensor:
    """A mask (S, S), and of texts bool (R, T), True at real tokens -> (R, 1, S, S) that hides padding too."""
    num_queries = mask.shape[-1] - text_mask.shape[1]
    real = torch.cat([text_mask.new_ones(len(text_mask), num_queries), text_mask], dim=1)  # (R, S)
    return mask.to(text_mask.device)[None, None] & real[:, None, None, :]
