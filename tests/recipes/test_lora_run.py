"""Stage 2 with adapters in the frozen language model: they are what a run trains of it, and what it saves."""

from dataclasses import replace

import pytest
import torch
from small_training import write_scenes

from openblip.checkpoints.backbones import save_language_model
from openblip.checkpoints.checkpoint import Blip2Checkpoint, load_native, save_native
from openblip.data.config import DataConfig
from openblip.models.config import LoraSettings
from openblip.recipes.mini import blip2_mini_stage2_opt
from openblip.recipes.run import LanguageModelSource
from openblip.training.config import TrainingConfig
from tiny_blip2 import tiny_blip2, tiny_language_model


@pytest.mark.slow
def test_a_run_trains_and_saves_adapters(tmp_path):
    stage1: Blip2Checkpoint = tiny_blip2()
    save_native(tmp_path / "stage1", stage1)
    language = tiny_language_model("opt")
    save_language_model(tmp_path / "opt", language)
    write_scenes(tmp_path / "scenes", "captions", 6)
    source = LanguageModelSource(source=str(tmp_path / "opt"), lora=LoraSettings(rank=2, dropout=0.1))
    run = replace(
        blip2_mini_stage2_opt(),
        init=str(tmp_path / "stage1"),
        language=source,
        data=DataConfig(source=str(tmp_path / "scenes"), num_workers=0),
        training=TrainingConfig(steps=2, batch_size=2, precision="fp32"),
        out=str(tmp_path / "run"),
    )
    assert run.train()
    trained = load_native(tmp_path / "run" / "model").model.language.model
    adapters = {name: p for name, p in trained.named_parameters() if "lora_" in name}
    assert adapters
    assert all(p.abs().sum() > 0 for p in adapters.values())  # one of each pair began as zeros
    own = language.model.state_dict()
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for name, weight in trained.state_dict().items()
        if "lora_" not in name
    }
    assert base.keys() == own.keys()
    assert all(torch.equal(base[name], own[name]) for name in own)
