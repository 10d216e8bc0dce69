"""The run folder of a training is a checkpoint: its final model. A run that has not finished says what there is."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_native import BLIP, KINDS, STAGE2

import openblip
from damaged_files import assert_same_weights
from openblip.checkpoints.backbones import save_language_model
from openblip.checkpoints.loading import load_checkpoint, load_image_encoder, save_checkpoint
from openblip.errors import CheckpointError
from tiny_blip2 import tiny_language_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"recipe": "caption", "task": {}}))
    return tmp_path / "run"


@pytest.mark.parametrize("kind", [BLIP, STAGE2])
def test_a_finished_run_is_its_final_model(run: Path, kind: str) -> None:
    final, best = KINDS[kind](), KINDS[kind]()
    best.model.vision.position_embedding.data.zero_()
    save_checkpoint(best, run / "best")
    save_checkpoint(final, run / "model")
    loaded = load_checkpoint(run)
    assert type(loaded) is type(final)
    assert_same_weights(loaded.model, final.model)
    assert openblip.load(run).tasks == openblip.load(run / "model").tasks
    encoder = load_image_encoder(run)
    assert_same_weights(encoder.model, load_image_encoder(run / "model").model)


@pytest.mark.parametrize("load", [load_checkpoint, openblip.load, load_image_encoder])
def test_an_unfinished_run_says_what_there_is(run: Path, load: Any) -> None:
    with pytest.raises(CheckpointError, match=r"run .*has not finished.*checkpoints/.*train --resume") as caught:
        load(run)
    assert "best" not in str(caught.value)
    save_checkpoint(KINDS[BLIP](), run / "best")
    with pytest.raises(CheckpointError, match=r"has not finished.*Name .*run/best, .*checkpoints/"):
        load(run)


def test_the_run_of_a_language_model_is_no_model_of_images(run: Path) -> None:
    save_language_model(run / "model", tiny_language_model("opt"))
    with pytest.raises(CheckpointError, match=r"run/model/config\.json .*model_type is opt. A language model"):
        load_checkpoint(run)
