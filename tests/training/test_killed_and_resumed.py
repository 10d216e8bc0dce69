"""A run killed at any moment and resumed gives the losses and weights of one that was not.

As a script, this file is a run that is killed:
python test_killed_and_resumed.py SOURCE OUT NUM_WORKERS DTYPE after-step|in-checkpoint STEP
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openblip.data.config import Augmentation, DataConfig
from openblip.emoji_scenes.writer import write_emoji_scenes
from openblip.errors import ConfigError
from openblip.models.config import BlipConfig
from openblip.nn.config import TextConfig, VisionConfig
from openblip.recipes.run import BlipRun
from openblip.tasks.config import ContrastiveConfig, PretrainingConfig
from openblip.training import run_folder, state
from openblip.training.config import TrainingConfig
from openblip.training.trainer import SPEED

STEPS, CHECKPOINT_EVERY = 9, 3


def tiny_run(source: str, out: str, num_workers: int, dtype: str) -> BlipRun:
    """All that is random or kept in a run: shuffling, augmentation, dropout, drop path, negatives, queue."""
    small: dict[str, Any] = {"hidden_dim": 16, "num_heads": 2, "mlp_dim": 32}
    vision = VisionConfig(image_size=32, patch_size=16, num_layers=2, drop_path=0.2, **small)
    text = TextConfig(num_layers=1, max_positions=40, dropout=0.1, **small)
    rates = {"learning_rate": 1e-2, "muon_learning_rate": 1e-2, "clip_norm": 1.0}
    settings: dict[str, Any] = {**rates, "dtype": dtype, "num_threads": 1}
    return BlipRun(
        recipe="tiny",
        model=BlipConfig(vision=vision, text=text, embed_dim=8),
        vocab_size=160,
        data=DataConfig(source=source, num_workers=num_workers, augmentation=Augmentation()),
        task=PretrainingConfig(contrastive=ContrastiveConfig(queue_size=10, alpha_ramp_steps=5)),
        training=TrainingConfig(
            steps=STEPS, batch_size=4, accumulation=2, **settings, log_every=1, checkpoint_every=CHECKPOINT_EVERY
        ),
        out=out,
    )


def die_after_step(step: int) -> None:
    """Once the metrics of a step are written."""
    log = run_folder.RunFolder.log

    def log_and_die(folder: run_folder.RunFolder, record: dict[str, Any]) -> None:
        log(folder, record)
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    run_folder.RunFolder.log = log_and_die  # type: ignore[method-assign]


def die_in_checkpoint(step: int) -> None:
    """With the weights of a checkpoint written and its optimizer not."""
    save = state.torch.save

    def save_and_die(content: Any, file: Any) -> None:
        save(content, file)
        file.flush()
        if Path(file.name).name == state.TASK and f"step_{step:08d}" in file.name:
            os.kill(os.getpid(), signal.SIGKILL)

    state.torch.save = save_and_die


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fifteen noisy pairs: several epochs are trained on."""
    out = tmp_path_factory.mktemp("scenes") / "web"
    write_emoji_scenes(out, split="web", num_samples=15, seed=1, samples_per_shard=5, num_workers=1, progress=False)
    return str(out)


def losses(out: Path) -> list[dict[str, Any]]:
    """The metrics of every step but its speed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "dtype", "moment", "step"),
    [
        (0, "float32", "in-checkpoint", 2 * CHECKPOINT_EVERY),
        (1, "bfloat16", "after-step", random.Random(3).choice([4, 5, 7, 8])),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, scenes: str, num_workers: int, dtype: str, moment: str, step: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [scenes, str(killed), str(num_workers), dtype, moment, str(step)]
    process = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    assert len(losses(killed)) == step
    assert not (killed / "model").exists()

    with pytest.raises(ConfigError, match="add --resume"):
        tiny_run(scenes, str(killed), num_workers, dtype).train()
    assert tiny_run(scenes, str(killed), num_workers, dtype).train(resume=True)
    assert tiny_run(scenes, str(whole), num_workers, dtype).train()
    assert losses(killed) == losses(whole)
    assert [line["step"] for line in losses(whole)] == list(range(1, STEPS + 1))
    expected = load_file(whole / "model" / "model.safetensors")
    for name, value in load_file(killed / "model" / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


if __name__ == "__main__":
    source, out, num_workers, dtype, moment, step = sys.argv[1:]
    {"after-step": die_after_step, "in-checkpoint": die_in_checkpoint}[moment](int(step))
    tiny_run(source, out, int(num_workers), dtype).train()
