"""Estimates against what can be computed by hand, and against drawn failures."""

import random
from dataclasses import replace

import pytest

from openblip.cost.formula import (
    HOUR,
    CapFiltWork,
    Cluster,
    PairsOptions,
    TrainingWork,
    estimate_capfilt,
    estimate_training,
    machines_within,
    with_failures,
)
from openblip.cost.machines import Machine, load_machine
from openblip.cost.trainings import paper_trainings
from openblip.errors import ConfigError
from openblip.models import flops
from openblip.models.config import BlipConfig

MACHINE = Machine(
    name="plain", source="round numbers", cores=10, accelerators=2, encode_flops=1e12, write_flops=1e12,
    score_flops=1e12, train_flops=1e12, decode_seconds=0.01, decode_seconds_per_megapixel=0.02, network_bytes=1e9,
    start_seconds=0.0, hours_between_failures=1e9,
)  # fmt: skip
WORK = CapFiltWork(
    pairs=1_000_000, pairs_per_shard=500, model=BlipConfig(), data=PairsOptions(image_bytes=100_000, megapixels=0.5)
)
CLUSTER = Cluster(machine=MACHINE, storage_bytes=1e12, price=3.0)
MODEL_SECONDS = (flops.caption_flops(BlipConfig(), 1, 12) + flops.score_flops(BlipConfig(), [16, 12])) / 1e12 / 2


@pytest.mark.parametrize(
    ("bottleneck", "changes", "storage", "seconds"),
    [
        ("model", {}, 1e12, MODEL_SECONDS),
        ("decode", {"cores": 1, "accelerators": 1000}, 1e12, 0.02),
        ("network", {"network_bytes": 1e5}, 1e12, 1.0),
        ("storage", {}, 1e5, 1.0),
    ],
)
def test_the_slowest_stage_decides(bottleneck: str, changes: dict[str, float], storage: float, seconds: float) -> None:
    cluster = replace(CLUSTER, machine=replace(MACHINE, **changes), storage_bytes=storage)
    found = estimate_capfilt(WORK, cluster)
    assert found.bottleneck == bottleneck
    assert found.hours == pytest.approx(1e6 * seconds / HOUR, rel=1e-3)
    assert found.cost == pytest.approx(3.0 * found.hours)
    assert found.read_bytes == 1e11
    assert found.stage_shares[bottleneck] == 1 == max(found.stage_shares.values())


def test_without_accelerators_cores_decode_and_compute_in_turn() -> None:
    found = estimate_capfilt(WORK, replace(CLUSTER, machine=replace(MACHINE, accelerators=0)))
    assert found.hours == pytest.approx(1e6 * (2 * MODEL_SECONDS + 0.002) / HOUR, rel=1e-3)


def test_hours_fall_with_machines_until_the_storage_is_busy() -> None:
    """Ten machines read 10 * 1e5 / MODEL_SECONDS bytes a second; a storage of twice that is busy with twenty."""
    cluster = replace(CLUSTER, storage_bytes=20 * 1e5 / MODEL_SECONDS)
    hours = [estimate_capfilt(WORK, replace(cluster, num_machines=count)).hours for count in (1, 10, 20, 40)]
    assert hours[0] / hours[1] == pytest.approx(10, rel=0.06)  # half a shard at the end
    assert hours[3] == pytest.approx(hours[2], rel=0.05)
    busy = estimate_capfilt(WORK, replace(cluster, num_machines=40))
    assert busy.bottleneck == "storage"
    assert busy.machine_hours == pytest.approx(2 * hours[0], rel=0.1)  # half of them wait


def test_the_fewest_machines_in_time() -> None:
    cluster = replace(CLUSTER, storage_bytes=20 * 1e5 / MODEL_SECONDS)
    for hours in (2.5, 5.0, 12.0, 100.0):
        count = machines_within(WORK, cluster, hours)
        assert count is not None
        assert estimate_capfilt(WORK, replace(cluster, num_machines=count)).hours <= hours
        if count > 1:
            assert estimate_capfilt(WORK, replace(cluster, num_machines=count - 1)).hours > hours
    assert machines_within(WORK, cluster, 0.5) is None


@pytest.mark.parametrize("mean_time", [0.5, 2.0, 20.0])
def test_failures_cost_what_drawn_ones_do(mean_time: float) -> None:
    """A unit of one second that begins anew after each failure, 0.3 seconds later."""
    draw, spent = random.Random(0), 0.0
    for _ in range(20_000):
        while (failure := draw.expovariate(1 / mean_time)) < 1.0:
            spent += failure + 0.3
        spent += 1.0
    assert with_failures(1.0, 1 / mean_time, 0.3) == pytest.approx(spent / 20_000, rel=0.03)


def test_a_training_by_hand() -> None:
    """1e12 operations a second, and 2e12 for a sample: 100 samples on four accelerators take 50 seconds."""
    work = TrainingWork(
        name="plain", steps=1000, samples_per_step=100, frozen_flops=5e11, trained_flops=1.5e12, trained_parameters=1e8
    )
    pair = replace(CLUSTER, num_machines=2)
    found = estimate_training(work, pair)
    assert found.bottleneck == "model"
    assert found.hours == pytest.approx(1000 * 50 / HOUR)
    slow = replace(pair, machine=replace(MACHINE, network_bytes=1e7))
    exchange = 2 * 3 / 4 * 4e8 / 1e7  # 60 s, of which 2/3 of 37.5 s pass beside the backward pass
    assert estimate_training(work, slow).hours == pytest.approx(1000 * (50 + exchange - 25) / HOUR)
    failing = replace(pair, machine=replace(MACHINE, hours_between_failures=50.0))
    assert estimate_training(work, failing).hours > 1.1 * found.hours  # half of 500 steps, every 25 hours


def test_the_papers_trainings_have_the_papers_sizes() -> None:
    works = {work.name: (work, count) for work, count in paper_trainings(PairsOptions())}
    base, count = works["BLIP ViT-B 14M"]
    assert (base.samples_per_step, count) == (2880, 32)
    assert base.steps * base.samples_per_step == pytest.approx(20 * 14e6, rel=1e-3)
    stage1, count = works["BLIP-2 stage 1 ViT-g"]
    assert (stage1.steps, stage1.samples_per_step, count) == (250_000, 1680, 16)
    assert stage1.frozen_flops == pytest.approx(2 * 257 * 1.0e9, rel=0.06)  # a billion weights, and attention
    opt, t5 = works["BLIP-2 stage 2 OPT-6.7B"][0], works["BLIP-2 stage 2 FlanT5-XXL"][0]
    assert opt.frozen_flops > 2 * 2 * 6.4e9 * 64  # forward and backward through its weights, 32 + 32 tokens
    assert t5.samples_per_step == 1520


def test_shipped_machines_are_read_and_others_refused(tmp_path) -> None:
    assert load_machine("h100x8").accelerators == 8
    MACHINE.save(tmp_path / "own.json")
    assert load_machine(str(tmp_path / "own.json")) == MACHINE
    with pytest.raises(ConfigError, match=r"no machine h200: .* one of .*h100x8"):
        load_machine("h200")
    (tmp_path / "own.json").write_text('{"name": "x", "speed": 3}')
    with pytest.raises(ConfigError, match="is not the file of a machine"):
        load_machine(str(tmp_path / "own.json"))
    with pytest.raises(ConfigError, match="cores is 0"):
        replace(MACHINE, cores=0)
