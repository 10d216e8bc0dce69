"""The tokenizer, METEOR and SPICE: Java programs that pycocoevalcap carries, with the options of COCO evaluation.

pycocoevalcap's own wrappers wait for ever where Java breaks off, keep it running, download models without
being asked, and write into the package's folder. These leave nothing behind, and raise `MissingExtraError`, which
says what is wrong, where pycocoevalcap is not installed, no Java runs, or it cannot run the program. METEOR and SPICE
take tokenized captions by image.
"""

import contextlib
import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from openblip.errors import MissingExtraError

# What COCO evaluation removes after tokenizing. It would also remove -LRB- and its like, but looks for them
# in lower-cased text, so brackets stay.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


@functools.cache
def java_runs() -> bool:
    """Whether a working Java is on the path (macOS has a `java` that only tells where to get one)."""
    java = shutil.which("java")
    if java is None:
        return False
    return subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0


def tokenize_with_java(captions: Sequence[str]) -> list[str]:
    """Tokenize with the official tokenizer and the options of COCO evaluation."""
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
            f"Java cannot run the tokenizer of COCO evaluation: {_complaint(answer.stderr)}. Repair Java, or "
            "take it off the PATH to have captions tokenized in Python"
        )
    tokenized = answer.stdout.split("\n")[: len(captions)]
    return [" ".join(token for token in line.split() if token not in PUNCTUATION) for line in tokenized]


def meteor_scores(
    written: Mapping[int, Sequence[str]], truth: Mapping[int, Sequence[str]], groups: Sequence[Sequence[int]]
) -> list[float]:
    """Return METEOR of each of `groups` of images, every group as one text. Java starts once."""
    _require_java("METEOR")
    # -Dfile.encoding: Java before 18 would take the locale's.
    command = ["java", "-Dfile.encoding=UTF-8", "-jar", "-Xmx2G", "meteor-1.5.jar"]
    options = ["-", "-", "-stdio", "-l", "en", "-norm"]
    with _conversation("METEOR", command + options, pycocoevalcap_folder() / "meteor") as (asking, answers):

        def ask(*parts: str) -> None:
            asking.write(" ||| ".join(parts) + "\n")
            asking.flush()

        counts = {}
        for image, references in truth.items():
            ask("SCORE", *references, written[image][0].replace("|||", "").replace("  ", " "))
            counts[image] = answers.readline().strip()
        scores = []
        for images in groups:
            ask("EVAL", *(counts[image] for image in images))
            for _ in images:
                float(answers.readline())  # each image's own score, before that of all
            scores.append(float(answers.readline()))
    return scores


def spice_scores(written: Mapping[int, Sequence[str]], truth: Mapping[int, Sequence[str]]) -> list[float]:
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
    images = [
        {"image_id": image, "test": written[image][0], "refs": list(references)} for image, references in truth.items()
    ]
    with tempfile.TemporaryDirectory() as scratch:
        captions_file, scores_file = Path(scratch) / "captions.json", Path(scratch) / "scores.json"
        captions_file.write_text(json.dumps(images), encoding="utf-8")
        command = ["java", "-jar", "-Xmx8G", "spice-1.0.jar", str(captions_file)]
        command += ["-out", str(scores_file), "-silent"]
        program = subprocess.run(command, cwd=folder, capture_output=True, check=False, encoding="utf-8")
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


@contextlib.contextmanager
def _conversation(metric: str, command: list[str], folder: Path) -> Iterator[tuple[IO[str], IO[str]]]:
    """Yield the input and the output of a program that is stopped at the end, whatever happens.

    Raises `MissingExtraError` when it broke off, or answered with something other than numbers.
    """
    # Errors go to a file: a pipe that nobody reads would fill up and stop the program.
    with tempfile.TemporaryFile() as errors:
        pipe = subprocess.PIPE
        program = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=errors, encoding="utf-8")
        assert program.stdin is not None
        assert program.stdout is not None
        try:
            yield program.stdin, program.stdout
        except (OSError, ValueError) as error:
            program.kill()
            program.wait()
            errors.seek(0)
            reason = _complaint(errors.read().decode("utf-8", errors="replace"))
            raise MissingExtraError(f"{metric}'s Java program broke off: {reason}") from error
        finally:
            program.kill()
            program.wait()
            program.stdout.close()
            with contextlib.suppress(OSError):  # what a dead program did not read is still in the buffer
                program.stdin.close()


def pycocoevalcap_folder() -> Path:
    """Return the folder of pycocoevalcap, which carries the Java programs."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError('Caption metrics need pycocoevalcap; install it with: pip install "openblip[metrics]"')
    return Path(spec.submodule_search_locations[0])


def _complaint(output: str) -> str:
    """The last thing a Java program said that is not a line of a stack trace, for an error message."""
    lines = [line.strip() for line in output.splitlines()]
    messages = [line for line in lines if line and not line.startswith(("at ", "..."))]
    return messages[-1] if messages else "it said nothing"
