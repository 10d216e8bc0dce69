"""What a model wrote, with how sure it was."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from openblip.data.tokenizer import Tokenizer
from openblip.generation.search import Generated
from openblip.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A caption or an answer with its log-probability under the model (natural logarithm)."""

    text: str
    logprob: float
    """Of the whole text: the sum of `token_logprobs`."""
    tokens: tuple[str, ...]
    """The word pieces as the vocabulary has them, and last the end ([SEP]) unless the text was cut off at its
    longest. BLIP's "##s" goes on with a word; a language model's have their own marks ("Ġdog", "▁dog")."""
    token_logprobs: tuple[float, ...]
    """Of each of `tokens` after those before it; `math.exp` makes a probability of one."""
    ids: tuple[int, ...]
    """The places of `tokens` in the vocabulary."""


class TextScore(NamedTuple):
    """How well a text describes its image."""

    itm: float
    """P(match) of the ITM head."""
    itc: float
    """Cosine of the ITC embeddings."""


def scored_text(generated: Generated, tokenizer: Tokenizer, text: str | None = None) -> ScoredText:
    """`text`: what it stands for, where that is not just its tokens read out."""
    ids = _with_end(generated, tokenizer.sep_id)
    text = tokenizer.decode(generated.ids) if text is None else text
    return _scored(generated, text, ids, tokenizer.pieces(ids))


def text_of_language(generated: Generated, language: LanguageModel, text: str | None = None) -> ScoredText:
    """The same of a language model with words of its own."""
    ids = _with_end(generated, language.end_id)
    text = language.decode(generated.ids) if text is None else text
    return _scored(generated, text, ids, language.tokenizer.convert_ids_to_tokens(list(ids)))


def _with_end(generated: Generated, end_id: int) -> tuple[int, ...]:
    ended = len(generated.token_logprobs) > len(generated.ids)
    return (*generated.ids, end_id) if ended else tuple(generated.ids)


def _scored(generated: Generated, text: str, ids: tuple[int, ...], tokens: Iterable[str]) -> ScoredText:
    return ScoredText(
        text=text,
        logprob=generated.logprob,
        tokens=tuple(tokens),
        token_logprobs=generated.token_logprobs,
        ids=ids,
    )
