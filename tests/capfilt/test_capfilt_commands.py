"""`openblip capfilt`, `capfilt-select` and `capfilt-export` as users call them."""

from pathlib import Path

import pytest
from capfilt_world import all_rows

from openblip.cli.main import main
from openblip.data.sources import open_source
from source_items import items_of


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
