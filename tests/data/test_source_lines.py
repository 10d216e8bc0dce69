"""What `openblip caption --out` wrote is a source: its captions, with the images of the sources that it was about."""

import json
import pickle

import pytest
from annotation_files import read_all, read_samples, write, write_lines

from openblip.data.sources import open_source
from openblip.errors import SourceError
from source_items import items_of


@pytest.fixture
def lines(tmp_path, write_shards, make_image):
    """Lines about two shards of three samples, of which one has no line, and about an image file."""
    web = write_shards(tmp_path / "web", [3, 3])
    (tmp_path / "a.jpg").write_bytes(make_image(99))
    texts = {("0000", "00000"): "xy", ("0000", "00002"): "z", ("0001", "00003"): "u"}
    rows = [{"shard": s, "key": k, "caption": text} for (s, k), of_key in texts.items() for text in of_key]
    rows += [{"key": str(tmp_path / "a.jpg"), "caption": text, "logprob": -1} for text in "vw"]
    settings = {"sources": [str(web)], "reading": {"images": None, "image_column": None, "caption_column": None}}
    write(tmp_path / "r.jsonl.settings.json", settings)
    return write_lines(tmp_path / "r.jsonl", rows)


def test_lines_about_data_sources(lines, tmp_path):
    samples = read_samples(lines)
    assert [(s.shard, s.captions) for s in samples] == [
        ("0000", ("x", "y")), ("0000", ("z",)), ("0001", ("u",)), ("r", ("v", "w")),
    ]  # fmt: skip
    originals = {s.key: s for s in read_samples(tmp_path / "web")}
    assert all(s.image == originals[s.key].image and s.image_id == originals[s.key].image_id for s in samples[:3])
    assert samples[3].image == (tmp_path / "a.jpg").read_bytes()
    source = open_source(str(lines))
    assert items_of(pickle.loads(pickle.dumps(source))) == samples
    assert [item.captions for _, item in source.read("0000", start=1)] == [("z",)]
    assert [item.captions for item in items_of(source, skip=lambda s: s.captions != ("u",))] == [("u",)]
    assert len(read_samples(f"{lines}[:99%]")) >= 3


def test_a_line_that_was_cut_is_a_reject(lines):
    lines.write_text(lines.read_text() + '\n{"shard": "0001", "ke')
    samples, (reject,) = read_all(lines)
    assert len(samples) == 4
    assert "broken json" in reject.reason


def test_a_line_about_a_sample_that_is_gone_is_a_reject(lines):
    lines.write_text(lines.read_text() + '\n{"shard": "0001", "key": "gone", "caption": "x"}')
    samples, (reject,) = read_all(lines)
    assert len(samples) == 4
    assert (reject.shard, reject.key) == ("0001", "gone")
    assert "has no sample gone any more" in reject.reason


def test_lines_about_a_source_that_is_gone(lines, tmp_path):
    (tmp_path / "web" / "0001.tar").unlink()
    with pytest.raises(SourceError, match="web has no shard 0001 any more"):
        open_source(str(lines))
    settings = tmp_path / "r.jsonl.settings.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "sources": [str(tmp_path / "none")]}))
    with pytest.raises(SourceError, match="none: no such file"):
        open_source(str(lines))
