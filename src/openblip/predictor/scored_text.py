"""What a model wrote, with how sure it was."""

from dataclasses import dataclass

from openblip.data.tokenizer import Tokenizer
from openblip.generation.generated import Generated


@dataclass(frozen=True)
class ScoredText:
    """A generated text and its log-probability under the model: the sum over its tokens and the end."""

    text: str
    logprob: float


def scored_text(generated: Generated, tokenizer: Tokenizer) -> ScoredText:
    return ScoredText(tokenizer.decode(generated.ids), generated.logprob)
