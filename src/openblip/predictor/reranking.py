"""How ITM re-ranks what ITC has found (BLIP section 5.1), in evaluation and in search."""

from torch import Tensor


def rerank_scores(scores: Tensor, itm: Tensor, chosen: Tensor) -> Tensor:
    """Return ITC scores with `itm` added where `chosen`, raised so far that these come before all others.

    All three have one shape. Deviation: callers give P(match) as `itm`, where the released code adds the raw logit.
    """
    above_all_others = scores.max() - scores.min() + 1.0
    return scores + chosen * (itm + above_all_others)
