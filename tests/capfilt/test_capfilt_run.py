"""A run as a whole: complete rows, the models' own scores, resume, refusals, failures; the commands."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from capfilt_world import all_rows, picture, sample_members, write_checkpoint

import openblip
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.local import run_capfilt
from openblip.capfilt.process import image_seed
from openblip.capfilt.selection import select
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.cli.main import main
from openblip.data.sources import open_source
from openblip.errors import ConfigError, SourceError, UnsupportedTaskError
from openblip.predictor import BlipPredictor
from openblip.progress import Progress
from shared_files import write_tar
from source_items import items_of


def test_every_text_has_a_row(web: Path, config: CapFiltConfig, tmp_path: Path) -> None:
    run_capfilt(replace(config, num_captions=2), tmp_path)
    rows = all_rows(tmp_path)
    expected = []
    for sample in items_of(open_source(str(web))):
        expected += [(sample.shard, sample.key, "web", i, text) for i, text in enumerate(sample.captions)]
        expected += [(sample.shard, sample.key, "synthetic", i, None) for i in range(2)]
    found = [
        (row["shard"], row["key"], row["source"], row["index"], row["caption"] if row["source"] == "web" else None)
        for row in rows
    ]
    assert found == expected
    assert all((row["logprob"] is None) == (row["source"] == "web") for row in rows)
    assert {path.name for path in tmp_path.glob("captions/*")} == {
        f"{shard:05d}.{kind}" for shard in range(3) for kind in ("parquet", "report.json", "rejects.jsonl")
    }


def test_rows_are_what_the_models_say(web: Path, captioner: str, filter_model: str, finished_run: Path) -> None:
    """Captions are the captioner's with the image's own seed; scores are P(match) and cosine of each pair."""
    writer, judge = openblip.load(captioner), openblip.load(filter_model)
    samples = {(s.shard, s.key): s for s in items_of(open_source(str(web)))}
    for row in all_rows(finished_run)[:20]:
        image = samples[row["shard"], row["key"]].image
        assert row["itm"] == pytest.approx(judge.match(image, row["caption"]).item(), abs=1e-5)
        assert row["itc"] == pytest.approx(judge.similarity(image, row["caption"]).item(), abs=1e-5)
        if row["source"] == "synthetic":
            written = writer.caption(
                [image],
                decoding=openblip.Nucleus(top_p=0.9),
                return_scores=True,
                seeds=[image_seed(0, row["shard"], row["key"])],
            )[0]
            assert row["caption"] == written.text
            assert row["logprob"] == pytest.approx(written.logprob, rel=1e-5)


def test_batches_and_workers_change_nothing(config: CapFiltConfig, finished_run: Path, tmp_path: Path) -> None:
    run_capfilt(replace(config, batch_size=1, num_workers=1), tmp_path)
    numbers = ("itm", "itc", "logprob")
    for ours, theirs in zip(all_rows(tmp_path), all_rows(finished_run), strict=True):
        found, expected = ([row.pop(name) or 0.0 for name in numbers] for row in (ours, theirs))
        assert ours == theirs
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_display_shows_what_is_kept_so_far(
    config: CapFiltConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [*sample_members("1", 1, ["a dog"]), ("2.jpg", b"no image"), ("2.txt", b"a dog")]
    write_tar(tmp_path / "web.tar", members)
    shown: list[str] = []
    monkeypatch.setattr(
        Progress, "show", lambda bar, status, show=Progress.show: shown.append(status) or show(bar, status)
    )
    config = replace(config, source=str(tmp_path / "web.tar"), threshold=0.0, batch_size=1)
    run_capfilt(config, tmp_path / "run")
    assert shown[0] == "kept: web 100%, synthetic 100%; 0 rejects"  # after the first batch of the shard
    assert set(shown[1:]) == {"kept: web 100%, synthetic 100%; 1 reject"}
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("capfilt: 2/2 images (100%), ")
    assert last.endswith("images/s, kept: web 100%, synthetic 100%; 1 reject")


def test_the_seed_and_the_shard_change_the_captions(config: CapFiltConfig, finished_run: Path, tmp_path: Path) -> None:
    run_capfilt(replace(config, seed=1), tmp_path)
    ours, theirs = (
        [row["caption"] for row in all_rows(out) if row["source"] == "synthetic"] for out in (tmp_path, finished_run)
    )
    assert ours != theirs
    assert image_seed(0, "00000", "0001") != image_seed(0, "00001", "0001")
    assert image_seed(0, "a", "bc") != image_seed(0, "ab", "c")


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_row_for_row(tmp_path: Path, captioner: str, filter_model: str) -> None:
    web = tmp_path / "web"
    for shard in range(30):
        members = [m for n in range(2) for m in sample_members(f"{n}", 10 * shard + n, [f"dog {n}", "cat"])]
        write_tar(web / f"{shard:03d}.tar", members)
    words = ["capfilt", str(web), "--captioner", captioner, "--filter", filter_model, "--batch-size", "3"]
    program = "import sys; from openblip.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *words]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen([*command, "--out", str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(killed.glob("captions/*.report.json"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("captions/*.report.json")}
    assert len(finished) < 30
    (killed / "captions" / "000.parquet.123.partial").write_bytes(b"half a file")
    config = CapFiltConfig(source=str(web), captioner=captioner, filter=filter_model, batch_size=3)
    summary = run_capfilt(config, killed)
    run_capfilt(config, whole)
    assert len(summary.skipped) == len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished shards were redone"
    assert all_rows(killed) == all_rows(whole)
    assert not list(killed.rglob("*.partial"))
    assert summary.failed == []


@pytest.mark.parametrize(
    ("change", "field", "was", "now"),
    [
        ({"seed": 7}, "seed", "0", "7"),
        ({"num_captions": 2}, "num_captions", "1", "2"),
        ({"decoding": openblip.Nucleus(top_p=0.5)}, "top_p", "0.9", "0.5"),
        ({"decoding": openblip.Nucleus(top_k=5)}, "top_k", "0", "5"),
        ({"decoding": openblip.Beam(num_beams=2)}, "decoding", "'nucleus'", "'beam'"),
        ({"prompt": "two dogs"}, "prompt", "None", "'two dogs'"),
        ({"dtype": "bfloat16"}, "dtype", "'float32'", "'bfloat16'"),
        ({"jpeg": "exact"}, "jpeg", "'scaled'", "'exact'"),
    ],
)
def test_changed_settings_are_refused_by_name(
    config: CapFiltConfig, run_copy: Path, change: dict[str, object], field: str, was: str, now: str
) -> None:
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"{field} was {was}, is now {now}"):
        run_capfilt(replace(config, **change), run_copy)
    assert {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()} == before


def test_the_precision_that_auto_chose_is_recorded(config: CapFiltConfig, tmp_path: Path) -> None:
    chosen = openblip.load(config.captioner, dtype="auto").precision
    run_capfilt(replace(config, dtype="auto"), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["config"]["dtype"] == chosen
    assert [model["dtype"] for model in manifest["models"].values()] == [chosen, chosen]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count(f"<bdi>{chosen}</bdi>") == 3  # of the settings, and of both models


def test_a_run_of_an_earlier_version_is_continued(config: CapFiltConfig, run_copy: Path) -> None:
    """Of one that knew only float32, and no ban on repeated n-grams. The hash of its settings stays."""
    path = run_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    reports = {file.read_bytes() for file in run_copy.glob("captions/*.report.json")}
    for name in ("dtype", "no_repeat_ngram_size", "top_k"):
        del manifest["config"][name]
    path.write_text(json.dumps(manifest))
    (run_copy / "captions" / "00001.report.json").unlink()
    assert run_capfilt(config, run_copy).done == ["00001"]
    hashes = {json.loads(file.read_text())["config"] for file in run_copy.glob("captions/*.report.json")}
    assert hashes == {json.loads(report)["config"] for report in reports}
    assert len(hashes) == 1


def test_a_run_that_decoded_exactly_is_continued_so(config: CapFiltConfig, run_copy: Path) -> None:
    """Versions that do not say how JPEG files were decoded decoded them exactly."""
    path = run_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]["jpeg"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="jpeg was 'exact', is now 'scaled'"):
        run_capfilt(config, run_copy)
    assert len(run_capfilt(replace(config, jpeg="exact"), run_copy).skipped) == 3


def test_equal_encoders_run_once(
    config: CapFiltConfig, web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter with the captioner's image encoder scores what the captioner encoded, and gives the same rows."""
    alike = load_checkpoint(write_checkpoint(tmp_path / "filter", seed=2, image_size=32, heads=("itc", "itm")))
    alike.model.vision.load_state_dict(load_checkpoint(config.captioner).model.vision.state_dict())
    save_checkpoint(alike, tmp_path / "alike", "openblip")
    config = replace(config, filter=str(tmp_path / "alike"))
    encoded: list[int] = []
    encode = BlipPredictor._encode
    monkeypatch.setattr(BlipPredictor, "_encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    run_capfilt(config, tmp_path / "once")
    assert sum(encoded) == 18
    monkeypatch.setattr(BlipPredictor, "encodes_alike", lambda self, other: False)
    run_capfilt(config, tmp_path / "twice")
    assert sum(encoded) == 18 + 36
    assert all_rows(tmp_path / "once") == all_rows(tmp_path / "twice")


@pytest.mark.parametrize("role", ["captioner", "filter"])
def test_changed_weights_are_refused(config: CapFiltConfig, run_copy: Path, tmp_path: Path, role: str) -> None:
    other = write_checkpoint(tmp_path / "other", seed=9, image_size=24)
    with pytest.raises(ConfigError, match=f"{role} was"):
        run_capfilt(replace(config, **{role: other}), run_copy)


def test_changed_threshold_points_to_capfilt_select(config: CapFiltConfig, run_copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"threshold was 0\.5, is now 0\.7.*capfilt-select .* 0\.7"):
        run_capfilt(replace(config, threshold=0.7), run_copy)


def test_the_same_model_and_source_elsewhere_resume(
    config: CapFiltConfig, run_copy: Path, web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(config.filter, tmp_path / "moved")
    monkeypatch.chdir(web.parent)
    summary = run_capfilt(replace(config, filter=str(moved), source=web.name), run_copy)
    assert len(summary.skipped) == 3


def test_several_sources_are_one_run_from_any_folder(
    config: CapFiltConfig, web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(web)
    run_capfilt(replace(config, source="00000.tar,00001.tar[:60%]"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    rows = all_rows(tmp_path / "run")
    assert {row["shard"] for row in rows} == {"1-00000", "2-00001"}
    select(tmp_path / "run", 0.0)
    kept = items_of(open_source("capfilt:run"))
    parts = [items_of(open_source(f"capfilt:run{part}")) for part in ("[:50%]", "[50%:]")]
    assert len(kept) == len(rows)
    assert sorted(item.key for part in parts for item in part) == sorted(item.key for item in kept)


def test_new_shards_of_a_grown_source_are_added(config: CapFiltConfig, web: Path, tmp_path: Path) -> None:
    grown = tmp_path / "web"
    grown.mkdir()
    shutil.copy(web / "00000.tar", grown)
    config = replace(config, source=str(grown))
    run_capfilt(config, tmp_path / "run")
    shutil.copy(web / "00001.tar", grown)
    summary = run_capfilt(config, tmp_path / "run")
    assert (summary.skipped, summary.done) == (["00000"], ["00001"])
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["num_shards"] == 2


def test_unreadable_samples_become_rejects(config: CapFiltConfig, tmp_path: Path) -> None:
    good = sample_members("good", 1, ["a dog"])
    members = [
        ("broken.jpg", b"\xff\xd8\xff\xe0 no picture"),
        ("broken.txt", b"a cat"),
        *good,
        ("again.jpg", picture(2)),
        ("again.txt", b"first"),
        ("good.jpg", picture(3)),
        ("cut.jpg", picture(4, size=(400, 300))[:-900]),
        ("cut.txt", b"half a picture"),
        ("alone.txt", b"no picture"),
        ("json.jpg", picture(5)),
        ("json.json", b"{not json"),
    ]
    write_tar(tmp_path / "web" / "mixed.tar", members)
    summary = run_capfilt(replace(config, source=str(tmp_path / "web")), tmp_path / "run")
    assert summary.failed == []
    assert {row["key"] for row in all_rows(tmp_path / "run")} == {"good", "again"}
    lines = (tmp_path / "run" / "captions" / "mixed.rejects.jsonl").read_text().splitlines()
    rejects = [json.loads(line) for line in lines]
    assert sorted(reject["key"] for reject in rejects) == ["alone", "broken", "cut", "good", "json"]
    assert all(reject["shard"] == "mixed" and reject["reason"] for reject in rejects)
    report = json.loads((tmp_path / "run" / "captions" / "mixed.report.json").read_text())
    assert report["counts"]["images"] == 2
    assert report["counts"]["rejects"] == len(rejects)
    assert sorted(reject["key"] for reject in report["rejects"]) == sorted(r["key"] for r in rejects)


def test_a_truncated_shard_gives_its_whole_samples(config: CapFiltConfig, tmp_path: Path) -> None:
    members = [member for n in range(5) for member in sample_members(f"{n}", n, ["a dog"])]
    path = tmp_path / "web" / "cut.tar"
    write_tar(path, members)
    os.truncate(path, 512 * 12)
    summary = run_capfilt(replace(config, source=str(path)), tmp_path / "run")
    keys = [row["key"] for row in all_rows(tmp_path / "run") if row["source"] == "web"]
    assert keys == [f"{n}" for n in range(len(keys))]
    assert 0 < len(keys) < 5
    rejects = (tmp_path / "run" / "captions" / "cut.rejects.jsonl").read_text()
    assert "ends early" in rejects
    assert summary.failed == []


def test_a_failing_shard_is_recorded_and_tried_again(config: CapFiltConfig, web: Path, tmp_path: Path) -> None:
    source = shutil.copytree(web, tmp_path / "web")
    whole = (source / "00001.tar").read_bytes()
    (source / "00001.tar").write_bytes(b"\x1f\x8b" + bytes(2000))  # gzip: no plain tar
    config = replace(config, source=str(source))
    out = tmp_path / "run"
    summary = run_capfilt(config, out)
    assert summary.done == ["00000", "00002"]
    assert [shard for shard, _ in summary.failed] == ["00001"]
    failure = json.loads((out / "captions" / "00001.failure.json").read_text())
    assert "gzip" in failure["error"]
    assert "could not be finished" in (out / "report.html").read_text()
    (source / "00001.tar").write_bytes(whole)
    summary = run_capfilt(config, out)
    assert (summary.failed, summary.done) == ([], ["00001"])
    assert not (out / "captions" / "00001.failure.json").exists()


def test_report_and_manifest(finished_run: Path) -> None:
    rows = [row for row in all_rows(finished_run) if row["shard"] == "00002"]
    report = json.loads((finished_run / "captions" / "00002.report.json").read_text())
    by_source = {name: [row for row in rows if row["source"] == name] for name in ("web", "synthetic")}
    assert report["counts"] == {
        "images": 6,
        "rejects": 0,
        "web_texts": len(by_source["web"]),
        "synthetic_texts": len(by_source["synthetic"]),
        "cut_texts": 0,
        "unknown_tokens": 0.0,
        "kept": {name: sum(row["itm"] > 0.5 for row in found) for name, found in by_source.items()},
    }
    assert [len(found) for found in by_source.values()] == [8, 6]
    assert report["seconds"]["total"] >= report["seconds"]["caption"] > 0
    assert set(report["seconds"]) == {"read", "encode", "caption", "filter", "write", "total"}
    manifest = json.loads((finished_run / "manifest.json").read_text())
    assert {"source", "threshold", "models", "config"} <= manifest.keys()
    assert report["models"] == {role: model["sha256"] for role, model in manifest["models"].items()}
    assert report["models"].keys() == {"captioner", "filter"}


def test_runs_of_earlier_versions_go_on(config: CapFiltConfig, run_copy: Path) -> None:
    """Their manifest named the models at its top, and their reports had the counts there."""
    manifest = json.loads((run_copy / "manifest.json").read_text())
    (run_copy / "manifest.json").write_text(json.dumps({**manifest.pop("models"), **manifest}))
    for path in run_copy.glob("captions/*.report.json"):
        report = json.loads(path.read_text())
        path.write_text(json.dumps({**report.pop("models"), **report.pop("counts"), **report}))
    (run_copy / "captions" / "00001.report.json").unlink()
    page = (run_copy / "report.html").read_text()
    summary = run_capfilt(config, run_copy)
    assert (summary.done, summary.skipped) == (["00001"], ["00000", "00002"])
    before_time = re.sub(r'(?<=capfilt-select )[^"]*', str(run_copy), page[: page.index("<h3>Time")])
    assert (run_copy / "report.html").read_text().startswith(before_time)
    select(run_copy, 0.6)
    assert json.loads((run_copy / "manifest.json").read_text())["models"].keys() == {"captioner", "filter"}


def test_nothing_can_start(config: CapFiltConfig, tmp_path: Path, filter_model: str) -> None:
    with pytest.raises(SourceError):
        run_capfilt(replace(config, source=str(tmp_path / "none.tar")), tmp_path / "run")
    with pytest.raises(UnsupportedTaskError, match="cannot be the captioner: it has no caption"):
        run_capfilt(replace(config, captioner=filter_model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 1.5},
        {"threshold": float("nan")},
        {"batch_size": 0},
        {"num_captions": 2, "decoding": openblip.Greedy()},
        {"num_captions": 4, "decoding": openblip.Beam(num_beams=3)},
        {"decoding": openblip.Nucleus(seed=3)},
    ],
)
def test_settings_that_cannot_work(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        CapFiltConfig(source="a", captioner="b", filter="c", **change)  # type: ignore[arg-type]


def test_the_three_commands(
    web: Path, captioner: str, filter_model: str, tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["capfilt", str(web), "--captioner", captioner, "--filter", filter_model, "--out", str(out)]
    assert main([*words, "--batch-size", "4", "--engine", "local"]) == 0
    assert all_rows(out) == all_rows(finished_run), "the defaults of the command are those of the config"
    printed = capsys.readouterr().out
    assert "web: kept" in printed
    assert str(out / "report.html") in printed
    assert main([*words, "--seed", "1"]) == 2
    assert "seed was 0, is now 1" in capsys.readouterr().err
    assert main(["capfilt-select", str(out), "--threshold", "0.3"]) == 0
    kept = sum(row["itm"] > 0.3 for row in all_rows(out))
    assert main(["capfilt-export", str(out), "--out", str(tmp_path / "tars")]) == 0
    assert f"wrote {kept} pairs" in capsys.readouterr().out
    assert len(items_of(open_source(str(tmp_path / "tars")))) == kept


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--threshold", "2"], "threshold"), (["--decoding", "greedy", "--num-captions", "2"], "Greedy")],
)
def test_bad_input_is_one_line_and_exit_2(
    web: Path, tmp_path: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["capfilt", str(web), "--captioner", "none", "--filter", "none", "--out", str(tmp_path / "run")]
    assert main([*words, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_shard_that_fails_exits_1(
    captioner: str, filter_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    words = ["--captioner", captioner, "--filter", filter_model, "--out", str(tmp_path / "run")]
    assert main(["capfilt", str(tmp_path / "packed.tar"), *words]) == 1
    assert "failed: packed" in capsys.readouterr().err
