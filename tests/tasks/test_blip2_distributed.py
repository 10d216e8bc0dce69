"""Two processes under torchrun have the losses and gradients of BLIP-2 that one has on the joint batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import two_blip2_processes
from tiny_tasks import joined
from two_processes import STEPS

from two_processes_of import assert_as_one, launch

pytestmark = pytest.mark.slow

pytestmark = pytest.mark.slow  # starts two processes
SCRIPT = Path(two_blip2_processes.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes wrote."""
    out = tmp_path_factory.mktemp("two_processes")
    finished = launch(SCRIPT, str(out))
    assert finished.returncode == 0, finished.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", two_blip2_processes.RUNS)
def test_two_processes_are_as_one_on_the_joint_batch(results: Path, name: str) -> None:
    task = two_blip2_processes.make(name)
    batches = [joined(*(two_blip2_processes.part_of(name, step, rank) for rank in range(2))) for step in range(STEPS)]
    alone = two_blip2_processes.measure(task, task, batches)
    ranks: list[list[dict[str, Any]]] = [torch.load(results / f"{name}-{rank}.pt") for rank in range(2)]
    for step, expected in enumerate(alone):
        assert_as_one(step, expected, [rank[step] for rank in ranks])
