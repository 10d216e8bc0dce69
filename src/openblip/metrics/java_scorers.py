"""METEOR and SPICE: Java programs that pycocoevalcap carries, run with the options of COCO evaluation.

pycocoevalcap's own wrappers wait for ever where Java breaks off, keep it running, download models without
being asked, and write into the package's folder; these say what is wrong instead and leave nothing behind.
Captions are tokenized, by image position.
"""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from openblip.errors import MissingExtraError
from openblip.metrics.tokenization import complaint, java_runs, pycocoevalcap_folder

SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def meteor_scores(
    written: Mapping[int, Sequence[str]],
    truth: Mapping[int, Sequence[str]],
    groups: Sequence[Sequence[int]],
) -> list[float]:
    """METEOR of each of `groups` of images, every group as one text. Java starts once.

    Raises:
        MissingExtraError: pycocoevalcap is not installed, or no Java runs its program.
    """
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
    """SPICE's F score of every image, nan where the program gives none.

    Raises:
        MissingExtraError: as `meteor_scores`, or Stanford's models, which pycocoevalcap does not carry, are
            not there.
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
        {"image_id": image, "test": written[image][0], "refs": list(references)}
        for image, references in truth.items()
    ]
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "captions.json", Path(scratch) / "scores.json"
        given.write_text(json.dumps(images), encoding="utf-8")
        command = ["java", "-jar", "-Xmx8G", "spice-1.0.jar", str(given), "-out", str(found), "-silent"]
        program = subprocess.run(command, cwd=folder, capture_output=True, check=False, encoding="utf-8")
        if program.returncode != 0 or not found.exists():
            raise MissingExtraError(
                f"SPICE's Java program failed: {complaint(program.stderr)}. It was written for Java 8 and "
                "asks for 8 GB of memory"
            )
        results = json.loads(found.read_text(encoding="utf-8"))
    f_scores = {result["image_id"]: result["scores"]["All"]["f"] for result in results}
    return [float("nan") if f_scores[image] is None else float(f_scores[image]) for image in truth]


def _require_java(metric: str) -> None:
    if not java_runs():
        raise MissingExtraError(f"{metric} is a Java program, and no Java runs here; install a Java runtime")


@contextlib.contextmanager
def _conversation(metric: str, command: list[str], folder: Path) -> Iterator[tuple[IO[str], IO[str]]]:
    """A program's input and output, line by line. It is stopped at the end, whatever happened.

    Raises:
        MissingExtraError: it broke off, or answered with something else than numbers.
    """
    # Errors go to a file: a pipe that nobody reads would fill up and stop the program.
    with tempfile.TemporaryFile() as errors:
        program = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
        )
        assert program.stdin is not None
        assert program.stdout is not None
        try:
            yield program.stdin, program.stdout
        except (OSError, ValueError) as error:
            program.kill()
            program.wait()
            errors.seek(0)
            said = complaint(errors.read().decode("utf-8", errors="replace"))
            raise MissingExtraError(f"{metric}'s Java program broke off: {said}") from error
        finally:
            program.kill()
            program.wait()
            program.stdout.close()
            with contextlib.suppress(OSError):  # what a dead program did not read is still in the buffer
                program.stdin.close()
