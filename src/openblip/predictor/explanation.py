"""Where in the image a model looked, word by word.

W words, G patches a side.
"""

from dataclasses import dataclass

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
    """Those of the text or caption, or of the question that was answered; word pieces joined."""
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
