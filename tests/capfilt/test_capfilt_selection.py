"""What is kept: the threshold decides at reading, and changing it runs no model; export of what is kept."""

import json
import math
import shutil
import tarfile
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capfilt_world import TEXT, all_rows, picture

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.export import MARKER, ExportFormat, export, tar_key
from openblip.capfilt.folder import COMBINATIONS, NUM_STEPS, RunScores
from openblip.capfilt.local import run_capfilt
from openblip.capfilt.selection import select
from openblip.data.captions import read_judged
from openblip.data.decision import Decision
from openblip.data.images import read_image
from openblip.data.sample import Reject, Sample
from openblip.data.sources import open_source
from openblip.errors import ConfigError
from source_items import items_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.62])
def test_the_source_reads_exactly_the_kept_rows(run_copy: Path, web: Path, threshold: float) -> None:
    select(run_copy, threshold)
    originals = {(s.shard, s.key): s for s in items_of(open_source(str(web)))}
    expected = [
        (row["shard"], f"{row['key']}-{row['source']}-{row['index']}", row["caption"])
        for row in all_rows(run_copy)
        if row["itm"] > threshold
    ]
    samples = list(items_of(open_source(f"capfilt:{run_copy}")))
    assert [(sample.shard, sample.key, sample.captions[0]) for sample in samples] == expected
    assert all(sample.image == originals[sample.shard, sample.key.rsplit("-", 2)[0]].image for sample in samples)


def test_select_needs_no_model_and_no_original(
    config: CapFiltConfig, web: Path, captioner: str, tmp_path: Path
) -> None:
    source = shutil.copytree(web, tmp_path / "web")
    model = shutil.copytree(captioner, tmp_path / "captioner")
    out = tmp_path / "run"
    run_capfilt(replace(config, source=str(source), captioner=str(model)), out)
    rows = all_rows(out)
    shutil.rmtree(source)
    shutil.rmtree(model)
    before = json.loads((out / "manifest.json").read_text())
    scores = select(out, 0.6)
    for name, found in scores.sources.items():
        itm = [row["itm"] for row in rows if row["source"] == name]
        assert (found.texts, found.kept) == (len(itm), sum(score > 0.6 for score in itm))
    assert json.loads((out / "manifest.json").read_text()) == before | {
        "threshold": 0.6, "decision": before["decision"] | {"threshold": 0.6}
    }  # fmt: skip
    assert all_rows(out) == rows
    page = (out / "report.html").read_text()
    assert "threshold 0.6" in page
    assert "image not found at its source" in page


def test_selected_runs_resume_with_their_threshold(config: CapFiltConfig, run_copy: Path) -> None:
    select(run_copy, 0.6)
    summary = run_capfilt(replace(config, threshold=0.6), run_copy)
    assert len(summary.skipped) == 3


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_is_a_probability(run_copy: Path, threshold: float) -> None:
    before = (run_copy / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="threshold"):
        select(run_copy, threshold)
    assert (run_copy / "manifest.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        select(run_copy.parent, 0.5)


@pytest.mark.parametrize("shard", ["00000", "00001", "00002"])
def test_scores_against_a_plain_count(finished_run: Path, shard: str) -> None:
    rows = [row for row in all_rows(finished_run) if row["shard"] == shard]
    scores = RunScores()
    first_rows = scores.add_shard(read_judged(finished_run, shard, Decision()))
    for name, found in scores.sources.items():
        itm = [row["itm"] for row in rows if row["source"] == name]
        assert found.kept_histogram.sum() == found.kept == found.histogram[NUM_STEPS // 2 + 1 :].sum()
        assert found.histogram.tolist() == [
            sum((step - 1) / NUM_STEPS < score <= step / NUM_STEPS for score in itm) for step in range(NUM_STEPS + 1)
        ]
    fates: dict[tuple[bool, bool], list[int]] = {combination: [] for combination in COMBINATIONS}
    for key in {row["key"] for row in rows}:
        own = [(number, row) for number, row in enumerate(rows) if row["key"] == key]
        first = {row["source"]: row["itm"] > 0.5 for _, row in reversed(own)}
        if "web" in first:
            fates[first["web"], first["synthetic"]].append(own[0][0])
    assert {name: found.tolist() for name, found in first_rows.items()} == {
        name: sorted(found) for name, found in fates.items()
    }
    assert scores.combinations == {name: len(found) for name, found in fates.items()}
    assert scores.images == 6


def samples_of(spec: str) -> list[Sample]:
    found = list(items_of(open_source(spec)))
    assert not any(isinstance(sample, Reject) for sample in found)
    return [sample for sample in found if isinstance(sample, Sample)]


def same_image(samples: list[Sample]) -> list[int]:
    """For each sample the number of the first with its image id."""
    ids = [sample.image_id for sample in samples]
    return [ids.index(own) for own in ids]


def test_export_reads_back_as_the_same_pairs(run_copy: Path, tmp_path: Path) -> None:
    select(run_copy, 0.3)
    summary = export(run_copy, tmp_path / "out")
    ours, theirs = samples_of(str(tmp_path / "out")), samples_of(f"capfilt:{run_copy}")
    assert len(ours) == summary.pairs > 20
    assert [(s.shard, s.key, s.image, s.captions) for s in ours] == [
        (s.shard, s.key, s.image, s.captions) for s in theirs
    ]
    assert same_image(ours) == same_image(theirs)
    rows = {(r["shard"], f"{r['key']}-{r['source']}-{r['index']}"): r for r in all_rows(run_copy)}
    for sample in ours:
        row = rows[sample.shard, sample.key]
        assert [sample.info.get(name) for name in ("itm", "itc", "logprob", "source")] == [
            row[name] for name in ("itm", "itc", "logprob", "source")
        ]
        assert (sample.info["origin_shard"], sample.info["origin_key"]) == (row["shard"], row["key"])
        assert sample.info["width"] == 40, "the json of the original is kept"
        assert "captions" not in sample.info, "a text that was filtered out must not come back"


@pytest.mark.parametrize("format", ["tar", "parquet", "huggingface"])
def test_files_of_an_export_hold_no_more_than_they_may(
    run_copy: Path, tmp_path: Path, format: ExportFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    select(run_copy, 0.3)
    out = tmp_path / "out"
    whole = export(run_copy, out, format)
    before = samples_of(str(out))
    largest = max(len(sample.image) for sample in before)
    monkeypatch.setattr("openblip.capfilt.export.MEGABYTE", largest)
    divided = export(run_copy, out, format, shard_size=3)
    assert (divided.pairs, whole.shards < divided.shards < whole.pairs) == (whole.pairs, True)
    files = [file for file in out.rglob("*.*") if file.suffix in (".tar", ".parquet")]
    assert len(files) == divided.shards
    after = samples_of(str(out))
    sizes: dict[str, int] = {}
    for sample in after:
        sizes[sample.shard] = sizes.get(sample.shard, 0) + len(sample.image)
    assert max(sizes.values()) <= 3 * largest
    assert [(s.key, s.image, s.captions) for s in after] == [(s.key, s.image, s.captions) for s in before]
    assert same_image(after) == same_image(before)
    assert export(run_copy, out, format).shards == whole.shards
    assert samples_of(str(out)) == before


def test_a_limit_that_no_file_can_have(run_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shard-size must be at least 1"):
        export(run_copy, tmp_path / "out", shard_size=0)
    with pytest.raises(ConfigError, match="--shard-size has no effect on a list of uids"):
        export(run_copy, tmp_path / "out", "uids", shard_size=5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tar", "jsonl", "folder"])
def test_the_same_data_gives_the_same_bytes_in_any_folder(
    config: CapFiltConfig, web: Path, tmp_path: Path, kind: str
) -> None:
    exports = []
    for home in (tmp_path / "one", tmp_path / "elsewhere" / "two"):
        if kind == "tar":
            shutil.copytree(web, home / "web")
        else:
            (home / "web").mkdir(parents=True)
            for number in range(3):
                (home / "web" / f"{number}.jpg").write_bytes(picture(number))
                (home / "web" / f"{number}.txt").write_text(TEXT)
        rows = [{"image": f"web/{number}.jpg", "caption": TEXT} for number in (0, 1, 1)]
        (home / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = home / ("pairs.jsonl" if kind == "jsonl" else "web")
        run_capfilt(replace(config, source=str(source), threshold=0.0), home / "run")
        export(home / "run", home / "out")
        exports.append({file.name: file.read_bytes() for file in (home / "out").iterdir()})
    assert exports[0] == exports[1]
    assert len(exports[0]) > 2
    assert not any(str(tmp_path).encode() in content for content in exports[0].values())


def test_a_new_threshold_updates_the_export(run_copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    select(run_copy, 0.3)
    before = export(run_copy, out).pairs
    select(run_copy, 0.7)
    after = export(run_copy, out)
    assert after.pairs == sum(row["itm"] > 0.7 for row in all_rows(run_copy)) < before
    assert len(list(out.glob("*.tar"))) == after.shards
    select(run_copy, 1.0)
    assert export(run_copy, out).pairs == 0
    assert list(out.glob("*.tar")) == []


def test_foreign_folders_are_left_alone(run_copy: Path, config: CapFiltConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.tar").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="not empty"):
        export(run_copy, tmp_path / "mine")
    assert (tmp_path / "mine" / "00000.tar").read_bytes() == b"precious"
    export(run_copy, tmp_path / "out")
    run_capfilt(replace(config, seed=5), tmp_path / "other")
    with pytest.raises(ConfigError, match="another CapFilt run"):
        export(tmp_path / "other", tmp_path / "out")
    # Earlier versions marked an export by the hash of the settings.
    marker = json.loads((tmp_path / "out" / MARKER).read_text())
    report = json.loads((run_copy / "captions" / "00000.report.json").read_text())
    (tmp_path / "out" / MARKER).write_text(json.dumps({"run": report["config"]}))
    export(run_copy, tmp_path / "out")
    assert json.loads((tmp_path / "out" / MARKER).read_text()) == marker


def test_any_key_and_any_image_format(config: CapFiltConfig, tmp_path: Path) -> None:
    """Keys with dots, blanks, other scripts; a bmp, which a tar shard cannot hold."""
    folder = tmp_path / "pictures"
    names = ["a.b.jpg", "a_b.png", "犬 1.webp", "sub.dir/c%2E.jpg", "d.bmp"]
    formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP"}
    lines = []
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, format=formats[path.suffix[1:]]))
        lines.append({"image": str(path), "caption": TEXT})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run_capfilt(replace(config, source=str(tmp_path / "pairs.jsonl"), threshold=0.0), tmp_path / "run")
    summary = export(tmp_path / "run", tmp_path / "out")
    assert not summary.rejects
    assert not any(str(tmp_path).encode() in tar.read_bytes() for tar in (tmp_path / "out").glob("*.tar"))
    ours, theirs = samples_of(str(tmp_path / "out")), samples_of(f"capfilt:{tmp_path / 'run'}")
    assert len(theirs) == 10
    assert [(s.key, s.captions) for s in ours] == [(tar_key(s.key), s.captions) for s in theirs]
    for sample, original in zip(ours, theirs, strict=True):
        assert read_image(sample.image).tobytes() == read_image(original.image).tobytes()


def test_columns_that_json_does_not_know(config: CapFiltConfig, tmp_path: Path) -> None:
    columns = {"image": picture(1), "caption": TEXT, "taken": date(2026, 11, 26), "price": Decimal("1.50")}
    columns |= {"raw": b"\xff", "share": math.nan, "empty": None, "vector": [0.5, math.inf], "tags": ["a"]}
    pq.write_table(pa.Table.from_pylist([columns]), tmp_path / "pairs.parquet")
    run_capfilt(replace(config, source=str(tmp_path / "pairs.parquet"), threshold=0.0), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "pairs.tar") as tar:
        [member, *_] = [member for member in tar if member.name.endswith(".json")]
        info = json.loads(tar.extractfile(member).read(), parse_constant=pytest.fail)  # type: ignore[union-attr]
    assert {name: info.get(name) for name in columns if name not in ("image", "caption")} == {
        "taken": "2026-11-26", "price": "1.50", "raw": None, "share": None, "empty": None, "vector": [0.5, None],
        "tags": ["a"],
    }  # fmt: skip


@pytest.mark.parametrize("key", ["../up", "/etc/passwd", "a/../b", "..", "a\\b", "x\ny"])
def test_no_member_climbs_out_and_keys_stay_different(key: str) -> None:
    name = tar_key(key)
    member = tarfile.TarInfo(f"{name}.jpg")
    assert tarfile.data_filter(member, "/somewhere").name == member.name
    assert "." not in name
    keys = ["a.b", "a%2Eb", "a%252Eb", "/a", "%2Fa", key]
    assert len({tar_key(each) for each in keys}) == len(keys)
