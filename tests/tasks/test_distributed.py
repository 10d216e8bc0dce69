"""Two processes under torchrun train as one process on the joint batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from tiny_tasks import joined
from two_processes import part

from openblip.distributed import Process
from two_processes_of import assert_as_one, launch

pytestmark = pytest.mark.slow  # starts two processes
SCRIPT = Path(two_processes.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes wrote."""
    out = tmp_path_factory.mktemp("two_processes")
    finished = launch(SCRIPT, str(out))
    assert finished.returncode == 0, finished.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", [*two_processes.RUNS, *two_processes.BLIP2_RUNS])
def test_two_processes_train_as_one_on_the_joint_batch(results: Path, name: str) -> None:
    task, steps = two_processes.make(name), range(two_processes.STEPS)
    batches = [joined(*(two_processes.part_of(name, step, rank) for rank in range(2))) for step in steps]
    alone = two_processes.follow(name, task, task, batches)
    ranks: list[list[dict[str, Any]]] = [torch.load(results / f"{name}-{rank}.pt") for rank in range(2)]
    for step, expected in enumerate(alone):
        assert_as_one(step, expected, [rank[step] for rank in ranks])
        for rank in ranks:
            torch.testing.assert_close(rank[step]["queue"], expected["queue"], atol=1e-5, rtol=1e-5)


def test_the_trainer_does_in_two_processes_what_it_does_in_one(results: Path, tmp_path: Path) -> None:
    """Accumulation, clipping, logged means, rejects of either process, and one joint cursor."""
    one = Process(0, 1, torch.device("cpu"))
    two_processes.train(tmp_path, one, lambda step: joined(part(step, 0), part(step, 1)), rejecting=True)
    runs = []
    for folder in (tmp_path, results / "run"):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line) for line in lines])
    assert len(runs[0]) == len(runs[1]) == 3
    for alone, together in zip(*runs, strict=True):
        assert together["rejects"] == alone["rejects"]
        for name in ("itc", "itm", "lm", "loss", "gradient_norm"):
            assert together[name] == pytest.approx(alone[name], rel=1e-3), (alone["step"], name)
    assert (results / "run" / "rejects.jsonl").read_text() == (tmp_path / "rejects.jsonl").read_text()
    state = results / "run" / "checkpoints" / "step_00000003"
    assert json.loads((state / "cursor.json").read_text())["cursor"] == {"next": 6, "positions": {}}
