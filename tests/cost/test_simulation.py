"""The simulation, which knows nothing of the formula, against it."""

import statistics
from typing import Any

import pytest

from openblip.cost.formula import HOUR, shards_seconds
from openblip.cost.simulation import simulate_shards

PLAIN: dict[str, Any] = {
    "shard_seconds": 100.0,
    "shard_bytes": 1e9,
    "network_bytes": 1e9,
    "storage_bytes": 1e12,
    "start_seconds": 10.0,
    "hours_between_failures": 1e6,
}


def test_one_machine_works_shard_after_shard_and_reads_beside_it() -> None:
    found = simulate_shards(4.5, 1, **PLAIN, spread=0.0)
    assert found.hours * HOUR == pytest.approx(10 + 1 + 450)
    assert (found.num_failures, found.shards_lost) == (0, 0)


def test_many_machines_share_the_storage() -> None:
    """Fifty machines would read 50 GB in 100 seconds, and the storage sends 20."""
    found = simulate_shards(1000, 50, **{**PLAIN, "storage_bytes": 2e8}, spread=0.0)
    assert found.hours * HOUR == pytest.approx(10 + 1000 * 1e9 / 2e8 + 100, rel=1e-3)
    slow_network = simulate_shards(100, 10, **{**PLAIN, "network_bytes": 5e6}, spread=0.0)
    assert slow_network.hours * HOUR == pytest.approx(10 + 10 * 200 + 100)


@pytest.mark.parametrize("num_machines", [1, 8, 40])
@pytest.mark.parametrize("hours_between_failures", [0.1, 1.0, 1e6])
def test_the_formula_says_the_mean(num_machines: int, hours_between_failures: float) -> None:
    settings = {**PLAIN, "hours_between_failures": hours_between_failures}
    runs = [simulate_shards(400, num_machines, **settings, seed=seed) for seed in range(8)]
    expected = shards_seconds(
        400, num_machines, shard_seconds=100.0, start_seconds=10.0, hours_between_failures=hours_between_failures
    )
    assert statistics.mean(run.hours for run in runs) * HOUR == pytest.approx(expected, rel=0.06)
    if hours_between_failures == 0.1:
        assert statistics.mean(run.num_failures for run in runs) > 80  # about one for each 360 seconds of work
        assert statistics.mean(run.shards_lost for run in runs) > 80


def test_equal_seeds_are_equal_runs() -> None:
    settings = {**PLAIN, "hours_between_failures": 0.2}
    first, same, other = (simulate_shards(50, 4, **settings, seed=seed) for seed in (1, 1, 2))
    assert first == same != other
