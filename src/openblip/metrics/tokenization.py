"""Caption tokens as COCO evaluation counts them: Penn-Treebank tokens, lower-case, without punctuation.

The reference is Stanford's PTBTokenizer, a Java program that pycocoevalcap carries. Where Java does not run,
`tokenize_in_python` follows the same rules for everything captions usually contain.
"""

import functools
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from openblip.errors import MissingExtraError

# What COCO evaluation removes after tokenizing. It would also remove -LRB- and its like, but looks for them
# in lower-cased text, so brackets stay.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

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
    """The tokens of every caption, joined by blanks: official where Java runs, else the Python ones.

    Raises:
        MissingExtraError: Java runs, but pycocoevalcap, which carries the tokenizer, is not installed.
    """
    return tokenize_with_java(captions) if java_runs() else tokenize_in_python(captions)


@functools.cache
def java_runs() -> bool:
    """Whether a working Java is on the path (macOS has a `java` that only tells where to get one)."""
    java = shutil.which("java")
    if java is None:
        return False
    return subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0


def tokenize_in_python(captions: Sequence[str]) -> list[str]:
    """As the official tokenizer, by a few regular expressions."""
    return [" ".join(_tokens(caption)) for caption in captions]


def _tokens(caption: str) -> list[str]:
    text = caption.translate(_PLAIN).lower()
    for pattern, replacement in _SPLITS:
        text = pattern.sub(replacement, text)
    tokens = (match.group() for match in _TOKEN.finditer(text))
    return [_BRACKETS.get(token, token) for token in tokens if token not in PUNCTUATION and token != '"']


def tokenize_with_java(captions: Sequence[str]) -> list[str]:
    """The official tokenizer, with the options of COCO evaluation.

    Raises:
        MissingExtraError: pycocoevalcap, which carries it, is not installed, or Java cannot run it.
    """
    jar = pycocoevalcap_folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    # One line per caption: whatever Java takes for the end of a line must not be inside one.
    lines = [" ".join(caption.split()) for caption in captions]
    # -encoding: Java before 18 would take the locale's.
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    answer = subprocess.run(
        command + options, input="\n".join(lines) + "\n", capture_output=True, check=False, encoding="utf-8"
    )
    if answer.returncode != 0:
        raise MissingExtraError(
            f"Java cannot run the tokenizer of COCO evaluation: {complaint(answer.stderr)}. Repair Java, or "
            "take it off the PATH to have captions tokenized in Python"
        )
    tokenized = answer.stdout.split("\n")[: len(captions)]
    return [" ".join(token for token in line.split() if token not in PUNCTUATION) for line in tokenized]


def pycocoevalcap_folder() -> Path:
    """Where the package is, which carries the Java programs.

    Raises:
        MissingExtraError: it is not installed.
    """
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            'Caption metrics need pycocoevalcap; install it with: pip install "openblip[metrics]"'
        )
    return Path(spec.submodule_search_locations[0])


def complaint(output: str) -> str:
    """The last thing a Java program said that is not a line of a stack trace, for an error message."""
    lines = [line.strip() for line in output.splitlines()]
    said = [line for line in lines if line and not line.startswith(("at ", "..."))]
    return said[-1] if said else "it said nothing"
