"""What a model wrote, with how sure it was."""

from dataclasses import dataclass

from openblip.data.tokenizer import Tokenizer
from openblip.generation.generated import Generated


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A caption or an answer with its log-probability under the model (natural logarithm)."""

    text: str
    logprob: float
    """Of the whole text: the sum of `token_logprobs`."""
    tokens: tuple[str, ...]
    """The word pieces as the vocabulary has them ("##s" goes on with a word), and last [SEP], the end, unless
    the text was cut off at its longest."""
    token_logprobs: tuple[float, ...]
    """Of each of `tokens` after those before it; `math.exp` makes a probability of one."""
    ids: tuple[int, ...]
    """The places of `tokens` in the vocabulary."""


def scored_text(generated: Generated, tokenizer: Tokenizer, text: str | None = None) -> ScoredText:
    """`text`: what it stands for, where that is not just its tokens read out."""
    ended = len(generated.token_logprobs) > len(generated.ids)
    ids = (*generated.ids, tokenizer.sep_id) if ended else tuple(generated.ids)
    return ScoredText(
        text=tokenizer.decode(generated.ids) if text is None else text,
        logprob=generated.logprob,
        tokens=tuple(tokenizer.pieces(ids)),
        token_logprobs=generated.token_logprobs,
        ids=ids,
    )
