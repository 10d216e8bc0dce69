"""`openblip estimate`: its numbers are those of the formula, and what it cannot estimate it says."""

import json
from pathlib import Path

import pytest

from openblip.cli.main import main


def test_more_pairs_take_longer_and_cost_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["estimate", "--pairs", "150M", "1.5b", "--machines", "4", "--price", "20", "--simulate", "--as-json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    small, large = found["capfilt"]
    assert (small["pairs"], large["pairs"]) == ("150M", "1.5b")
    assert large["cost"] == pytest.approx(80 * large["hours"])
    assert large["machine_hours"] == pytest.approx(4 * large["hours"])
    assert large["simulated_hours"] == pytest.approx(large["hours"], rel=0.05)
    assert 9.5 < large["hours"] / small["hours"] < 10  # the start is the same
    assert found["machine"]["name"] == "8 H100"
    assert len(found["trainings"]) == 9


def test_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["estimate", "--pairs", "5B", "--days", "2", "--model", "large"]) == 0
    text = capsys.readouterr().out
    assert "one H200 (an H100 with faster memory) measured on" in text  # of the machine
    assert "BLIP-2 stage 2 FlanT5-XXL" in text
    assert "cost" not in text
    assert main(["estimate", "--pairs", "5B", "--no-trainings", "--price", "1"]) == 0
    text = capsys.readouterr().out
    assert "cost" in text
    assert "BLIP-2" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "many"], "--pairs many is no number of pairs"),
        (["--pairs", "0"], "--pairs 0 is no number of pairs"),
        (
            ["--pairs", "5B", "--days", "1", "--storage-gigabytes", "0.1"],
            "in 1 days, however many machines work: they share 0.1 GB/s of storage",
        ),
        (["--pairs", "1M", "--days", "0.001"], "and each has a shard to do"),
        (["--machine", "abacus"], "There is no machine abacus"),
        (["--machines", "0"], "must be above 0"),
        (["--save", "here.json"], "--save has no effect here"),
        (["--machines", "2", "--days", "3"], "--days has no effect here"),
        (["--num-captions", "0"], "num_captions is 0; it must be at least 1"),
        (["--megapixels", "0"], "megapixels is 0.0; it must be above 0"),
        (["--model", "nowhere"], "--model nowhere: say base, large, or a folder"),
    ],
)
def test_what_cannot_be_estimated(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_one_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    import openblip

    folder = Path(openblip.__file__).parent / "pretrained" / "openblip-mini"
    hours = {}
    for model in (str(folder), "base"):
        assert (
            main(["estimate", "--pairs", "1B", "--machines", "1", "--no-trainings", "--model", model, "--as-json"]) == 0
        )
        hours[model] = json.loads(capsys.readouterr().out)["capfilt"][0]["hours"]
    assert hours[str(folder)] < hours["base"] / 2


def test_a_machine_without_accelerators_is_simulated_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--pairs", "1M", "--machine", "epyc2", "--simulate", "--no-trainings", "--as-json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["capfilt"]
    assert found["simulated_hours"] == pytest.approx(found["hours"], rel=0.1)
