"""`openblip models` and `openblip doctor` say what is true."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import openblip
from openblip.checkpoints.loading import PRETRAINED
from openblip.cli.doctor import EXTRAS, PACKAGES
from openblip.cli.main import main
from openblip.cli.models import GROUPS, SHIPPED
from openblip.errors import CheckpointError

Run = Callable[..., tuple[int, str, str]]


def test_every_shipped_model_is_listed_with_what_it_can_do() -> None:
    assert {model.name for model in SHIPPED} == {folder.name for folder in PRETRAINED.glob("*") if folder.is_dir()}
    for model in SHIPPED:
        predictor = openblip.load(model.name)
        assert set(model.can.split(", ")) <= predictor.tasks
        assert model.million_parameters == round(predictor.num_parameters / 1e6)


def test_models_as_tables_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert main(["models", "--as-json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(listed) == sum(len(models) for _, models in GROUPS)
    for model in listed:
        assert re.search(rf"{re.escape(model['name'])} .*{re.escape(model['license'])} .*", table)


def test_an_error_about_a_missing_model_points_to_the_list(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="openblip models"):
        openblip.load(tmp_path / "nothing")


def test_doctor_knows_every_extra_and_what_auto_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == project["optional-dependencies"].keys() - {"test", "dev", "docs"}
    canonical = [re.split(r"[<>=]", line)[0].lower() for line in project["dependencies"]]
    assert sorted(PACKAGES) == sorted(canonical)
    assert main(["doctor"]) == 0
    assert "extra        video" in capsys.readouterr().out
    assert main(["doctor", "--as-json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["openblip"] == openblip.__version__
    assert found["packages"]["torch"].startswith("2.")
    assert found["dtype_auto"].startswith(("float32", "bfloat16"))


def test_doctor_says_how_to_get_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXTRAS, "video", (("a_module_that_is_not_there",), "videos"))
    assert main(["doctor"]) == 0
    assert 'pip install "openblip[video]"' in capsys.readouterr().out


def test_every_package_of_an_extra_has_its_module() -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    modules = {"scikit-learn": "sklearn", "pillow": "PIL"}
    listed_elsewhere = {"torch", "openblip"}  # the core, other extras
    for extra, (known, _) in EXTRAS.items():
        lines = extras["optional-dependencies"][extra]
        names = {re.split(r"[\[<>=]", line)[0] for line in lines} - listed_elsewhere
        assert {modules.get(name, name).lower().replace("-", "_") for name in names} == {name.lower() for name in known}


def test_doctor_works_without_a_package_that_everything_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openblip.cli.doctor.PACKAGES", ("numpy", "a-package-that-is-not-there"))
    monkeypatch.setattr("openblip.cli.doctor._devices", None)  # it would need torch
    assert main(["doctor"]) == 1
    said = capsys.readouterr()
    assert "a-package-that-is-not-there MISSING" in said.out
    assert said.err == "missing packages: a-package-that-is-not-there; install OpenBLIP again\n"
