"""Golden values: what small runs computed when tests/golden.json was written, within a tolerance.

Bits do not travel between processors, so the comparison to the last bit is `benchmarks/golden.py`, on one machine. A
deliberate change of the values is written with

    OPENBLIP_WRITE_GOLDEN=1 pytest tests/test_golden.py
"""

import json
import os
import sys
from pathlib import Path

import pytest

from openblip.cli.main import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from golden import CAPTIONER, FILTER, MINI, Recorder, differences  # noqa: E402 (a folder that is no package)

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 5e-3
"""Of losses and scores, relative to values above 1."""


def run_here(words: list[str]) -> None:
    assert main(words) == 0, words


@pytest.mark.slow
def test_small_runs_compute_what_they_computed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, tmp_path / "inputs", run_here)
    human, web = recorder.make_scenes("human", 40), recorder.make_scenes("web", 24)
    questions, documents = recorder.make_scenes("questions", 24), recorder.make_scenes("documents", 60)
    recorder.train("blip-mini", "--data.source", f"{web},{human}", steps=4)
    recorder.train("blip-mini-captioner", "--init", MINI, "--data.source", human, steps=4)
    recorder.train("blip-mini-filter", "--init", MINI, "--data.source", human, steps=4)
    recorder.train("blip-mini-vqa", "--init", MINI, "--data.source", questions, steps=4)
    language = recorder.train("blip2-mini-opt", "--data.source", documents, steps=4)
    stage1 = recorder.train("blip2-mini-stage1", "--data.source", human, steps=4)
    recorder.train(
        "blip2-mini-stage2-opt", "--init", stage1, "--language.source", language, "--data.source", human, steps=4
    )
    for name, command in {
        "caption": ("caption", human, "--model", CAPTIONER),
        "caption nucleus": ("caption", human, "--model", CAPTIONER, "--decoding", "nucleus", "--seed", 3),
        "match": ("match", web, "--model", FILTER),
    }.items():
        recorder.run(*command, "--out", tmp_path / f"{name}.jsonl")
        recorder.record_lines(name, tmp_path / f"{name}.jsonl")
    recorder.run("capfilt", web, "--captioner", CAPTIONER, "--filter", FILTER, "--out", tmp_path / "capfilt")
    recorder.record_rows("capfilt", tmp_path / "capfilt")
    # Hashes of weights are for one machine.
    values = {name: value for name, value in recorder.values.items() if not name.startswith("weights")}
    if os.environ.get("OPENBLIP_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert values.keys() == golden.keys()
    for name, value in golden.items():
        assert differences(value, json.loads(json.dumps(values[name])), name, TOLERANCE) == []
