"""Work on a Ray cluster: how large workers are, which options fit each other; workers and nodes that die."""

import os
import socket
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openblip.cluster import (
    BATCHES_IN_STORE,
    Died,
    EngineOptions,
    Job,
    LoadedJob,
    WorkerPool,
    connected,
    start_ray,
    worker_size,
)
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


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_that_is_not_there_is_named(address: str) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = address.format(free.getsockname()[1])
    with (
        pytest.raises(ConfigError, match=f"there is no Ray cluster at --address {place}"),
        connected(EngineOptions(engine="ray", address=place)),
    ):
        pass


class Counting(Job[str, "np.ndarray", int]):
    """Counts the batches of a unit; the name of a unit says what goes wrong with it."""

    def __init__(self, folder: Path, refuses: bool = False) -> None:
        self.folder, self.refuses = folder, refuses

    def load(self) -> "Loaded":
        return Loaded(self.folder, self.refuses)


class Loaded(LoadedJob[str, "np.ndarray", int]):
    def __init__(self, folder: Path, refuses: bool) -> None:
        self.folder, self.refuses = folder, refuses

    def facts(self) -> int:
        return os.getpid()

    def check(self) -> None:
        if self.refuses:
            raise ConfigError("its model is another one")

    def decoding(self, num_workers: int) -> Callable[[str], Generator[np.ndarray]]:
        folder = self.folder

        def decode(unit: str) -> Generator[np.ndarray]:
            for mark in folder.glob(f"{unit}-*.decoded"):  # of an attempt whose worker was lost
                mark.unlink()
            for number in range(8):
                if unit == "unreadable":
                    raise ConfigError("it cannot be read")
                (folder / f"{unit}-{number}.decoded").touch()
                yield np.full(5_000_000, number, np.uint8)

        return decode

    def work(self, unit: str, batches: Generator[np.ndarray], on_images: Callable[[int], None]) -> int:
        if unit == "poison" or (unit == "dies once" and not (self.folder / "died").exists()):
            (self.folder / "died").touch()
            os._exit(1)
        count = 0
        for batch in batches:
            assert (batch == count).all()
            count += 1
            on_images(1)
            if unit == "slow":
                time.sleep(0.3)
                ahead = len(list(self.folder.glob("slow-*"))) - count
                assert ahead <= BATCHES_IN_STORE + 2, ahead  # one is being made, and one on its way
            if unit == "left early":
                break
        return count


@pytest.fixture(scope="module")
def ray_options() -> Iterator[EngineOptions]:
    """Of a cluster on this machine, whose memory holds fewer batches than are made."""
    ray = pytest.importorskip("ray")
    # workers of Ray do not find the files of tests
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    ray.init(address="local", num_cpus=4, object_store_memory=80 * 2**20, **quiet)
    yield EngineOptions(engine="ray", cpus_per_worker=1)
    ray.shutdown()


@pytest.mark.slow
def test_every_unit_is_done_and_one_that_kills_is_given_up(
    ray_options: EngineOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = ["slow", "a", "dies once", "left early", "b", "poison", "c", "d"]
    images = 0

    def count(number: int) -> None:
        nonlocal images
        images += number

    with connected(ray_options), WorkerPool[str, np.ndarray, int](ray_options, num_workers=1, device=None) as pool:
        assert pool.first_facts(Counting(tmp_path)) != os.getpid()
        results = dict(pool.run(Counting(tmp_path), units, on_images=count, ahead=4))
    poisoned = results.pop(units.index("poison"))
    assert isinstance(poisoned, Died)
    assert "3 workers died" in poisoned.reason
    expected = {number: 1 if unit == "left early" else 8 for number, unit in enumerate(units) if unit != "poison"}
    assert results == expected
    assert images == sum(expected.values())  # what is done again is counted once
    # "poison" takes three workers and "dies once" one, which may have had both.
    assert capsys.readouterr().err.count("a worker died") in (3, 4)


@pytest.mark.slow
def test_what_is_raised_by_decoder_and_check_arrives(ray_options: EngineOptions, tmp_path: Path) -> None:
    def run(job: Counting, units: list[str]) -> None:
        with connected(ray_options), WorkerPool[str, np.ndarray, int](ray_options, num_workers=1, device=None) as pool:
            list(pool.run(job, units, on_images=lambda count: None))

    with pytest.raises(ConfigError, match="it cannot be read"):
        run(Counting(tmp_path), ["unreadable"])
    with pytest.raises(ConfigError, match=r"no worker of the cluster can do this: .*its model is another one"):
        run(Counting(tmp_path, refuses=True), ["a", "b"])


def test_a_cluster_that_is_slow_to_start_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    messages = ["The current node timed out during startup. This could happen", "no memory"]
    tried = []

    def start(**settings: Any) -> None:
        tried.append(settings["address"])
        raise Exception(messages[len(tried) - 1])

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(ConfigError, match="could not be started on this machine: no memory"):
        start_ray()
    assert tried == ["local", "local"]
