"""A run killed at any moment and resumed gives the losses and weights of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file

from openblip.emoji_scenes.writer import write_emoji_scenes
from openblip.errors import ConfigError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fifteen noisy pairs: several epochs are trained on."""
    out = tmp_path_factory.mktemp("scenes") / "web"
    write_emoji_scenes(out, split="web", num_samples=15, seed=1, samples_per_shard=5, num_workers=1, progress=False)
    return str(out)


def losses(out: Path) -> list[dict[str, Any]]:
    """The metrics of every step but its speed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "precision", "moment", "step"),
    [
        (0, "fp32", "in-checkpoint", 2 * tiny_run.CHECKPOINT_EVERY),
        (1, "bf16", "after-step", random.Random(3).choice([4, 5, 7, 8])),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, scenes: str, num_workers: int, precision: str, moment: str, step: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [scenes, str(killed), str(num_workers), precision, moment, str(step)]
    process = subprocess.run(
        [sys.executable, tiny_run.__file__, *arguments],
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
        tiny_run.tiny_run(scenes, str(killed), num_workers, precision).train()
    assert tiny_run.tiny_run(scenes, str(killed), num_workers, precision).train(resume=True)
    assert tiny_run.tiny_run(scenes, str(whole), num_workers, precision).train()
    assert losses(killed) == losses(whole)
    assert [line["step"] for line in losses(whole)] == list(range(1, tiny_run.STEPS + 1))
    expected = load_file(whole / "model" / "model.safetensors")
    for name, value in load_file(killed / "model" / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name
