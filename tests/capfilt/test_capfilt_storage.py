"""Where a run is written and what it was read from: an object store, a source that changes, a folder that is full."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from capfilt_world import all_rows, sample_members

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import CapFiltFolder
from openblip.capfilt.local import run_capfilt
from openblip.cli.main import main
from openblip.data.captions import finished_shards, read_captions
from openblip.data.sources import open_source
from openblip.errors import ConfigError, SourceError
from shared_files import write_tar
from source_items import items_of


@pytest.mark.slow
def test_a_run_in_an_object_store(
    bucket: Any, config: CapFiltConfig, finished_run: Path, web: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows as in a folder; what a store shows is whole; the same command resumes; `capfilt:` reads it."""
    out = "s3://web-data/run"
    words = ["capfilt", str(web), "--captioner", config.captioner, "--filter", config.filter, "--batch-size", "4"]
    assert main([*words, "--dtype", "float32", "--out", out]) == 0
    assert not Path("s3:").exists()
    assert finished_shards(out) == ["00000", "00001", "00002"]
    rows = [row for shard in finished_shards(out) for row in read_captions(out, shard).to_pylist()]
    assert rows == all_rows(finished_run)
    names = {name.removeprefix("web-data/run/") for name in bucket.find("web-data/run")}
    local = {str(path.relative_to(finished_run)) for path in finished_run.rglob("*") if path.is_file()}
    assert names == local
    bucket.rm("web-data/run/captions/00001.report.json")
    summary = run_capfilt(config, out)
    assert (summary.done, len(summary.skipped)) == (["00001"], 2)
    kept = [(item.key, item.captions) for item in items_of(open_source(f"capfilt:{out}"))]
    assert kept == [(item.key, item.captions) for item in items_of(open_source(f"capfilt:{finished_run}"))]
    with pytest.raises(ConfigError, match="seed was 0, is now 1"):
        run_capfilt(replace(config, seed=1), out)
    capsys.readouterr()
    assert main([*words, "--out", "s3://no-such-bucket/run"]) == 2
    assert "s3://no-such-bucket/run cannot be written into" in capsys.readouterr().err


def test_a_source_that_changed_is_not_continued(config: CapFiltConfig, tmp_path: Path) -> None:
    web, out = tmp_path / "web", tmp_path / "run"
    for shard in range(2):
        write_tar(web / f"{shard}.tar", sample_members("a", shard, ["a dog", "a cat"]))
    config = replace(config, source=str(web))
    run_capfilt(config, out)
    report = CapFiltFolder(out).read_report("1")
    assert report["source_file"]["size"] == (web / "1.tar").stat().st_size
    write_tar(web / "1.tar", sample_members("a", 7, ["a dog", "a bird"]))
    with pytest.raises(ConfigError, match=r"has changed since .* was begun: 1: (size|mtime) was .*, is now"):
        run_capfilt(config, out)
    with pytest.raises(SourceError, match="shard 1 has changed since its texts were scored"):
        items_of(open_source(f"capfilt:{out}"))
    for path in (out / "captions").glob("1.*"):
        path.unlink()
    assert run_capfilt(config, out).done == ["1"]


def test_a_copy_of_the_source_is_the_same_source(
    config: CapFiltConfig, run_copy: Path, web: Path, tmp_path: Path
) -> None:
    """It has other times of change; `source` in the manifest is what a user edits who moves the data."""
    for path in web.glob("*.tar"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((run_copy / "manifest.json").read_text())
    (run_copy / "manifest.json").write_text(json.dumps({**manifest, "source": str(tmp_path / "moved")}))
    moved = items_of(open_source(f"capfilt:{run_copy}"))
    assert len(moved) == len(items_of(open_source(f"capfilt:{run_copy}"))) > 0
    assert len(run_capfilt(replace(config, source=str(tmp_path / "moved")), run_copy).skipped) == 3


def test_a_shard_that_changes_while_it_is_read_fails(
    config: CapFiltConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "web" / "0.tar"
    write_tar(path, sample_members("a", 1, ["a dog"]))

    from openblip.capfilt.process import ShardWorker

    score = ShardWorker._caption_and_filter

    def touched(self: ShardWorker, *arguments: Any) -> Any:
        os.utime(path, (1, 1))
        return score(self, *arguments)

    monkeypatch.setattr(ShardWorker, "_caption_and_filter", touched)
    summary = run_capfilt(replace(config, source=str(path)), tmp_path / "run")
    assert "0 has changed while it was read (mtime was" in summary.failed[0][1]
    assert not list((tmp_path / "run" / "captions").glob("*.parquet"))
    monkeypatch.undo()
    assert run_capfilt(replace(config, source=str(path)), tmp_path / "run").done == ["0"]


def test_a_shard_of_which_nothing_can_be_read_is_never_done(config: CapFiltConfig, tmp_path: Path) -> None:
    write_tar(tmp_path / "web" / "bad.tar", [("a.jpg", b"nothing"), ("b.jpg", b"nothing")])
    write_tar(tmp_path / "web" / "good.tar", sample_members("a", 1, ["a dog"]))
    summary = run_capfilt(replace(config, source=str(tmp_path / "web")), tmp_path / "run")
    assert summary.done == ["good"]
    assert "nothing of bad can be read" in summary.failed[0][1]
    assert {path.name for path in (tmp_path / "run" / "captions").glob("bad.*")} == {"bad.failure.json"}
