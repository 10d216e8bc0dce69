"""Counts of what is lost between a text and a model: texts that are cut, and words that a vocabulary does not have.

Whatever makes tokens of texts adds to the counts of the innermost `count_texts` of its thread; a call, a command or a
training that reads texts then says what the counts hold.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

WORTH_SAYING = 0.01  # share of unknown tokens
MOST_REMEMBERED = 100_000  # cut texts; a command may read a billion


@dataclass
class TextCounts:
    """What was met within a `count_texts`."""

    texts: int = 0
    """Texts that were made tokens of; one that is read twice counts twice."""
    cut: set[int] = field(default_factory=set)
    """Hashes of the texts that were cut, so that each counts once; no more are added beyond `MOST_REMEMBERED`."""
    limit: int = 0
    """The number of tokens that texts were cut to; the largest where it differed."""
    tokens: int = 0
    """Tokens of the texts, special ones not included."""
    unknown: int = 0
    """Those among them that stand for a word which is not in the vocabulary."""

    @property
    def unknown_share(self) -> float:
        return self.unknown / max(1, self.tokens)

    def add(self, other: "TextCounts") -> None:
        self.texts += other.texts
        if len(self.cut) < MOST_REMEMBERED:
            self.cut |= other.cut
        self.limit = max(self.limit, other.limit)
        self.tokens += other.tokens
        self.unknown += other.unknown

    def cut_line(self) -> str:
        """How many texts were cut, in words; empty for none."""
        if not self.cut:
            return ""
        plural = " was" if len(self.cut) == 1 else "s were"
        number = f"{'at least ' if len(self.cut) >= MOST_REMEMBERED else ''}{len(self.cut):,}"
        return f"{number} text{plural} longer than {self.limit} tokens and cut"

    def unknown_line(self) -> str:
        """The share of unknown tokens, in words; empty where it is not `WORTH_SAYING`."""
        share = self.unknown_share
        if share <= WORTH_SAYING:
            return ""
        return f"{share:.0%} of the tokens of the texts are unknown to the model's vocabulary ([UNK])"


_COUNTS: ContextVar[TextCounts | None] = ContextVar("counts of texts", default=None)


@contextmanager
def count_texts(say: Callable[[str], object] | None = None, *, apart: bool = False) -> Iterator[TextCounts]:
    """Count the texts that are made tokens of within, also for a `count_texts` around it unless it is kept `apart`.

    say: is called at the end with a line about what was lost, if anything was and there is no `count_texts` around.
    """
    around, counts = None if apart else _COUNTS.get(), TextCounts()
    token = _COUNTS.set(counts)
    try:
        yield counts
    finally:
        _COUNTS.reset(token)
        if around is not None:
            around.add(counts)
    lines = [line for line in (counts.cut_line(), counts.unknown_line()) if line]
    if say is not None and around is None and lines:
        say("; ".join(lines))


def count_text(text: str, *, num_tokens: int, num_unknown: int, is_cut: bool = False, limit: int = 0) -> None:
    """Add a text to the counts.

    num_tokens: of those that are kept, special tokens not included. num_unknown: among these. limit: what it was cut
    to, special tokens included.
    """
    if (counts := _COUNTS.get()) is not None:
        cut, limit = ({hash(text)}, limit) if is_cut else (set(), 0)
        counts.add(TextCounts(texts=1, cut=cut, limit=limit, tokens=num_tokens, unknown=num_unknown))


def warn_caller(line: str) -> None:
    """What a function says that `count_texts` decorates: a warning at the line that called the function."""
    warnings.warn(line, stacklevel=5)
