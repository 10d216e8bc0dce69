"""What Java programs do wrong is shown with stand-ins; test_captioning compares scores of the real METEOR."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from openblip.errors import MissingExtraError
from openblip.metrics import java_programs
from openblip.metrics.java_programs import SPICE_MODELS, java_runs, meteor_scores, spice_scores

TRUTH = {0: ["a red dog", "the dog"], 1: ["two cats"], 2: ["a tree"]}
WRITTEN = {0: ["a dog"], 1: ["two  ||| cats"], 2: [""]}
# Answers as METEOR does: counts to SCORE, each image's score and then that of all to EVAL.
METEOR = """
for line in sys.stdin:
    kind, *parts = line.rstrip("\\n").split(" ||| ")
    if kind == "SCORE":
        print(len(parts), len(parts[-1].split()), flush=True)
    else:
        values = [10 * int(a) + int(b) for a, b in (part.split() for part in parts)]
        print(*values, sum(values) * 100, sep="\\n", flush=True)
"""
# Answers as SPICE does, in another order than asked.
SPICE = """
given, found = sys.argv[4], sys.argv[sys.argv.index("-out") + 1]
images = json.load(open(given))
f = lambda image: None if not image["test"] else len(image["refs"]) / 4
scores = [{"image_id": image["image_id"], "scores": {"All": {"f": f(image)}}} for image in images[::-1]]
json.dump(scores, open(found, "w"))
"""


@pytest.fixture
def java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Puts a Python program in the place of Java; pycocoevalcap's folder is empty but for SPICE's models."""
    for name in ("programs", "meteor", "spice/lib"):
        (tmp_path / name).mkdir(parents=True)
    for model in SPICE_MODELS:
        (tmp_path / "spice" / "lib" / model).touch()
    monkeypatch.setattr(java_programs, "pycocoevalcap_folder", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))

    def install(program: str) -> None:
        path = tmp_path / "programs" / "java"
        header = f"#!{sys.executable} -S\nimport json, os, sys\nif '-version' in sys.argv: sys.exit()\n"
        path.write_text(header + program)
        path.chmod(0o755)
        java_runs.cache_clear()

    yield install
    java_runs.cache_clear()


def test_meteor_scores_each_group_as_one_text(java: Callable[[str], None]) -> None:
    java(METEOR)
    # Counts 3 2, 2 2 and 2 0: references and prediction, and the prediction's words without |||.
    assert meteor_scores(WRITTEN, TRUTH, [[0, 1, 2], [1], [2, 0]]) == [7400.0, 2200.0, 5200.0]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("sys.exit('Could not reserve enough space')", "Could not reserve enough space"),
        ("sys.exit()", "it said nothing"),
        ("print('java.lang.Error: x\\n\\tat Main.java:1', file=sys.stderr)", "java.lang.Error: x$"),
        ("[print('no number', flush=True) for line in sys.stdin]", "it said nothing"),
        ("print(1, flush=True); sys.stdin.readline(); sys.exit('lost')", "lost"),
        ("sys.stderr.write('x' * 10**6); sys.exit('much said')", "much said"),
        ("os.close(0); os.close(1); import time; time.sleep(60)", "it said nothing"),
    ],
)
def test_a_meteor_that_breaks_off_is_reported(java: Callable[[str], None], program: str, reason: str) -> None:
    java(program)
    with pytest.raises(MissingExtraError, match=f"METEOR's Java program broke off: .*{reason}"):
        meteor_scores(WRITTEN, TRUTH, [[0, 1, 2]])


def test_meteor_is_stopped_at_the_end(java: Callable[[str], None], tmp_path: Path) -> None:
    java(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())){METEOR}import time; time.sleep(60)")
    meteor_scores(WRITTEN, TRUTH, [[0]])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_spice_scores_come_in_the_order_of_the_images(java: Callable[[str], None], tmp_path: Path) -> None:
    java(SPICE)
    before = sorted(tmp_path.rglob("*"))
    scores = spice_scores(WRITTEN, TRUTH)
    assert scores[:2] == [0.5, 0.25]
    assert math.isnan(scores[2])
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left in pycocoevalcap's folder"


def test_spice_models_are_not_downloaded_but_asked_for(java: Callable[[str], None], tmp_path: Path) -> None:
    java(SPICE)
    (tmp_path / "spice" / "lib" / SPICE_MODELS[1]).unlink()
    with pytest.raises(MissingExtraError, match=rf"needs {SPICE_MODELS[1]} in .*get_stanford_models"):
        spice_scores(WRITTEN, TRUTH)


@pytest.mark.parametrize("program", ["sys.exit('InaccessibleObject')", "print('InaccessibleObject', file=sys.stderr)"])
def test_a_spice_that_fails_is_reported(java: Callable[[str], None], program: str) -> None:
    java(program)
    with pytest.raises(MissingExtraError, match=r"SPICE's Java program failed: InaccessibleObject.*Java 8"):
        spice_scores(WRITTEN, TRUTH)


def test_no_java_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java_programs, "java_runs", lambda: False)
    with pytest.raises(MissingExtraError, match="METEOR is a Java program, and no Java runs here"):
        meteor_scores(WRITTEN, TRUTH, [[0]])
    with pytest.raises(MissingExtraError, match="SPICE is a Java program"):
        spice_scores(WRITTEN, TRUTH)
