"""The whole loop at the smallest size, through the command line: every stage, and going on after a kill."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from openblip.cli.main import main
from openblip.data.sources.opening import reading_of
from openblip.emoji_scenes.writer import write_emoji_scenes
from openblip.metrics import captioning
from openblip.recipes.bootstrap import FAMILIES, BootstrapConfig
from openblip.training.run_folder import RunFolder

TRAINING = {"steps": 2, "batch-size": 4, "dtype": "float32", "num-threads": 1}
FIELDS = {**{f"training.{name}": value for name, value in TRAINING.items()}, "data.num-workers": 0}
SMALL = [f"--recipe.{run}.{name}={FIELDS[name]}" for run in ("pretrain", "captioner", "filter") for name in FIELDS]
SHAPE = [f"{side}.{size}" for side in ("vision", "text") for size in ("hidden-dim=32", "num-layers=1")]


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR's program takes seconds to start."""
    monkeypatch.setattr(captioning, "java_runs", lambda: False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for name, split, count, seed in (("web", "web", 12, 5), ("human", "human", 80, 5), ("more", "human", 40, 6)):
        write_emoji_scenes(folder / name, split=split, num_samples=count, seed=seed, num_workers=1, progress=False)
    return folder


def words(world: Path, out: Path) -> list[str]:
    shape = [f"--recipe.pretrain.model.{field}" for field in (*SHAPE, "vision.image-size=32")]
    return [
        "bootstrap", "blip-mini", "--web", str(world / "web"), "--human", str(world / "human"),
        "--out", str(out), "--threshold", "0", "--no-check", *SMALL, *shape,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_loop_trains_cleans_and_compares(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(world, tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["test"].endswith("human[95%:]")
    assert [Path(model["model"]).parts[-3] for model in results["models"]] == ["round_0", "round_1"]
    assert results["models"][0]["captioning"]["num_images"] == 3  # about 5% of 80, held out
    assert results["capfilt"][0]["num_texts"] == 24  # a web and a synthetic text of each of 12 images
    of_cider = next(line for line in capsys.readouterr().out.splitlines() if "CIDEr" in line)
    assert f"{results['models'][0]['captioning']['cider']:.1f}" in of_cider  # as papers print it already
    config = json.loads((tmp_path / "round_1" / "pretrain" / "config.json").read_text())
    assert config["data"]["source"] == f"{world / 'human'}[:95%],capfilt:{tmp_path / 'round_1' / 'capfilt'}"
    # An evaluation of an earlier version, whose CIDEr had another scale, is made anew.
    evaluation = tmp_path / "round_0" / "evaluation.json"
    evaluation.write_text(json.dumps({name: v for name, v in results["models"][0].items() if name == "model"}))
    assert main(words(world, tmp_path)) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_human_pairs_are_cut_into_those_that_train_check_and_evaluate() -> None:
    config = BootstrapConfig(web="w", human="a@2,b@1", out="", recipe=FAMILIES["blip-mini"]())
    assert config.cut_human() == ("a[:90%]@2.0,b[:90%]@1.0", "a[90%:95%],b[90%:95%]", "a[95%:],b[95%:]")
    one = replace(config, human="a")
    assert replace(one, check="c").cut_human() == ("a[:95%]", "c", "a[95%:]")
    assert replace(one, test="t").cut_human() == ("a[:95%]", "a[95%:]", "t")
    assert replace(one, test="t", check="c").cut_human() == ("a", "c", "t")
    assert replace(one, no_check=True).cut_human() == ("a[:95%]", None, "a[95%:]")


@pytest.mark.slow
def test_a_filter_near_chance_stops_the_loop_before_capfilt(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = [word for word in words(world, tmp_path) if word != "--no-check"]
    assert main(checked) == 2
    assert "human[90%:95%] has" in capsys.readouterr().err
    assert not (tmp_path / "round_0").exists()
    assert main([*checked, "--check", str(world / "human") + "," + str(world / "more")]) == 2
    error = capsys.readouterr().err
    assert "the filter cannot be trusted: on 120 clean pairs" in error
    assert sorted(path.name for path in (tmp_path / "round_1").iterdir()) == ["capfilt", "filter"]  # no captioner


@pytest.mark.slow
def test_killed_in_a_stage_it_goes_on_and_ends_with_the_same_numbers(world: Path, tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-m", "openblip", *words(world, tmp_path / "killed")])
    finished_stage = tmp_path / "killed" / "round_1" / "captioner" / "config.json"
    for _ in range(1200):
        if finished_stage.exists() or killed.poll() is not None:
            break
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    assert main(words(world, tmp_path / "killed")) == 0
    assert main(words(world, tmp_path / "whole")) == 0

    def numbers(name: str) -> str:
        return (tmp_path / name / "results.json").read_text().replace(f"/{name}/", "/")

    assert numbers("killed") == numbers("whole")


def test_another_bootstrap_in_the_same_folder_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = words(world, tmp_path)
    for web in ("no-such-folder", "web@0.5"):  # CapFilt draws nothing
        other[other.index("--web") + 1] = str(world / web)
        assert main(other) == 2  # and leaves the folder free
    stage = RunFolder(tmp_path / "round_0" / "pretrain")
    stage.begin({})
    stage.log({"step": 1})
    RunFolder(tmp_path).begin({"recipe": {}, "out": "", "web": "other"})
    assert main(words(world, tmp_path)) == 2
    assert "web was" in capsys.readouterr().err


def test_columns_are_those_of_tables(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "human.csv").write_text("photo,title\na.jpg,a dog\n")
    human = ["--human", str(tmp_path / "human.csv"), "--image-column", "nope"]
    assert main(["bootstrap", "blip-mini", "--web", str(world / "web"), "--out", str(tmp_path / "out"), *human]) == 2
    assert "no image column (nope); found: photo, title" in capsys.readouterr().err
    config = BootstrapConfig(
        web="t.csv", human=str(world / "human"), out="", recipe=FAMILIES["blip-mini"](), image_column="photo"
    )
    assert reading_of(config.human, config) == {"images": None, "caption_column": None}
