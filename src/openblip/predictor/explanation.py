"""Where in the image a model looked, word by word.

W words, G patches a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from openblip.data.images import ImageInput, read_image
from openblip.errors import ConfigError
from openblip.predictor.overlay import draw_heat


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """How much each patch of the image spoke for a result, through each of its words."""

    text: str
    """The text that was matched, the caption, or the answer."""
    score: float
    """What was explained: P(match), or the log-probability of the caption or the answer with its end."""
    words: tuple[str, ...]
    """Those of the text or caption, or of the question that was answered (of BLIP-2: of the answer); word
    pieces joined."""
    heat: Tensor
    """(W, G, G) float32 on the CPU, not negative, row by row as the picture is; no unit."""
    overall: Tensor
    """(G, G), the mean over all words; of a text that was read and not written also over the first token,
    which stands for the whole, and the end."""

    def overlay(self, image: ImageInput, word: str | int | None = None) -> Image.Image:
        """The picture with the heat of a word over it, or of all: RGB, as large as the picture.

        word: one of `words`, of equal ones the first, or its place. Raises ConfigError for another word and
        ImageError for a picture that cannot be read.
        """
        heat = self.overall if word is None else self.heat[self._place(word)]
        return draw_heat(read_image(image), heat)

    def _place(self, word: str | int) -> int:
        if isinstance(word, str) and word in self.words:
            return self.words.index(word)
        if isinstance(word, int) and -len(self.words) <= word < len(self.words):
            return word
        raise ConfigError(
            f"The explanation has no word {word!r}; it has {', '.join(self.words)}, at places 0 to "
            f"{len(self.words) - 1}."
        )


def join_pieces(pieces: list[str]) -> tuple[list[str], list[list[int]]]:
    """Words, and for each the places of its pieces ("##s" goes on with the word before)."""
    words: list[str] = []
    places: list[list[int]] = []
    for place, piece in enumerate(pieces):
        if piece.startswith("##") and words:
            words[-1] += piece.removeprefix("##")
            places[-1].append(place)
        else:
            words.append(piece)
            places.append([place])
    return words, places


def join_language_pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[tuple[str, ...], list[list[int]]]:
    """The same of a tokenizer of transformers, where a mark ("Ġ", "▁") begins a word; without special
    tokens.

    Raises ConfigError when there are no words.
    """
    pieces: list[list[str]] = []
    places: list[list[int]] = []
    for place, piece in enumerate(tokenizer.convert_ids_to_tokens(list(ids))):
        if ids[place] in tokenizer.all_special_ids:
            continue
        if piece.startswith(("Ġ", "▁")) or not pieces:
            pieces.append([])
            places.append([])
        pieces[-1].append(piece)
        places[-1].append(place)
    words = [tokenizer.convert_tokens_to_string(own).strip() for own in pieces]
    if not any(words):
        raise ConfigError("explain shows where words look: nothing was written.")
    kept = [i for i, word in enumerate(words) if word]
    return tuple(words[i] for i in kept), [places[i] for i in kept]
