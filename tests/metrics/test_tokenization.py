import sys
from pathlib import Path

import pytest

from openblip.errors import MissingExtraError
from openblip.metrics import java_programs
from openblip.metrics.java_programs import java_runs, tokenize_with_java
from openblip.metrics.tokenization import tokenize_captions, tokenize_in_python

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
    monkeypatch.setattr(java_programs.shutil, "which", lambda name: sys.executable)  # refuses -version
    try:
        assert not java_runs()
    finally:
        java_runs.cache_clear()


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java_programs, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"openblip\[metrics\]"):
        tokenize_with_java(["a dog"])


def test_a_java_that_cannot_run_the_tokenizer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'Error: no heap' >&2\necho '  at Main(1)' >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"tokenizer of COCO evaluation: Error: no heap\. Repair Java"):
        tokenize_with_java(["a dog"])
