"""Runs of CapFilt with captioners that are no BLIP, and with several candidates per image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from capfilt_world import all_rows

import openblip
from marks import slow
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.local import run_capfilt
from openblip.capfilt.process import image_seed, rank_texts
from openblip.capfilt.selection import select
from openblip.checkpoints.checkpoint import save_native
from openblip.cli.main import main
from openblip.data.captions import read_texts
from openblip.data.decision import Rule
from openblip.data.sources import open_source
from openblip.errors import CheckpointError, ConfigError
from openblip.files import read_json
from openblip.predictor import load_captioner
from source_items import items_of
from tiny_blip2 import tiny_blip2
from tiny_captioners import save_captioner

NUMBERS = ("itm", "itc", "logprob")
SHORT = openblip.Nucleus(max_new_tokens=8)


@pytest.fixture(scope="module", params=["llava", *slow("qwen2_vl", "git", "blip2")])
def other_captioner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param != "blip2":
        return save_captioner(request.param, folder)
    save_native(folder, tiny_blip2(language="opt"))
    return str(folder)


def test_rows_are_what_captioner_and_filter_say(
    config: CapFiltConfig, other_captioner: str, filter_model: str, tmp_path: Path
) -> None:
    """With scores of a filter that is another model; and the same rows for any batch size."""
    config = replace(config, captioner=other_captioner, num_captions=2, decoding=SHORT, prompt="a photo of")
    summary = run_capfilt(config, tmp_path / "run")
    assert not summary.failed
    assert len(summary.done) == 3
    rows = all_rows(tmp_path / "run")
    writer, judge = load_captioner(other_captioner, prompt="a photo of"), openblip.load(filter_model)
    samples = {(s.shard, s.key): s for s in items_of(open_source(config.source))}
    synthetic = [row for row in rows if row["source"] == "synthetic"]
    assert len(synthetic) == 2 * len(samples)
    for row in synthetic[:8]:
        image, seed = samples[row["shard"], row["key"]].image, image_seed(0, row["shard"], row["key"])
        settings = {"decoding": SHORT, "num_captions": 2, "return_scores": True, "seeds": [seed]}
        written = writer.caption([image], prompt="a photo of", **settings)[0][row["index"]]
        assert row["caption"] == written.text
        assert row["logprob"] == pytest.approx(written.logprob, rel=1e-5)
        if written.text:
            assert row["itm"] == pytest.approx(judge.match(image, row["caption"]).item(), abs=1e-5)
            assert row["itc"] == pytest.approx(judge.similarity(image, row["caption"]).item(), abs=1e-5)
    models = read_json(tmp_path / "run/manifest.json")["models"]
    assert models["captioner"]["sha256"] == writer.fingerprint() != models["filter"]["sha256"]

    run_capfilt(replace(config, batch_size=1, num_workers=1), tmp_path / "alone")
    for ours, theirs in zip(rows, all_rows(tmp_path / "alone"), strict=True):
        found, expected = ([row.pop(name) or 0.0 for name in NUMBERS] for row in (ours, theirs))
        assert ours == theirs
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_another_prompt_is_another_run(config: CapFiltConfig, tmp_path: Path) -> None:
    """Web texts are scored with the prompt of the run."""
    captioner = save_captioner("llava", tmp_path / "llava")
    config = replace(config, captioner=captioner, decoding=openblip.Greedy(max_new_tokens=2))
    run_capfilt(config, tmp_path / "run")
    assert run_capfilt(config, tmp_path / "run").skipped == ["00000", "00001", "00002"]
    assert main(["capfilt-score", str(tmp_path / "run"), "--scores", "text_logprob"]) == 0
    texts = read_texts(tmp_path / "run", "00000").to_pylist()
    written = [row for row in texts if row["source"] == "synthetic" and row["caption"]]
    assert all(row["text_logprob"] is not None for row in texts if row["caption"])
    assert written[0]["text_logprob"] < 0
    with pytest.raises(ConfigError, match="prompt was None, is now 'a photo of'"):
        run_capfilt(replace(config, prompt="a photo of"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="does not describe a BLIP or BLIP-2"):
        run_capfilt(replace(config, filter=captioner, captioner=config.filter), tmp_path / "other")


def test_candidates_are_ranked_and_the_best_are_kept(config: CapFiltConfig, tmp_path: Path) -> None:
    options = [config.source, f"--captioner={config.captioner}", f"--filter={config.filter}"]
    options += ["--threshold=0", "--dtype=float32", "--candidates=5"]
    assert main(["capfilt", *options, "--keep-best=2", "--rank-by=itm", f"--out={tmp_path}"]) == 0
    rows = all_rows(tmp_path)
    by_image: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        by_image.setdefault((row["shard"], row["key"]), []).append(row)
    num_kept = 0
    for of_image in by_image.values():
        candidates = [row for row in of_image if row["source"] == "synthetic"]
        assert [row["index"] for row in candidates] == list(range(5))
        assert sorted(row["rank"] for row in candidates) == [1, 2, 3, 4, 5]
        best = min(candidates, key=lambda row: row["rank"])
        assert best["itm"] == max(row["itm"] for row in candidates)
        assert all(row["rank"] is None for row in of_image if row["source"] == "web")
        num_kept += sum(row["rank"] <= 2 and bool(row["caption"]) for row in candidates)
    source = open_source(f"capfilt:{tmp_path}")
    texts = [sample for sample in items_of(source) if "-synthetic-" in sample.key]
    assert len(texts) == num_kept
    reports = [read_json(path) for path in sorted(tmp_path.glob("captions/*.report.json"))]
    assert sum(report["counts"]["kept"]["synthetic"] for report in reports) == num_kept
    assert select(tmp_path, 0.0, Rule(best_captions=5)).sources["synthetic"].kept > num_kept
    assert select(tmp_path, threshold=0.0).sources["synthetic"].kept == num_kept  # as the run was asked to keep
    assert main(["capfilt", *options, "--keep-best=3", "--rank-by=itm", f"--out={tmp_path}"]) == 2


@pytest.mark.slow
def test_the_captions_are_those_of_a_run_without_ranks(config: CapFiltConfig, tmp_path: Path) -> None:
    run_capfilt(replace(config, candidates=3), tmp_path / "ranked")
    run_capfilt(replace(config, num_captions=3), tmp_path / "plain")
    ranked = all_rows(tmp_path / "ranked")
    assert [row.pop("rank") is None for row in ranked] == [row["source"] == "web" for row in ranked]
    assert ranked == all_rows(tmp_path / "plain")
    assert "rank" not in pq.read_schema(tmp_path / "plain/captions/00000.parquet").names


def test_a_text_that_is_said_before_ranks_behind_all_others() -> None:
    assert rank_texts(["a dog", "A  dog", "a cat", "", "a tree"], [0.9, 0.8, 0.5, 0.7, -0.2]) == [1, 4, 2, 5, 3]
    assert rank_texts(["b", "a"], [0.5, 0.5]) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 1}, "keep_best is 2 of 1 candidates"),
        ({"candidates": 4, "num_captions": 2}, "give num_captions or candidates"),
        ({"candidates": 4, "decoding": openblip.Greedy()}, "Greedy writes one"),
        ({"candidates": 0}, "must be at least 1"),
    ],
)
def test_candidates_that_cannot_be_are_refused(config: CapFiltConfig, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, **changes)


def test_keep_best_needs_candidates(config: CapFiltConfig, capsys: pytest.CaptureFixture[str]) -> None:
    options = [config.source, f"--captioner={config.captioner}", f"--filter={config.filter}", "--out=unused"]
    assert main(["capfilt", *options, "--keep-best=2"]) == 2
    assert "--keep-best has no effect here" in capsys.readouterr().err
