"""The official tokenizer and ours; what Java programs do wrong is shown with stand-ins.

test_captioning compares scores of the real METEOR.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from openblip.errors import MissingExtraError
from openblip.metrics import captioning
from openblip.metrics.captioning import (
    SPICE_MODELS,
    java_runs,
    meteor_scores,
    spice_scores,
    tokenize_captions,
    tokenize_in_python,
    tokenize_with_java,
)

# (caption, its tokens in COCO evaluation)
CAPTIONS = [
    ("A dog, a cat.", "a dog a cat"),
    ("It's the dog's ball", "it 's the dog 's ball"),
    ("can't won't cannot gonna", "ca n't wo n't can not gon na"),
    ("he'll they're I've I'd I'm", "he 'll they 're i 've i 'd i 'm"),
    ("the dogs' bowl at 5 o'clock", "the dogs bowl at 5 o'clock"),
    ("two-door car -- red - and/or blue", "two-door car red and/or blue"),
    ('a "red" sign (big) [x]', "a red sign -lrb- big -rrb- -lsb- x -rsb-"),
    ("$5.00 t-shirt, 10,000 items! 50% off", "$ 5.00 t-shirt 10,000 items 50 % off"),
    ("hello... world; 3:30 pm: 1/2 cup", "hello world 3:30 pm 1/2 cup"),
    ("U.S. flag & Mr. Smith etc.", "u.s. flag & mr. smith etc."),
    ("IMG_0001.jpg www.shop.com buy at shop.com", "img_0001 jpg www.shop.com buy at shop.com"),
    ("mail me@x.com #tag @home", "mail me@x.com #tag @home"),
    ("wow!! really??? end?!", "wow !! really ??? end ?!"),
    ("“curly” it’s — dash – café…", "curly it 's dash café"),  # noqa: RUF001
    ("three suns\nabove\ta  tree", "three suns above a tree"),
    ("", ""),
    ("...", ""),
]
NEEDS_JAVA = pytest.mark.skipif(not java_runs(), reason="the official tokenizer is a Java program")


@pytest.mark.parametrize(("caption", "tokens"), CAPTIONS)
def test_tokens_in_python(caption: str, tokens: str) -> None:
    assert tokenize_in_python([caption]) == [tokens]


@NEEDS_JAVA
def test_the_official_tokenizer_gives_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    captions, tokens = zip(*CAPTIONS, strict=True)
    assert tokenize_with_java(captions) == list(tokens)
    assert tokenize_with_java(["a\u2028b\x85c", "", "d"]) == ["a b c", "", "d"], "one line each, whatever is in it"
    assert capfd.readouterr() == ("", "")


@NEEDS_JAVA
def test_the_official_tokenizer_is_taken_where_java_runs() -> None:
    assert tokenize_captions(["c++ code"]) == ["c++ code"]


def test_python_is_taken_where_no_java_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    java_runs.cache_clear()
    try:
        assert tokenize_captions(["A dog."]) == ["a dog"]
    finally:
        java_runs.cache_clear()


def test_a_java_that_fails_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    java_runs.cache_clear()
    monkeypatch.setattr(captioning.shutil, "which", lambda name: sys.executable)  # refuses -version
    try:
        assert not java_runs()
    finally:
        java_runs.cache_clear()


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"openblip\[metrics\]"):
        tokenize_with_java(["a dog"])


def test_a_java_that_cannot_run_the_tokenizer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'Error: no heap' >&2\necho '  at Main(1)' >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"tokenizer of COCO evaluation: Error: no heap\. Repair Java"):
        tokenize_with_java(["a dog"])


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
    monkeypatch.setattr(captioning, "pycocoevalcap_folder", lambda: tmp_path)
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
        ("print('java.lang.Error: x\\n\\tat Main.java:1', file=sys.stderr)", r"java\.lang\.Error: x(\n|$)"),
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
    monkeypatch.setattr(captioning, "java_runs", lambda: False)
    with pytest.raises(MissingExtraError, match="METEOR is a Java program, and no Java runs here"):
        meteor_scores(WRITTEN, TRUTH, [[0]])
    with pytest.raises(MissingExtraError, match="SPICE is a Java program"):
        spice_scores(WRITTEN, TRUTH)
