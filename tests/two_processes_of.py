"""A script run by torchrun in two processes on this machine, and how their records compare."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def launch(script: Path, *arguments: str, with_gpus: bool = False) -> subprocess.CompletedProcess[str]:
    """Also for what the script imports from its own folder and from tests/. with_gpus: let the processes see GPUs."""
    paths = [str(script.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **({} if with_gpus else {"CUDA_VISIBLE_DEVICES": ""})},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def assert_as_one(step: int, alone: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> None:
    """The mean of both processes' losses is that of one process, and both have its gradients."""
    for name, loss in alone["losses"].items():
        mean = sum(rank["losses"][name] for rank in ranks) / len(ranks)
        torch.testing.assert_close(mean, loss, atol=1e-5, rtol=1e-5, msg=f"step {step} {name}")
    for rank in ranks:
        assert rank["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(
                rank["gradients"][name], gradient, atol=1e-5, rtol=1e-3, msg=f"step {step} {name}"
            )
