"""Work on a Ray cluster: how large workers are, which options fit each other; workers and nodes that die."""

import pytest

from openblip.cluster import EngineOptions, worker_size
from openblip.errors import ConfigError

GPU_NODE = {"CPU": 16.0, "GPU": 8.0, "memory": 1e11}
CPU_NODE = {"CPU": 16.0, "memory": 1e11}


@pytest.mark.parametrize(
    ("nodes", "options", "num_workers", "expected"),
    [
        ([GPU_NODE] * 2, {}, None, (1, 1, 1, 16)),  # GPUs of a worker, CPUs of models, CPUs of the decoder, workers
        ([GPU_NODE] * 2, {}, 3, (1, 1, 3, 8)),  # CPUs are what there is least of
        ([GPU_NODE, CPU_NODE], {}, 2, (1, 1, 2, 8)),  # decoders may be on nodes without a GPU
        ([{"CPU": 16.0, "GPU": 1.0}], {}, None, (1, 1, 15, 1)),
        ([{"CPU": 16.0, "GPU": 1.0}], {"gpus_per_worker": 0.25}, None, (0.25, 1, 3, 4)),
        ([GPU_NODE], {"gpus_per_worker": 4}, None, (4, 1, 7, 2)),
        ([CPU_NODE] * 3, {}, None, (0, 15, 1, 3)),
        ([CPU_NODE] * 3, {"cpus_per_worker": 3}, None, (0, 3, 1, 12)),
        ([GPU_NODE], {"gpus_per_worker": 0}, 4, (0, 12, 4, 1)),
        ([{"CPU": 1.0}], {}, None, (0, 1, 1, 0)),
        ([{"CPU": 0.0}, {"CPU": 2.0}], {}, None, (0, 1, 1, 1)),  # a head that does no work
    ],
)
def test_workers_fit_the_nodes(
    nodes: list[dict[str, float]], options: dict[str, float], num_workers: int | None, expected: tuple[float, ...]
) -> None:
    size = worker_size(nodes, EngineOptions(engine="ray", **options), num_workers, device=None)  # type: ignore[arg-type]
    assert (size.gpus, size.cpus, size.decoder_cpus, size.capacity) == expected


def test_on_a_cpu_no_gpu_is_reserved() -> None:
    assert worker_size([GPU_NODE], EngineOptions(engine="ray"), None, device="cpu").gpus == 0


@pytest.mark.parametrize("gpus", [-1, 1.5, 2.5])
def test_gpus_of_a_worker_are_whole_or_a_part_of_one(gpus: float) -> None:
    with pytest.raises(ConfigError, match="--gpus-per-worker"):
        EngineOptions(engine="ray", gpus_per_worker=gpus)
