"""Dialogs and conversations about an image, as callers write them."""

from collections.abc import Sequence

from openblip.errors import ConfigError

Dialog = Sequence[str | tuple[str, str]]
"""Earlier rounds, each as (question, answer) or in one string, and last the open question."""
Conversation = str | Sequence[str | tuple[str, str]]
"""Earlier turns as (question, answer), and last the open question; or that alone."""


def read_turns(conversation: Conversation, position: int) -> tuple[list[tuple[str, str]], str]:
    """Turns that are answered, and the open question; ConfigError for anything else."""
    turns = [conversation] if isinstance(conversation, str) else list(conversation)
    *earlier, question = turns or [""]
    answered = [(turn[0], turn[1]) for turn in earlier if not isinstance(turn, str) and len(turn) == 2]
    if not isinstance(question, str) or not question.strip() or len(answered) != len(earlier):
        raise ConfigError(
            f"chat: conversation {position} is no list of (question, answer) pairs that ends with the open "
            "question, a string."
        )
    return answered, question.strip()
