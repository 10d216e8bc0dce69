"""Caption metrics: those of COCO evaluation by pycocoevalcap's scorers, and exact match.

CIDEr, BLEU and ROUGE-L are always there; METEOR needs Java, and SPICE Java and Stanford's models. The scorers and the
Java programs are called one by one: pycocoevalcap's own frame needs Java for its tokenizer, and its wrappers wait for
ever where Java breaks off, keep it running, download models without being asked, and write into the package's folder.
"""

import contextlib
import functools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from openblip.errors import ConfigError, MissingExtraError

ENTIRE = "entire"
MISSING_PACKAGE = 'Caption metrics need pycocoevalcap; install it with: pip install "openblip[metrics]"'

References = Sequence[Sequence[str]]  # of every image
TokenizedCaptions = Mapping[int, Sequence[str]]  # by image


def caption_scores(predictions: Sequence[str], references: References) -> dict[str, Any]:
    """Return the scores of COCO evaluation of one prediction per image against that image's references.

    `cider`: CIDEr-D (arXiv 1411.5726) as papers print it, 133.3 where pycocoevalcap has 1.333, and 1000 at most. The
    weights of n-grams come from the references given, so scores of different sets do not compare, and a set of one
    image scores 0. All others are in [0, 1]. `bleu_1` to `bleu_4` are over the whole set, with the closest reference
    length. `rouge_l`: the F score (beta 1.2) of the longest common subsequence, a mean over images; precision and
    recall are each the best over the references, as pycocoevalcap computes them. `absent` (by metric, the reason) says
    which of these could not be computed here: `meteor`, METEOR 1.5 (English, normalised) over the whole set, and
    `spice`, SPICE (arXiv 1607.08822), the mean F score over images.

    Raises:
        ConfigError: no predictions, lists of unequal length, or an image without a reference that has words.
        MissingExtraError: pycocoevalcap is not installed.
    """
    return _scores_of_groups("caption_scores", predictions, references, {ENTIRE: range(len(predictions))})[ENTIRE]


def scores_by_domain(predictions: Sequence[str], references: References, domains: Sequence[str]) -> dict[str, Any]:
    """Score the images of each domain, by its name, and all of them as "entire" (NoCaps).

    CIDEr weights n-grams by all references together, so that "entire" is the mean of the domains weighted by their
    numbers of images. NoCaps' server is not public, but its published scores are such means: 78.1, 57.7 and 31.3 of
    648, 2938 and 914 images are 55.3 together (nocaps-org/updown-baseline). Scripts that evaluate a file per domain
    weight by the domain's own references, as `caption_scores` of its images does. Raises as `caption_scores`, and
    `ConfigError` for a domain called "entire".
    """
    if len(domains) != len(predictions):
        raise ConfigError(f"scores_by_domain: {len(predictions)} predictions and {len(domains)} domains")
    if ENTIRE in domains:
        raise ConfigError(f'scores_by_domain: "{ENTIRE}" is the name of all images; rename that domain')
    groups: dict[str, Sequence[int]] = {
        name: [image for image, domain in enumerate(domains) if domain == name] for name in sorted(set(domains))
    }
    groups[ENTIRE] = range(len(predictions))
    return _scores_of_groups("scores_by_domain", predictions, references, groups)


def exact_match(predictions: Sequence[str], references: References, normalise: Callable[[str], str]) -> float:
    """Return the share of predictions that are, both sides normalised, one of their references.

    Raises `ConfigError` for no predictions, lists of unequal length, or an image without references.
    """
    check_references("exact_match", predictions, references)
    pairs = zip(predictions, references, strict=True)
    matches = [normalise(prediction) in map(normalise, allowed) for prediction, allowed in pairs]
    return sum(matches) / len(matches)


def check_references(
    metric: str, predictions: Sequence[str], references: References, item: str = "image", reference: str = "reference"
) -> None:
    """Raise `ConfigError` unless there is a prediction and each one has a list of at least one reference."""
    if isinstance(predictions, str) or any(isinstance(texts, str) for texts in references):
        raise ConfigError(f"{metric}: give a list of predictions and a list of {reference}s for each of them")
    if not predictions or len(predictions) != len(references):
        raise ConfigError(
            f"{metric}: {len(predictions)} predictions and {len(references)} lists of {reference}s; "
            "give one list per prediction, and at least one"
        )
    for number, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if not texts:
            raise ConfigError(f"{metric}: {item} {number} has no {reference}s; leave it out")
        if not all(isinstance(text, str) for text in [prediction, *texts]):
            raise ConfigError(f"{metric}: {item} {number} needs strings, not {prediction!r} and {texts!r}")


def _scores_of_groups(
    metric: str, predictions: Sequence[str], references: References, groups: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """The scores of each group of images; every Java program starts once."""
    check_references(metric, predictions, references)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise MissingExtraError(MISSING_PACKAGE) from error
    tokens = iter(tokenize_captions([*predictions, *(text for texts in references for text in texts)]))
    written = {image: [next(tokens)] for image in range(len(predictions))}
    truth = {image: [next(tokens) for _ in texts] for image, texts in enumerate(references)}
    for image, texts in truth.items():
        if not any(texts):
            raise ConfigError(f"{metric}: no reference of image {image} has a word: {references[image]}")
    # Scores of images, of which a group's score is the mean; BLEU and METEOR count over a group as a whole.
    of_images = {"cider": Cider().compute_score(truth, written)[1], "rouge_l": Rouge().compute_score(truth, written)[1]}
    meteors: dict[str, float] = {}
    absent: dict[str, str] = {}
    try:
        meteors = dict(zip(groups, meteor_scores(written, truth, list(groups.values())), strict=True))
    except MissingExtraError as error:
        absent["meteor"] = str(error)
    try:
        of_images["spice"] = np.array(spice_scores(written, truth))
    except MissingExtraError as error:
        absent["spice"] = str(error)
    scores = {}
    for name, images in groups.items():
        bleus, _ = Bleu(4).compute_score({i: truth[i] for i in images}, {i: written[i] for i in images}, verbose=0)
        means = {key: float(np.mean(values[list(images)])) for key, values in of_images.items()}
        scores[name] = {
            "cider": 100 * means["cider"],
            **{f"bleu_{n}": float(bleu) for n, bleu in enumerate(bleus, start=1)},
            "rouge_l": means["rouge_l"],
            "absent": dict(absent),
        }
        if name in meteors:
            scores[name]["meteor"] = meteors[name]
        if "spice" in means:
            scores[name]["spice"] = means["spice"]
    return scores


# Tokens, as COCO evaluation counts them: Penn-Treebank tokens, lower-case, without punctuation. The reference is
# Stanford's PTBTokenizer, one of the Java programs.

# What COCO evaluation removes after tokenizing. It would also remove -LRB- and its like, but looks for them
# in lower-cased text, so brackets stay.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_PLAIN = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": " -- ", "\u2014": " -- ", "\u2026": " ... "}
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
    """Tokens joined by spaces: where Java runs the official ones, or `MissingExtraError` without pycocoevalcap."""
    return tokenize_with_java(captions) if java_runs() else tokenize_in_python(captions)


def tokenize_in_python(captions: Sequence[str]) -> list[str]:
    """Tokenize by the official tokenizer's rules for everything that captions usually contain."""
    tokenized = []
    for caption in captions:
        text = caption.translate(_PLAIN).lower()
        for pattern, replacement in _SPLITS:
            text = pattern.sub(replacement, text)
        tokens = (match.group() for match in _TOKEN.finditer(text))
        kept = (_BRACKETS.get(token, token) for token in tokens if token not in PUNCTUATION and token != '"')
        tokenized.append(" ".join(kept))
    return tokenized


# Java programs that pycocoevalcap carries, run with the options of COCO evaluation. They leave nothing behind, and
# raise `MissingExtraError`, which says what is wrong, where pycocoevalcap is not installed, no Java runs, or it cannot
# run the program. METEOR and SPICE take tokenized captions by image.

SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


@functools.cache
def java_runs() -> bool:
    """Whether a working Java is on the path (macOS has a `java` that only tells where to get one)."""
    java = shutil.which("java")
    return java is not None and subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0


def tokenize_with_java(captions: Sequence[str]) -> list[str]:
    """Tokenize with the official tokenizer and the options of COCO evaluation."""
    jar = pycocoevalcap_folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    # One line per caption: whatever Java takes for the end of a line must not be inside one.
    lines = [" ".join(caption.split()) for caption in captions]
    # -encoding: Java before 18 would take the locale's.
    options = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    command, text = ["java", "-cp", str(jar), *options], "\n".join(lines) + "\n"
    answer = subprocess.run(command, input=text, capture_output=True, check=False, encoding="utf-8")
    if answer.returncode != 0:
        raise MissingExtraError(
            f"Java cannot run the tokenizer of COCO evaluation: {_complaint(answer.stderr)}. Repair Java, or "
            "take it off the PATH to have captions tokenized in Python"
        )
    tokenized = answer.stdout.split("\n")[: len(captions)]
    return [" ".join(token for token in line.split() if token not in PUNCTUATION) for line in tokenized]


def meteor_scores(written: TokenizedCaptions, truth: TokenizedCaptions, groups: Sequence[Sequence[int]]) -> list[float]:
    """Return METEOR of each of `groups` of images, every group as one text. Java starts once."""
    _require_java("METEOR")
    # -Dfile.encoding: Java before 18 would take the locale's.
    options = ["-Dfile.encoding=UTF-8", "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    command, folder, pipe = ["java", *options], pycocoevalcap_folder() / "meteor", subprocess.PIPE
    # Errors go to a file: a pipe that nobody reads would fill up and stop the program.
    with tempfile.TemporaryFile() as errors:
        program = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=errors, encoding="utf-8")
        requests, answers = program.stdin, program.stdout
        assert requests is not None
        assert answers is not None
        try:
            counts = {}
            for image, references in truth.items():
                prediction = written[image][0].replace("|||", "").replace("  ", " ")
                print("SCORE", *references, prediction, sep=" ||| ", file=requests, flush=True)
                counts[image] = answers.readline().strip()
            scores = []
            for images in groups:
                print("EVAL", *(counts[image] for image in images), sep=" ||| ", file=requests, flush=True)
                for _ in images:
                    float(answers.readline())  # each image's own score, before that of all
                scores.append(float(answers.readline()))
            return scores
        except (OSError, ValueError) as error:  # it broke off, or answered with something other than numbers
            program.kill()
            program.wait()
            errors.seek(0)
            reason = _complaint(errors.read().decode("utf-8", errors="replace"))
            raise MissingExtraError(f"METEOR's Java program broke off: {reason}") from error
        finally:
            program.kill()
            program.wait()
            answers.close()
            with contextlib.suppress(OSError):  # what a dead program did not read is still in the buffer
                requests.close()


def spice_scores(written: TokenizedCaptions, truth: TokenizedCaptions) -> list[float]:
    """Return SPICE's F score of every image, nan where the program gives none.

    Raises `MissingExtraError` also where Stanford's models, which pycocoevalcap does not carry, are not there.
    """
    _require_java("SPICE")
    folder = pycocoevalcap_folder() / "spice"
    missing = [name for name in SPICE_MODELS if not (folder / "lib" / name).exists()]
    if missing:
        raise MissingExtraError(
            f"SPICE needs {' and '.join(missing)} in {folder / 'lib'}; with a network, this gets them: "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    images = [{"image_id": image, "test": written[image][0], "refs": list(texts)} for image, texts in truth.items()]
    with tempfile.TemporaryDirectory() as scratch:
        captions_file, scores_file = Path(scratch) / "captions.json", Path(scratch) / "scores.json"
        captions_file.write_text(json.dumps(images), encoding="utf-8")
        options = ["-jar", "-Xmx8G", "spice-1.0.jar", str(captions_file), "-out", str(scores_file), "-silent"]
        program = subprocess.run(["java", *options], cwd=folder, capture_output=True, check=False, encoding="utf-8")
        if program.returncode != 0 or not scores_file.exists():
            raise MissingExtraError(
                f"SPICE's Java program failed: {_complaint(program.stderr)}. It was written for Java 8 and "
                "asks for 8 GB of memory"
            )
        results = json.loads(scores_file.read_text(encoding="utf-8"))
    f_scores = {result["image_id"]: result["scores"]["All"]["f"] for result in results}
    return [float("nan") if f_scores[image] is None else float(f_scores[image]) for image in truth]


def _require_java(metric: str) -> None:
    if not java_runs():
        raise MissingExtraError(f"{metric} is a Java program, and no Java runs here; install a Java runtime")


def pycocoevalcap_folder() -> Path:
    """Return the folder of pycocoevalcap, which carries the Java programs."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(MISSING_PACKAGE)
    return Path(spec.submodule_search_locations[0])


def _complaint(output: str) -> str:
    """The last thing a Java program said that is not a line of a stack trace, for an error message."""
    lines = [line.strip() for line in output.splitlines()]
    messages = [line for line in lines if line and not line.startswith(("at ", "..."))]
    return messages[-1] if messages else "it said nothing"
