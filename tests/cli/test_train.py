"""`openblip train`: recipes by name, changed by options."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

import openblip
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


def test_a_recipe_trains_and_its_model_loads(run: Any, tmp_path: Path) -> None:
    write_emoji_scenes(tmp_path / "web", split="web", num_samples=8, seed=1, num_workers=1, progress=False)
    out = tmp_path / "run"
    words = ["train", "blip-mini", "--data.source", tmp_path / "web", "--out", out, *TINY]
    run(*words)
    config = json.loads((out / "config.json").read_text())
    assert config["training"]["steps"] == 2
    assert config["model"]["vision"]["num_layers"] == 1
    steps = [line["step"] for line in read_lines(out / "metrics.jsonl")]
    assert steps == [1, 2]
    assert {"caption", "match", "similarity"} <= openblip.load(out / "model").tasks
    run(*words, code=2)  # never written over
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
    _, *options = re.split(r"\n(?=--?[a-z])", "\n".join(lines))
    assert options
    for option in options:
        names, *description = re.split(r"\s{2,}|\n", option)
        assert re.search(r"[a-z]{2}", re.sub(r"\(.*?\)", "", " ".join(description))), names
