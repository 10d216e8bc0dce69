"""Caption tokens as COCO evaluation counts them: Penn-Treebank tokens, lower-case, without punctuation.

The reference is Stanford's PTBTokenizer, a Java program that pycocoevalcap carries. Where Java does not run
that package has no other, and `tokenize_in_python` follows the same rules for everything captions usually
contain.
"""

import re
from collections.abc import Sequence

from openblip.metrics.java_programs import PUNCTUATION, java_runs, tokenize_with_java

_PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u201c\u201d", '"'),
        **dict.fromkeys("\u2018\u2019", "'"),
        **dict.fromkeys("\u2013\u2014", " -- "),
        "\u2026": " ... ",
    }
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPLITS = [
    (re.compile(r"\b(can(?=not)|(?:gon|wan)(?=na)|got(?=ta)|(?:lem|gim)(?=me))(not|na|ta|me)\b"), r"\1 \2"),
    (re.compile(r"(?<=\w)(n't)\b"), r" \1"),
    (re.compile(r"(?<=\w)('(?:s|m|d|ll|re|ve))\b"), r" \1"),
]
_TOKEN = re.compile(
    r"""
    (?:https?://|www\.)\S*\w            # addresses
  | [\w.+-]*\w@\w[\w-]*(?:\.\w+)+
  | (?:[\w-]+\.)+(?:com|net|org)\b
  | (?:[^\W\d_]\.){2,}                  # u.s., e.g.
  | \b(?:mr|mrs|ms|dr|jr|sr|vs|etc|inc|ltd|prof|st|co)\.
  | n't\b | '(?:s|m|d|ll|re|ve)\b       # split off above
  | [#@]\w+
  | o'clock\b
  | \d+(?:[.,:/]\d+)+                   # 5.00, 10,000, 3:30, 1/2
  | \w+(?:[-/]\w+)*                     # two-door, and/or
  | \.\.\. | -- | [?!]{2,}
  | \S
    """,
    re.VERBOSE,
)


def tokenize_captions(captions: Sequence[str]) -> list[str]:
    """Return the tokens of every caption, joined by spaces: the official ones where Java runs.

    Raises `MissingExtraError` where Java runs, but pycocoevalcap, which carries the tokenizer, is not installed.
    """
    return tokenize_with_java(captions) if java_runs() else tokenize_in_python(captions)


def tokenize_in_python(captions: Sequence[str]) -> list[str]:
    """Tokenize as the official tokenizer does, by a few regular expressions."""
    tokenized = []
    for caption in captions:
        text = caption.translate(_PLAIN).lower()
        for pattern, replacement in _SPLITS:
            text = pattern.sub(replacement, text)
        tokens = (match.group() for match in _TOKEN.finditer(text))
        kept = (_BRACKETS.get(token, token) for token in tokens if token not in PUNCTUATION and token != '"')
        tokenized.append(" ".join(kept))
    return tokenized
