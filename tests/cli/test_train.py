"""`openblip train`: recipes by name, changed by options."""

import json
import multiprocessing
import re
import resource
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import openblip
from openblip import distributed
from openblip.cli.evaluate import TaskName
from openblip.cli.main import COMMANDS
from openblip.emoji_scenes.writer import write_emoji_scenes
from openblip.recipes import RECIPES
from openblip.recipes.bootstrap import FAMILIES
from shared_files import read_lines

TINY = [
    "--model.vision.image-size=32", "--model.vision.hidden-dim=32", "--model.vision.num-layers=1",
    "--model.text.hidden-dim=32", "--model.text.num-layers=1", "--data.num-workers=0",
    "--training.steps=2", "--training.batch-size=4", "--training.num-threads=1", "--training.log-every=1",
]  # fmt: skip


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """A training on eight scenes, two steps long."""
    write_emoji_scenes(tmp_path / "web", split="web", num_samples=8, seed=1, num_workers=1, progress=False)
    return ["train", "blip-mini", "--data.source", tmp_path / "web", "--out", tmp_path / "run", *TINY]


def test_a_recipe_trains_and_its_model_loads(run: Any, tmp_path: Path, words: list[object]) -> None:
    out = tmp_path / "run"
    run("train", "blip-mini", "--data.source", tmp_path / "wbe", "--out", out, *TINY, code=2)  # leaves the folder free
    run(*words, "--training.precision", "fp32", "--resume")  # as an earlier version called dtype
    config = json.loads((out / "config.json").read_text())
    assert config["training"]["steps"] == 2
    assert config["training"]["dtype"] == "float32"
    assert config["model"]["vision"]["num_layers"] == 1
    steps = [line["step"] for line in read_lines(out / "metrics.jsonl")]
    assert steps == [1, 2]
    assert {"caption", "match", "similarity"} <= openblip.load(out / "model").tasks
    run(*words, code=2)  # never written over
    run(*words, "--training.dtype=float32", "--resume")


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_run_keeps_the_precision_that_it_was_begun_with(
    run: Any, tmp_path: Path, words: list[object], monkeypatch: pytest.MonkeyPatch, has_instructions: bool
) -> None:
    """It is float32 where the processor has no instructions for bfloat16, and does not change on another machine."""
    for more in ([], ["--resume"]):
        monkeypatch.setattr(distributed, "has_bfloat16", lambda device: has_instructions is (not more))  # noqa: B023
        run(*words, *more)
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["training"]["dtype"] == ("bfloat16" if has_instructions else "float32")


def test_a_run_whose_settings_say_auto_goes_on(run: Any, tmp_path: Path, words: list[object]) -> None:
    """As they do when someone has changed config.json by hand."""
    run(*words)
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["training"]["dtype"] = "auto"
    file.write_text(json.dumps(config))
    run("train", "--resume", tmp_path / "run", "--training.steps", "3")
    assert json.loads(file.read_text())["training"]["dtype"] in ("bfloat16", "float32")


def test_a_run_goes_on_with_the_settings_of_its_folder(run: Any, tmp_path: Path, words: list[object]) -> None:
    out = tmp_path / "run"
    run(*words)
    assert "would have no effect" in run("train", "--resume", out, "--training.weight-decay", "0", code=2).err
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "data": {**config["data"], "no_more": 1}}))
    changes = ["--training.steps", "4", "--training.learning-rate", "0.01", "--training.beta1", "0.5"]
    printed = run("train", "--resume", out, *changes).err
    assert "training.steps was 2, is now 4" in printed
    assert "data.no_more of an earlier version has no meaning any more" in printed
    assert "the cosine schedule goes on at a learning rate of" in printed
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert {line["setting"] for line in read_lines(out / "changes.jsonl")} == {
        "training.steps", "training.learning_rate", "training.beta1",
    }  # fmt: skip
    assert openblip.load(out / "model").tasks == openblip.load(out / "models" / "step_00000002").tasks
    state = torch.load(out / "checkpoints" / "step_00000004" / "optimizer.pt", weights_only=True)
    assert state["members"][0]["param_groups"][0]["betas"][0] == 0.5
    assert "is at step 4 already" in run("train", "--resume", out, "--training.steps", "3", code=2).err
    moved = out.rename(tmp_path / "moved")
    run("train", "blip-mini", "--resume", moved)
    assert "leave out --out" in run("train", "--resume", moved, "--out", out, code=2).err
    assert "nothing was trained" in run("train", "--resume", out, code=2).err


def test_a_loss_that_is_no_number_can_be_followed_as_the_message_advises(
    run: Any, tmp_path: Path, words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = "openblip.objectives.lm_loss"
    with monkeypatch.context() as broken:
        broken.setattr(task, lambda *_: torch.tensor(float("nan"), requires_grad=True))
        failed = run(*words, "--training.checkpoint-every=1", code=2).err
    advice = failed.partition("openblip train --resume")[2].split(", or")[0]
    run(*words, "--resume", code=0)
    assert advice.split()[1:] == ["--training.learning-rate", "0.0005"]


def test_a_full_disk_ends_a_training_and_its_workers(run: Any, tmp_path: Path, words: list[object]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        failed = run(*words, "--data.num-workers=2", "--training.steps=1", code=1).err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.splitlines()[-1].startswith(
        f"openblip: {tmp_path / 'run/checkpoints/step_00000001'} cannot be written"
    )
    assert multiprocessing.active_children() == []
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1]
    run(*words, "--resume")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "choose one of blip-mini"),
        (["blip-mnii"], 'no recipe "blip-mnii"'),
        (["blip-mini"], "--data.source"),
        (["filter", "--data.source", "x"], "--init"),
        (["blip-mini", "--training.stepz", "3"], "--training.stepz"),
        (["blip-mini", "--training.steps", "0"], "at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(refusal: Any, words: list[str], message: str) -> None:
    assert message in refusal("train", *words)


@pytest.mark.parametrize(("command", "recipes"), [("train", RECIPES), ("bootstrap", FAMILIES)])
def test_help_lists_the_recipes_with_what_they_do(run: Any, command: str, recipes: dict[str, object]) -> None:
    lines = run(command, "--help").out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert list(listed) == list(recipes)
    assert all(re.match(r"[`A-Z].*[a-z)]", summary) for summary in listed.values())


def test_help_keeps_lists_and_commands_apart(run: Any) -> None:
    assert "\n        -m openblip train RECIPE --data.source DATA\n\n" in run("train", "caption", "--help").out
    lines = run("evaluate", "--help").out.splitlines()
    tasks = [task for line in lines if line.startswith("- ") for task in line[2:].partition(":")[0].split(", ")]
    assert sorted(tasks) == sorted(get_args(TaskName))


@pytest.mark.parametrize(
    "words",
    [
        *[[*name.split()] for name in COMMANDS if name not in ("train", "bootstrap")],
        *[["train", name] for name in RECIPES],
        *[["bootstrap", name] for name in FAMILIES],
    ],
    ids=" ".join,
)
def test_help_describes_every_option(run: Any, words: list[str]) -> None:
    lines = [line.strip("│ ") for line in run(*words, "--help").out.splitlines() if line[:1] not in "╭╰"]
    text = re.sub(r",\n(?=--)", ", ", "\n".join(lines))  # an option of two long names stands on two lines
    _, *options = re.split(r"\n(?=--?[a-z])", text)
    assert options
    for option in options:
        names, *description = re.split(r"\s{2,}|\n", option)
        assert re.search(r"[a-z]{2}", re.sub(r"\(.*?\)", "", " ".join(description))), names
