"""How a dialog about a picture becomes a text (BLIP section 5.5; the paper leaves the format open)."""

from collections.abc import Sequence

from openblip.data.tokenizer import normalize_question

MAX_DIALOG_TOKENS = 256  # ten rounds of VisDial have about 150 word pieces
MAX_CAPTION_TOKENS = 40


def dialog_turns(rounds: Sequence[tuple[str, str]], question: str, answer: str) -> list[str]:
    """The turns that `Tokenizer.encode_turns` reads: earlier questions with their answers, and the answer in
    question behind the open question. Texts are normalised as questions are.
    """
    return [
        f"{normalize_question(asked)} {normalize_question(said)}".strip()
        for asked, said in (*rounds, (question, answer))
    ]
