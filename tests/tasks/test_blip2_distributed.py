"""Two processes under torchrun have the losses and gradients of BLIP-2 that one has on the joint batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import two_blip2_processes
from tiny_tasks import joined
from two_processes import STEPS

SCRIPT = Path(two_blip2_processes.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes wrote."""
    out = tmp_path_factory.mktemp("two_processes")
    paths = [str(SCRIPT.parent), str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, str(SCRIPT), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", two_blip2_processes.RUNS)
def test_two_processes_are_as_one_on_the_joint_batch(results: Path, name: str) -> None:
    task = two_blip2_processes.make(name)
    batches = [
        joined(*(two_blip2_processes.part_of(name, step, rank) for rank in range(2))) for step in range(STEPS)
    ]
    alone = two_blip2_processes.measure(task, task, batches)
    ranks: list[list[dict[str, Any]]] = [torch.load(results / f"{name}-{rank}.pt") for rank in range(2)]
    for step, expected in enumerate(alone):
        first, second = (rank[step] for rank in ranks)
        for loss_name, loss in expected["losses"].items():
            mean = (first["losses"][loss_name] + second["losses"][loss_name]) / 2
            torch.testing.assert_close(mean, loss, atol=1e-5, rtol=1e-5, msg=f"step {step} {loss_name}")
        for found in (first, second):
            assert found["gradients"].keys() == expected["gradients"].keys()
            for parameter, gradient in expected["gradients"].items():
                torch.testing.assert_close(
                    found["gradients"][parameter],
                    gradient,
                    atol=1e-5,
                    rtol=1e-3,
                    msg=f"step {step} {parameter}",
                )
