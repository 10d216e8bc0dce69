"""How texts are put to a model, in training and in use alike: normalised, joined to a prompt, and how long.

No torch here: recipes read the limits.
"""

import re
from collections.abc import Sequence

MAX_QUESTION_TOKENS = 35  # released code
MAX_STATEMENT_WORDS = 40  # released code
MAX_DIALOG_TOKENS = 256  # ten rounds of VisDial have about 150 tokens
MAX_DIALOG_CAPTION_TOKENS = 40

_STRIPPED = re.compile(r"[.!\"()*#:;~]")
_SENTENCE_ENDS = (".", "!", "?")


def normalize_caption(text: str, max_words: int = 30) -> str:
    """BLIP's `pre_caption`: lower case, `.!"()*#:;~` become spaces, one space between words, at most
    `max_words` words.
    """
    return " ".join(_STRIPPED.sub(" ", text.lower()).split()[:max_words])


def normalize_question(text: str, max_words: int = 50) -> str:
    """BLIP's `pre_question`: lower case, `.!"()*#:;~` are removed, at most `max_words` words; "?" stays."""
    return " ".join(_STRIPPED.sub("", text.lower()).split()[:max_words])


def conversation_prompt(question_prompt: str, earlier: Sequence[tuple[str, str]], question: str) -> str:
    """A question after the turns before it: "Question: is it red? Answer: no. Question: why? Answer:".

    BLIP-2 puts a single question this way; several turns are joined as in the examples of its Figure 4.

    Args:
        question_prompt: how one question is put, with `{}` in its place.
        earlier: questions and answers of the turns before.
        question: the question without an answer.
    """
    turns = [f"{question_prompt.format(asked)} {_as_sentence(answer)}" for asked, answer in earlier]
    return " ".join([*turns, question_prompt.format(question)])


def _as_sentence(answer: str) -> str:
    return answer if answer.endswith(_SENTENCE_ENDS) else f"{answer}."


def dialog_turns(rounds: Sequence[tuple[str, str]], question: str, answer: str) -> list[str]:
    """A dialog as the turns that `Tokenizer.encode_turns` takes (BLIP section 5.5).

    Each earlier question is followed by its answer, and the last question by the answer to be judged. Texts
    are normalised as questions are. The paper leaves this format open.
    """
    return [
        f"{normalize_question(asked)} {normalize_question(said)}".strip()
        for asked, said in (*rounds, (question, answer))
    ]
