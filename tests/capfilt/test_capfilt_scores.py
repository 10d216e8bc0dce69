"""Scores that are computed after a CapFilt run: one column each, whatever stops the command."""

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from capfilt_world import all_rows, drawing, picture, sample_members

import openblip
from marks import slow
from openblip.capfilt.config import SCORES, CapFiltConfig, ScoreConfig
from openblip.capfilt.local import run_capfilt
from openblip.capfilt.scores import SCORE_KINDS, is_boilerplate, score_run
from openblip.cli.main import main
from openblip.data.captions import finished_shards, read_embeddings, read_texts, score_file
from openblip.data.reader import read_source
from openblip.data.sources import open_source
from openblip.errors import ConfigError, SourceError
from openblip.predictor import BlipPredictor
from shared_files import write_tar
from tiny_similarity import save_model


def values_of(run: Path, column: str) -> list[Any]:
    """A column of all shards."""
    return [value for shard in finished_shards(run) for value in read_texts(run, shard, [column])[column].to_pylist()]


def score(run: Path, *names: str, **settings: Any) -> Any:
    return score_run(run, ScoreConfig(scores=names, num_workers=2, batch_size=4, **settings))


@pytest.fixture(scope="session")
def embedded_run(tmp_path_factory: pytest.TempPathFactory, web: Path, captioner: str, filter_model: str) -> Path:
    """A whole run over `web` with its embeddings, for tests that only read it."""
    out = tmp_path_factory.mktemp("embedded") / "run"
    models = {"captioner": captioner, "filter": filter_model, "dtype": "float32"}
    run_capfilt(CapFiltConfig(source=str(web), **models, batch_size=4, keep_embeddings=True), out)
    return out


def test_kept_embeddings_are_the_filters(embedded_run: Path, finished_run: Path, web: Path, filter_model: str) -> None:
    assert all_rows(embedded_run) == all_rows(finished_run)
    model = openblip.load(filter_model, dtype="float32")
    images = [sample.image for sample, _ in read_source(open_source(str(web)), id, shards=["00001"])]
    texts = read_texts(embedded_run, "00001")
    embeddings = read_embeddings(embedded_run, "00001")
    assert embeddings.images.dtype == np.float16
    np.testing.assert_allclose(embeddings.images, model.embed_images(images).numpy(), atol=1e-3)
    np.testing.assert_allclose(embeddings.texts, model.embed_texts(texts["caption"].to_pylist()).numpy(), atol=1e-3)
    starts = texts["key"].to_pylist()
    owners = [sorted(set(starts)).index(key) for key in starts]
    cosines = (embeddings.images[owners].astype(np.float32) * embeddings.texts).sum(axis=1)
    np.testing.assert_allclose(cosines, texts["itc"].to_numpy(), atol=2e-3)
    with pytest.raises(SourceError, match="embeddings"):
        read_embeddings(finished_run, "00001")


def test_a_run_cannot_begin_to_keep_embeddings(run_copy: Path, config: CapFiltConfig) -> None:
    with pytest.raises(ConfigError, match="keep_embeddings was False, is now True"):
        run_capfilt(replace(config, keep_embeddings=True), run_copy)


@pytest.fixture
def embedded_copy(embedded_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(embedded_run, tmp_path / "embedded")


def test_every_score_is_listed_with_a_line() -> None:
    assert list(SCORE_KINDS) == list(SCORES)


def test_scores_of_texts_are_columns_of_the_run(run_copy: Path) -> None:
    before = all_rows(run_copy)
    summary = score(run_copy, "num_words", "num_characters,language", "language_probability", "boilerplate")
    assert summary.done == dict.fromkeys(
        ["num_words", "num_characters", "language", "language_probability", "boilerplate"], 3
    )
    captions = values_of(run_copy, "caption")
    assert values_of(run_copy, "num_words") == [len(caption.split()) for caption in captions]
    assert values_of(run_copy, "num_characters") == [len(caption) for caption in captions]
    assert values_of(run_copy, "boilerplate") == [is_boilerplate(caption) for caption in captions]
    assert set(values_of(run_copy, "language")) >= {"en"}
    assert all(0 < value <= 1 for value in values_of(run_copy, "language_probability"))
    assert all_rows(run_copy) == before
    report = json.loads(score_file(run_copy, "num_words", "00000", "report.json").read_text())
    assert report["texts"] == len(read_texts(run_copy, "00000"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IMG_0123.JPG", True), ("DSC 4411", True), ("", True), ("42", True), ("www.example.com", True), ("logo", True),
        ("Click here to download", True), ("stock photo of a cat", True), ("Only $9.99!", True), ("© 2019 X", True),
        ("a photo of a dog", False), ("the logo of a cafe on a wall", False), ("ein Hund", False), ("狗", False),
        ("two cats and 3 dogs", False), ("image of the river at night", False),
    ],
)  # fmt: skip
def test_boilerplate_says_nothing_of_an_image(text: str, expected: bool) -> None:
    assert is_boilerplate(text) == expected


def test_the_same_command_again_computes_only_what_is_missing(run_copy: Path) -> None:
    score(run_copy, "num_words", "width")
    files = {path: path.stat().st_mtime_ns for path in run_copy.glob("scores/*/*")}
    assert score(run_copy, "num_words", "width").done == {"num_words": 0, "width": 0}
    expected = {path: pq.read_table(path) for path in files if path.suffix == ".parquet"}
    # as after a kill: a column without its report, a file that was being written
    score_file(run_copy, "width", "00001", "report.json").unlink()
    score_file(run_copy, "width", "00001").write_bytes(b"half")
    (run_copy / "scores" / "width" / ".00002.parquet.host.1.partial").write_bytes(b"half")
    (run_copy / "scores" / "x.partial").mkdir()
    assert score(run_copy, "num_words", "width").done == {"num_words": 0, "width": 1}
    again = {path: path.stat().st_mtime_ns for path in run_copy.glob("scores/*/*")}
    assert again.keys() == files.keys()
    changed = {path.name for path in files if files[path] != again[path]}
    assert changed == {"00001.parquet", "00001.report.json"}
    assert {path: pq.read_table(path) for path in expected} == expected
    assert not list(run_copy.rglob("*.partial"))


def test_sizes_hashes_and_digests_are_those_of_the_images(run_copy: Path) -> None:
    score(run_copy, "width", "height", "aspect", "image_sha256", "image_hash")
    assert set(values_of(run_copy, "width")) == {40}
    assert set(values_of(run_copy, "height")) == {30}
    assert values_of(run_copy, "aspect") == pytest.approx([40 / 30] * 42)
    keys = values_of(run_copy, "key")
    shards = values_of(run_copy, "shard")
    digests = [hashlib.sha256(picture(100 * int(s) + int(k))).hexdigest() for s, k in zip(shards, keys, strict=True)]
    assert values_of(run_copy, "image_sha256") == digests


def test_sieve_is_the_cosine_with_the_closest_synthetic_caption(run_copy: Path, embedded_copy: Path) -> None:
    """With kept embeddings, and with the filter where there are none."""
    for run in (run_copy, embedded_copy):
        score(run, "sieve")
    model = openblip.load(read_manifest(run_copy)["models"]["filter"]["checkpoint"])
    for shard in finished_shards(run_copy):
        rows = read_texts(run_copy, shard).to_pylist()
        of_embeddings = read_texts(embedded_copy, shard)["sieve"].to_pylist()
        for row, kept in zip(rows, of_embeddings, strict=True):
            others = [r["caption"] for r in rows if r["key"] == row["key"] and r["source"] == "synthetic"]
            if row["source"] == "synthetic":
                assert row["sieve"] is None
                continue
            best = max(float(a @ b) for a in model.embed_texts([row["caption"]]) for b in model.embed_texts(others))
            assert row["sieve"] == pytest.approx(best, abs=1e-5)
            assert kept == pytest.approx(best, abs=2e-3)


def read_manifest(run: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return manifest


def test_logprobs_are_the_captioners(run_copy: Path, web: Path, captioner: str) -> None:
    score(run_copy, "text_logprob", "token_logprob")
    model = openblip.load(captioner, dtype="float32")
    samples = [sample for sample, _ in read_source(open_source(str(web)), id, shards=["00002"])]
    rows = read_texts(run_copy, "00002").to_pylist()
    lists = [[row["caption"] for row in rows if row["key"] == sample.key] for sample in samples]
    scores = [s for of_image in model.score_captions([sample.image for sample in samples], lists) for s in of_image]
    assert [row["text_logprob"] for row in rows] == pytest.approx([s.logprob for s in scores], abs=1e-3)
    assert [row["token_logprob"] for row in rows] == pytest.approx([s.logprob / s.num_tokens for s in scores], abs=1e-3)


def test_a_repeated_text_of_an_image_is_scored_once(
    tmp_path: Path, config: CapFiltConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = sample_members("a", 1, ["a cat", "red dog", "a cat", "a cat"]) + sample_members("b", 2, ["a cat"])
    write_tar(tmp_path / "0.tar", members)
    run_capfilt(replace(config, source=str(tmp_path / "0.tar")), tmp_path / "run")
    scored: list[list[str]] = []
    score_captions = BlipPredictor.score_captions

    def spy(self: Any, images: Any, texts: Any, *arguments: Any) -> Any:
        scored.extend(texts)
        return score_captions(self, images, texts, *arguments)

    monkeypatch.setattr(BlipPredictor, "score_captions", spy)
    score(tmp_path / "run", "text_logprob")
    assert [texts.count("a cat") for texts in scored] == [1, 1]
    rows = [row for row in read_texts(tmp_path / "run", "0").to_pylist() if row["caption"] == "a cat"]
    of_first = {row["text_logprob"] for row in rows if row["key"] == "a"}
    assert len(of_first) == 1
    assert of_first != {row["text_logprob"] for row in rows if row["key"] == "b"}


def test_lemon_is_the_weighted_agreement_of_the_nearest_pairs(embedded_copy: Path) -> None:
    score(embedded_copy, "lemon", "lemon_image", "lemon_text", num_neighbours=3)
    rows = [row for shard in finished_shards(embedded_copy) for row in read_texts(embedded_copy, shard).to_pylist()]
    texts = np.concatenate([read_embeddings(embedded_copy, s).texts for s in finished_shards(embedded_copy)])
    images = np.concatenate([read_embeddings(embedded_copy, s).images for s in finished_shards(embedded_copy)])
    texts, images = texts.astype(np.float64), images.astype(np.float64)
    names = sorted({(row["shard"], row["key"]) for row in rows})
    owner = np.array([names.index((row["shard"], row["key"])) for row in rows])
    fits = np.exp(-5.0 * (1.0 - np.array([row["itc"] for row in rows])))
    for number, row in enumerate(rows[:8]):
        mine, x, y = owner[number], images[owner[number]], texts[number]
        near = sorted((i for i in range(len(names)) if i != mine), key=lambda i: -images[i] @ x)[:3]
        parts = [
            (fits[j] * math.exp(-0.1 * (1 - images[i] @ x)), texts[j] @ y)
            for i in near
            for j in np.flatnonzero(owner == i)
        ]
        assert row["lemon_image"] == pytest.approx(sum(w * c for w, c in parts) / sum(w for w, _ in parts), abs=1e-3)
        near = sorted((j for j in range(len(rows)) if owner[j] != mine), key=lambda j: -texts[j] @ y)[:3]
        parts = [(fits[j] * math.exp(-0.1 * (1 - texts[j] @ y)), images[owner[j]] @ x) for j in near]
        assert row["lemon_text"] == pytest.approx(sum(w * c for w, c in parts) / sum(w for w, _ in parts), abs=1e-3)
        assert row["lemon"] == pytest.approx(row["itc"] + row["lemon_image"] + row["lemon_text"], abs=1e-5)


def test_neighbours_need_the_embeddings(run_copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs the filter's embeddings.*--keep-embeddings"):
        score(run_copy, "lemon")


@pytest.fixture
def repetitive_run(tmp_path: Path, captioner: str, filter_model: str) -> Path:
    """Two shards with equal and nearly equal images and texts, over `tmp_path / "twice"`."""
    run = tmp_path / "run"
    write_shard(tmp_path, "00000", [(1, "JPEG", ["a red dog"]), (2, "JPEG", ["a Red  dog", "two cats"])])
    write_shard(tmp_path, "00001", [(1, "JPEG", ["two cats on the grass"]), (2, "PNG", ["blue bird"])])
    resume_repetitive(tmp_path, captioner, filter_model)
    return run


def encoded_drawing(seed: int, format: str) -> bytes:
    encoded = io.BytesIO()
    drawing(seed).save(encoded, format)
    return encoded.getvalue()


def write_shard(folder: Path, name: str, samples: list[tuple[int, str, list[str]]]) -> None:
    members = []
    for number, (seed, format, texts) in enumerate(samples):
        described = sample_members(f"{number:04d}", seed, texts)[1]
        suffix = {"JPEG": "jpg", "PNG": "png"}[format]
        members += [(f"{number:04d}.{suffix}", encoded_drawing(seed, format)), described]
    write_tar(folder / "twice" / f"{name}.tar", members)


def resume_repetitive(folder: Path, captioner: str, filter_model: str) -> None:
    models = {"captioner": captioner, "filter": filter_model, "dtype": "float32"}
    run_capfilt(CapFiltConfig(source=str(folder / "twice"), **models), folder / "run")


def of_web(run: Path, column: str) -> list[Any]:
    """A column of the web texts."""
    sources = values_of(run, "source")
    return [v for v, source in zip(values_of(run, column), sources, strict=True) if source == "web"]


def test_groups_reach_across_shards_and_follow_a_run_that_grows(
    repetitive_run: Path, tmp_path: Path, captioner: str, filter_model: str
) -> None:
    names = ("exact_image_group", "image_group", "image_repeat", "exact_text_group", "text_group", "text_repeat")
    summary = score(repetitive_run, *names)
    assert not summary.failed
    assert of_web(repetitive_run, "exact_image_group") == [0, 1, 1, 0, 3]
    assert of_web(repetitive_run, "image_group") == [0, 1, 1, 0, 1]
    assert of_web(repetitive_run, "image_repeat") == [0, 0, 0, 1, 1]
    first, second, third, fourth, _ = of_web(repetitive_run, "exact_text_group")
    assert first == second != third != fourth
    assert of_web(repetitive_run, "text_group")[:2] == [first, second]
    assert of_web(repetitive_run, "text_repeat")[:2] == [0, 1]
    write_shard(tmp_path, "00002", [(2, "JPEG", ["a red dog"])])
    resume_repetitive(tmp_path, captioner, filter_model)
    with pytest.raises(SourceError, match="no column image_group"):
        read_texts(repetitive_run, "00002", ["image_group"])
    assert score(repetitive_run, *names).done["image_group"] == 3
    assert of_web(repetitive_run, "exact_image_group") == [0, 1, 1, 0, 3, 1]
    assert of_web(repetitive_run, "image_repeat") == [0, 0, 0, 1, 1, 2]


def test_what_an_evaluation_set_has_is_flagged(repetitive_run: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "evaluation.tar"
    write_tar(
        evaluation, [("x.png", encoded_drawing(2, "PNG")), ("x.json", b'{"caption": "x", "references": ["Two cats"]}')]
    )
    score_run(repetitive_run, ScoreConfig(against=str(evaluation)))
    assert of_web(repetitive_run, "leaked_image") == [False, True, True, False, True]
    assert of_web(repetitive_run, "leaked_text") == [False, False, True, False, False]
    with pytest.raises(ConfigError, match=r"leaked_image was computed with other settings: against was .*--overwrite"):
        score_run(repetitive_run, ScoreConfig(against=str(tmp_path / "twice")))
    score_run(repetitive_run, ScoreConfig(against=str(tmp_path / "twice"), overwrite=True))
    assert of_web(repetitive_run, "leaked_image") == [True] * 5


FUNCTIONS = """
def length(rows):
    return [len(row["caption"]) for row in rows]

def area(rows, images):
    assert len(rows) == len(images)
    return [image.width * image.height if row["source"] == "web" else None for row, image in zip(rows, images)]

def short(rows):
    return [1]

def broken(rows):
    raise RuntimeError("no idea")

def mixed(rows):
    return ["a" if row["index"] else 1 for row in rows]

def three(rows, images, more):
    return []
"""


def test_a_users_function_is_a_score(run_copy: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    assert score(run_copy, f"{file}:length", f"{file}:area").done == {"length": 3, "area": 3}
    assert values_of(run_copy, "length") == [len(caption) for caption in values_of(run_copy, "caption")]
    assert set(of_web(run_copy, "area")) == {1200.0}
    assert set(values_of(run_copy, "area")) == {1200.0, None}
    score(run_copy, f"{file}:length", column="size")
    assert values_of(run_copy, "size") == values_of(run_copy, "length")
    file.write_text(FUNCTIONS.replace("1]", "2]"))
    with pytest.raises(ConfigError, match=r"scores/length was computed with other settings: sha256 was"):
        score(run_copy, f"{file}:length")
    score(run_copy, f"{file}:length", overwrite=True)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", r"returned 1 values for \d+ rows"),
        ("broken", "failed: RuntimeError: no idea"),
        ("mixed", "returned int, str; its values are all"),
        ("three", "has 3 parameters"),
        ("nothing", "has no function nothing"),
    ],
)
def test_a_function_that_is_no_score_is_refused(run_copy: Path, tmp_path: Path, function: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    with pytest.raises(ConfigError, match=message):
        score(run_copy, f"{tmp_path / 'mine.py'}:{function}")
    assert not list(run_copy.glob(f"scores/{function}/*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scores": ("clips",)}, "no score is called clips; there are num_words, .*FILE.py:FUNCTION"),
        ({}, "no score was named; there are num_words"),
        ({"scores": ("clip",)}, "needs --clip"),
        ({"scores": ("leaked_text",)}, "needs --against"),
        ({"scores": ("width", "height"), "column": "x"}, "column names one score"),
        ({"scores": ("width",), "batch_size": 0}, "batch_size is 0"),
        ({"scores": ("image_group",), "image_distance": 40}, "image_distance is 40"),
        ({"scores": ("text_group",), "text_similarity": 0.0}, "text_similarity is 0.0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScoreConfig(**settings)


@pytest.mark.parametrize("column", ["itm", "../x", "width", ""])
def test_a_column_needs_a_name_of_its_own(run_copy: Path, column: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a column"):
        score(run_copy, "num_words", column=column)


def test_an_image_that_is_gone_has_no_score_and_a_shard_without_images_is_not_done(
    repetitive_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    states = {path: path.stat() for path in (tmp_path / "twice").iterdir()}
    for shard in ("00000", "00001"):  # the files look as they were
        path = tmp_path / "twice" / f"{shard}.tar"
        data = path.read_bytes()
        start = data.index(b"\xff\xd8")
        damaged = data[:start] + b"\0" * 200 + data[start + 200 :]
        if shard == "00001":
            start = data.index(b"\x89PNG")
            damaged = damaged[:start] + b"\0" * 20 + damaged[start + 20 :]
        path.write_bytes(damaged)
        os.utime(path, ns=(states[path].st_atime_ns, states[path].st_mtime_ns))
    summary = score(repetitive_run, "width", "image_hash", "image_group", "num_words")
    assert summary.done == {"image_hash": 1, "width": 1, "image_group": 0, "num_words": 2}
    assert [(name, shard) for name, shard, _ in summary.failed] == [
        ("image_hash", "00001"), ("width", "00001"), ("image_group", "all shards")
    ]  # fmt: skip
    assert "none of its images can be read" in summary.failed[0][2]
    assert [r.key for r in summary.rejects] == ["0000"]
    assert read_texts(repetitive_run, "00000", ["width"])["width"].to_pylist() == [None] * 2 + [200] * 3
    assert main(["capfilt-score", str(repetitive_run), "--scores", "width"]) == 1
    assert "failed: width: 00001: 00001: none of its images" in capfd.readouterr().err


def test_cosines_of_a_clip(run_copy: Path, tmp_path: Path, web: Path) -> None:
    save_model("clip", tmp_path / "model")
    score_run(run_copy, ScoreConfig(clip=str(tmp_path / "model"), batch_size=4, num_workers=2), dtype="float32")
    scorer = openblip.predictor.load_scorer(tmp_path / "model", dtype="float32")
    samples = [sample for sample, _ in read_source(open_source(str(web)), id, shards=["00000"])]
    rows = read_texts(run_copy, "00000").to_pylist()
    lists = [[row["caption"] for row in rows if row["key"] == sample.key] for sample in samples]
    expected = [v for of_image in scorer.score([sample.image for sample in samples], lists) for v in of_image]
    assert [row["clip"] for row in rows] == pytest.approx(expected, abs=1e-5)


def test_the_command_prints_what_it_did_and_refuses_in_one_line(
    run_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["capfilt-score", str(run_copy), "--scores", "num_words", "sieve"]) == 0
    assert "sieve: 3 of 3 shards; 18 texts have none" in capfd.readouterr().out
    assert main(["capfilt-score", str(run_copy), "--scores", "lemon"]) == 2
    assert "--keep-embeddings" in capfd.readouterr().err
    assert main(["capfilt-score", str(run_copy), "--scores", "num_words", "--image-distance", "3"]) == 2
    assert "--image-distance has no effect" in capfd.readouterr().err
    assert main(["capfilt-score", str(run_copy.parent), "--scores", "num_words"]) == 2
    assert "no manifest.json" in capfd.readouterr().err
    assert main(["capfilt-score", "--help"]) == 0
    out = capfd.readouterr().out
    assert all(name in out for name in SCORES)


@slow
def test_a_command_that_is_killed_goes_on(embedded_copy: Path, tmp_path: Path) -> None:
    """SIGKILL while a function is at work on the second shard; the columns are those of an uninterrupted command."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import os, pathlib, signal\n"
        "def length(rows, images):\n"
        f"    mark = pathlib.Path({str(tmp_path / 'killed')!r})\n"
        "    if rows[0]['shard'] == '00001' and not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [len(row['caption']) for row in rows]\n"
    )
    command = [sys.executable, "-m", "openblip", "capfilt-score", str(embedded_copy), "--scores", f"{file}:length"]
    assert subprocess.run([*command, "text_group"], capture_output=True, check=False).returncode == -9
    assert finished_names(embedded_copy) == {"length": ["00000"], "text_minhash": ["00000"]}
    assert subprocess.run([*command, "text_group"], capture_output=True, check=False).returncode == 0
    assert values_of(embedded_copy, "length") == [len(caption) for caption in values_of(embedded_copy, "caption")]
    assert not list(embedded_copy.rglob("*.partial"))


def finished_names(run: Path) -> dict[str, list[str]]:
    """The shards that are finished, by score."""
    names: dict[str, list[str]] = {}
    for path in sorted(run.glob("scores/*/*.report.json")):
        names.setdefault(path.parent.name, []).append(path.name.removesuffix(".report.json"))
    return names
