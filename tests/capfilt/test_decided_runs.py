"""Decisions of whole runs, over caption files without images or models."""

import json
import os
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from openblip.capfilt.folder import CapFiltFolder
from openblip.capfilt.selection import decide_again, select
from openblip.cli.main import main
from openblip.data.captions import CaptionRow, read_judged, read_texts, score_file, write_captions, write_score
from openblip.data.decision import Decision, Rule
from openblip.data.sources import open_source
from openblip.errors import ConfigError
from openblip.files import write_json

CAPTIONS = ["Happy  birthday", "happy birthday ", "a red ball", "A dog", "a dog on the beach", ""]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three finished shards, whose originals are a table of images that there are not."""
    out = tmp_path / "run"
    for shard in "abcd":
        (tmp_path / f"{shard}.jsonl").write_text(json.dumps({"image": "none.jpg", "caption": "x"}))
    manifest = {
        "source": str(tmp_path / "*.jsonl"),
        "threshold": 0.5,
        "num_shards": 3,
        "openblip": "0.1.0",
        "config": {},
        "models": {},
    }
    write_json(out / "manifest.json", manifest)
    for shard in ("a", "b", "c"):
        finish(out, shard)
    return out


def finish(out: Path, shard: str) -> None:
    chance = random.Random(shard)
    rows = []
    for number in range(40):
        for source, index in (("web", 0), ("synthetic", 0), ("synthetic", 1)):
            rows.append(CaptionRow(
                key=f"{number:03d}", shard=shard, index=index, source=source, caption=chance.choice(CAPTIONS),
                itm=chance.choice([0.2, 0.6, 0.7, 0.8, 0.9]), itc=0.3, logprob=None if source == "web" else -1.0,
            ))  # fmt: skip
    write_captions(out / "captions" / f"{shard}.parquet", rows)
    report: dict[str, Any] = {"shard": shard, "counts": {"images": 40, "rejects": 0}, "rejects": [], "seconds": {}}
    write_json(out / "captions" / f"{shard}.report.json", report)


def decided(run: Path) -> list[dict[str, Any]]:
    decision = Decision.of_manifest(json.loads((run / "manifest.json").read_text()))
    return [row for shard in ("a", "b", "c") for row in read_judged(run, shard, decision).to_pylist()]


def test_repeats_of_all_shards_are_counted_together(run: Path) -> None:
    scores = select(run, rule=Rule(max_repeats=7))
    rows = decided(run)
    by_caption: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for row in rows:
        if row["itm"] > 0.5 and row["caption"]:
            by_caption[" ".join(row["caption"].lower().split())].append((row["itm"], row["kept"]))
        else:
            assert not row["kept"]
    assert by_caption.keys() == {"happy birthday", "a red ball", "a dog", "a dog on the beach"}
    for texts in by_caption.values():
        assert sum(is_kept for _, is_kept in texts) == 7
        assert min(itm for itm, is_kept in texts if is_kept) >= max(itm for itm, is_kept in texts if not is_kept)
    assert scores.kept == 28
    assert [row["weight"] for row in rows] == [float(row["kept"]) for row in rows]
    assert open_source(f"capfilt:{run}").decision.max_repeats == 7  # type: ignore[attr-defined]


def test_what_needs_all_shards_says_when_it_lacks_some(run: Path) -> None:
    select(run, rule=Rule(weight="itm", max_repeats=3))
    (folder,) = (run / "selected").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["a.parquet", "b.parquet", "c.parquet"]
    finish(run, "d")
    decision = Decision.of_manifest(json.loads((run / "manifest.json").read_text()))
    with pytest.raises(ConfigError, match=r"d\.parquet: finished after the decision"):
        read_judged(run, "d", decision)
    decide_again(CapFiltFolder(run))
    decision = CapFiltFolder(run).decision
    assert decision.max_repeats == 3
    assert read_judged(run, "d", decision).num_rows == 120
    assert len(list((run / "selected").iterdir())) == 1
    select(run)
    assert not list((run / "selected").glob("*"))


def test_a_decision_that_fails_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select(run, rule=Rule(max_repeats=3))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments, said in (
        (["--where", "blip > 0.3"], "no column blip; there are key, shard, index, source, caption, itm, itc, logprob"),
        (["--where", "(select count(*) from read_csv('/etc/passwd')) > 0"], "has a query"),
        (["--weight", "caption::int"], "Conversion Error"),
        (["--threshold", "7"], "give 0 to 1"),
        (["--max-repeats", "0"], "at least 1"),
    ):
        assert main(["capfilt-select", str(run), *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_command_states_the_whole_decision(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capfilt-select", str(run), "--threshold", "0.65", "--threshold-web", "0.75"]) == 0
    rows = decided(run)
    for source, threshold in (("web", 0.75), ("synthetic", 0.65)):
        texts = [row for row in rows if row["source"] == source]
        kept = [row for row in texts if row["itm"] > threshold and row["caption"]]
        assert [row for row in texts if row["kept"]] == kept
        assert f"{source}: kept {len(kept)} of {len(texts)} texts" in capsys.readouterr().out
        capsys.readouterr()
        main(["capfilt-select", str(run), "--threshold", "0.65", "--threshold-web", "0.75"])
    where = "source = 'web' and itm < 0.65"
    assert main(["capfilt-select", str(run), "--where", where]) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["threshold"] == 0.65, "which the expression stands in for"
    assert manifest["decision"]["threshold"] is None
    kept_rows = [row for row in decided(run) if row["kept"]]
    assert len(kept_rows) > 20
    assert all(row["source"] == "web" and row["itm"] < 0.65 and row["caption"] for row in kept_rows)


def test_scores_that_only_some_shards_have(run: Path) -> None:
    def score(shard: str) -> None:
        write_score(run, shard, "clip", pa.array([n / 120 for n in range(read_texts(run, shard).num_rows)]))
        write_json(score_file(run, "clip", shard, "report.json"), {})

    score("a")
    score("b")
    with pytest.raises(ConfigError, match=r"c\.parquet: no column clip"):
        select(run, rule=Rule(where="clip > 0.5"))
    score("c")
    select(run, rule=Rule(where="clip > 0.5"))
    assert 90 < sum(row["kept"] for row in decided(run)) < 177
    assert all(row["kept"] == (row["clip"] > 0.5 and row["caption"] != "") for row in decided(run))


def test_a_run_in_an_object_store(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = fsspec.filesystem("memory")
    url = f"memory://decided-{os.getpid()}/run"
    store.put(str(run), url, recursive=True)
    assert main(["capfilt-select", url, "--threshold", "0.5", "--max-repeats", "7"]) == 0
    of_store = capsys.readouterr().out
    stored = [path for path in store.find(url) if "/selected/" in path]
    assert len(stored) == 3
    assert main(["capfilt-select", str(run), "--threshold", "0.5", "--max-repeats", "7"]) == 0
    assert capsys.readouterr().out == of_store
    assert main(["capfilt-select", url]) == 0
    assert not [path for path in store.find(url) if "/selected/" in path]
