"""Answers to choose from."""

from collections.abc import Sequence

from openblip.errors import ConfigError
from openblip.predictor.batching import as_list

Candidates = Sequence[str] | Sequence[Sequence[str]]
"""For all questions, or a list for each."""


def split_candidates(
    candidates: Candidates, num_questions: int
) -> tuple[Sequence[str], Sequence[Sequence[str]] | None]:
    """Candidates for all questions, or those of each; ConfigError for none or the wrong number of lists."""
    given: list[str | Sequence[str]] = as_list(candidates)
    if not given:
        raise ConfigError("answer: the list of candidates is empty; leave it out to have answers written.")
    texts = [each for each in given if isinstance(each, str)]
    if len(texts) == len(given):
        return texts, None
    lists = [list(each) for each in given if not isinstance(each, str)]
    if texts or len(lists) != num_questions or not all(lists):
        raise ConfigError(
            f"answer: candidates are texts for all {num_questions} questions, or one list that is not empty "
            "for each of them."
        )
    return [], lists
