"""Hours, machines and money of CapFilt and of pre-trainings, as formulas. No torch here; docs/cost.md explains them.

**CapFilt.** A pair costs a machine time in four places: storage sends its bytes, the network receives them, cores
decode the image, and the models caption and score it. These overlap, so a pair takes as long as the slowest of them;
only on a machine without accelerators do decoding and models share the cores, and their times add up. A shard is the
unit of work: a machine that fails loses the shard that it works on. With t seconds a shard and failures at a rate of f
a second, each followed by r seconds of restart, a shard takes on average

    e = (1/f + r) (exp(f t) - 1)

K shards on M machines take

    start + K e / M + (1 - 1/M) t (1/2 + sum over k of 1 - (1 - p^k)^M),    p = 1 - exp(-f t)

At the end machines wait for the last ones, half a shard on average, and for as many shards more as the unluckiest of M
has to be begun anew. The formula is for several shards a machine. Machines share the storage, so from M' = (bandwidth
of the storage) / (bytes that one machine works on in a second) on, more of them do not shorten the run, and the cost of
a pair grows as M / M'.

**Training.** A step takes as long as its operations, or as the loader for its samples, if that is longer. The gradients
of the trained weights are summed meanwhile, a ring of n processes sends 2 (1 - 1/n) of their bytes, and what takes
longer than the backward pass adds to the step. All machines wait when one fails: with M machines the rate of failures
is M f, and the unit that is lost is the time between two checkpoints.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from openblip.cost.machines import Machine
from openblip.errors import ConfigError
from openblip.models import flops
from openblip.models.config import BlipConfig
from openblip.nn.config import check_positive, check_setting

HOUR = 3600.0
BYTES_PER_ROW = 100  # of a caption file, measured by benchmarks/capfilt_cost.py


@dataclass(frozen=True, kw_only=True)
class PairsOptions:
    """What the images and texts of a data set are like."""

    image_bytes: int = 60_000
    """Bytes of an image in its shard."""
    megapixels: float = 0.3
    """Million pixels of an image before it is resized; 0.3 is 640 x 480."""
    text_tokens: int = 16
    """Tokens of a web text, with the first and the last."""

    def __post_init__(self) -> None:
        check_positive("image_bytes", self.image_bytes)
        check_positive("text_tokens", self.text_tokens)
        check_setting("megapixels", self.megapixels, self.megapixels > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class CapFiltWork:
    """CapFilt over so many pairs, with two models of one shape."""

    pairs: int
    model: BlipConfig
    data: PairsOptions = field(default_factory=PairsOptions)
    num_captions: int = 1
    caption_tokens: int = 12
    pairs_per_shard: int = 10_000

    def __post_init__(self) -> None:
        for name in ("pairs", "num_captions", "caption_tokens", "pairs_per_shard"):
            check_positive(name, getattr(self, name))

    @property
    def num_shards(self) -> int:
        return math.ceil(self.pairs / self.pairs_per_shard)

    def model_seconds(self, machine: Machine) -> float:
        """Of one accelerator for a pair: encode for the captioner and for the filter, write, score."""
        config, lengths = self.model, [self.data.text_tokens] + self.num_captions * [self.caption_tokens]
        image = flops.image_flops(config)
        write = flops.caption_flops(config, self.num_captions, self.caption_tokens) - image
        score = flops.score_flops(config, lengths) - image
        return 2 * image / machine.encode_flops + write / machine.write_flops + score / machine.score_flops

    def pair_seconds(self, machine: Machine) -> dict[str, float]:
        """Of a machine that works alone, for a pair, by stage; storage is the cluster's."""
        decode = machine.decode_seconds + machine.decode_seconds_per_megapixel * self.data.megapixels
        return {
            "decode": decode / machine.cores,
            "model": self.model_seconds(machine) / max(1, machine.accelerators),
            "network": self.data.image_bytes / machine.network_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines that are alike, and the storage that they read from."""

    machine: Machine
    num_machines: int = 1
    storage_bytes: float = 1e10
    """Bytes per second that the storage sends to all machines together."""
    price: float | None = None
    """Of one machine, for an hour."""

    def __post_init__(self) -> None:
        if self.num_machines < 1 or self.storage_bytes <= 0:
            raise ConfigError(f"A cluster of {self.num_machines} machines and {self.storage_bytes} bytes per second.")


class Estimate(NamedTuple):
    """What a piece of work takes."""

    hours: float
    num_machines: int
    stage_shares: dict[str, float]
    """Time of each stage as a share of the longest, by name."""
    bottleneck: str
    lost: float
    """Share of the hours that failures, start and waiting at the end take."""
    read_bytes: float
    written_bytes: float
    cost: float | None

    @property
    def machine_hours(self) -> float:
        return self.hours * self.num_machines


def working_seconds(times: dict[str, float], machine: Machine) -> float:
    """The time of stages that overlap. Cores that run the models too cannot decode meanwhile."""
    if machine.accelerators:
        return max(times.values())
    others = [seconds for stage, seconds in times.items() if stage not in ("decode", "model")]
    return max([times["decode"] + times["model"], *others])


def with_failures(seconds: float, failures_per_second: float, restart_seconds: float) -> float:
    """The mean time of a unit of work that has to begin anew after each failure; these come at random."""
    if failures_per_second * seconds > 50:
        return math.inf
    return (1 / failures_per_second + restart_seconds) * math.expm1(failures_per_second * seconds)


def estimate_capfilt(work: CapFiltWork, cluster: Cluster) -> Estimate:
    """CapFilt on a cluster."""
    machine, count = cluster.machine, cluster.num_machines
    times = work.pair_seconds(machine)
    times["storage"] = work.data.image_bytes * min(count, work.num_shards) / cluster.storage_bytes
    shard = working_seconds(times, machine) * work.pairs_per_shard
    seconds = shards_seconds(
        work.pairs / work.pairs_per_shard,
        count,
        shard_seconds=shard,
        start_seconds=machine.start_seconds,
        hours_between_failures=machine.hours_between_failures,
    )
    ideal = work.pairs / work.pairs_per_shard * shard / count
    rows = work.pairs * (1 + work.num_captions)
    return _estimate(cluster, seconds, times, ideal, work.pairs * work.data.image_bytes, rows * BYTES_PER_ROW)


def shards_seconds(
    num_shards: float, num_machines: int, *, shard_seconds: float, start_seconds: float, hours_between_failures: float
) -> float:
    """The mean time until machines that take shards from one queue have done all of them."""
    whole = with_failures(shard_seconds, 1 / (hours_between_failures * HOUR), start_seconds)
    if num_shards <= num_machines:
        return start_seconds + min(1.0, num_shards) * whole
    failing = -math.expm1(-shard_seconds / (hours_between_failures * HOUR))
    begun_anew = sum(1 - (1 - failing**k) ** num_machines for k in range(1, 50))
    at_the_end = (1 - 1 / num_machines) * shard_seconds * (0.5 + begun_anew)
    return start_seconds + num_shards * whole / num_machines + at_the_end


def machines_within(work: CapFiltWork, cluster: Cluster, hours: float) -> int | None:
    """The fewest machines that finish within so many hours; None where no number of them does."""
    count = 1
    best = math.inf
    while True:
        found = estimate_capfilt(work, replace(cluster, num_machines=count)).hours
        if found <= hours:
            break
        if found >= best or count > work.num_shards:  # more of them share the same storage
            return None
        best, count = found, 2 * count
    low, high = count // 2, count
    while high - low > 1:
        middle = (low + high) // 2
        fits = estimate_capfilt(work, replace(cluster, num_machines=middle)).hours <= hours
        low, high = (low, middle) if fits else (middle, high)
    return high


@dataclass(frozen=True, kw_only=True)
class TrainingWork:
    """A training: its steps, and what one sample of them takes."""

    name: str
    steps: int
    samples_per_step: int
    frozen_flops: float
    """Of frozen models for a sample, with the gradients that pass through them; as fast as encoding."""
    trained_flops: float
    """Of everything else, forward and backward, for a sample."""
    trained_parameters: float
    data: PairsOptions = field(default_factory=PairsOptions)
    checkpoint_every: int = 500


def estimate_training(work: TrainingWork, cluster: Cluster) -> Estimate:
    """A training on a cluster, data-parallel."""
    machine, count = cluster.machine, cluster.num_machines
    samples = work.samples_per_step / count  # of a machine
    devices = max(1, machine.accelerators)
    frozen = work.frozen_flops * samples / devices / machine.encode_flops
    trained = work.trained_flops * samples / devices / machine.train_flops
    processes = count * devices
    gradients = 4 * work.trained_parameters  # float32
    exchange = 2 * (1 - 1 / processes) * gradients / machine.network_bytes if count > 1 else 0.0
    computing = frozen + trained + max(0.0, exchange - 2 / 3 * trained)
    decode = machine.decode_seconds + machine.decode_seconds_per_megapixel * work.data.megapixels
    times = {
        "decode": samples * (decode + machine.augment_seconds) / machine.cores,
        "model": computing,
        "network": samples * work.data.image_bytes / machine.network_bytes,
        "storage": work.samples_per_step * work.data.image_bytes / cluster.storage_bytes,
    }
    step = working_seconds(times, machine)
    interval = min(work.steps, work.checkpoint_every)
    failures = count / (machine.hours_between_failures * HOUR)
    whole = with_failures(interval * step, failures, machine.start_seconds)
    seconds = machine.start_seconds + work.steps / interval * whole
    read = work.steps * work.samples_per_step * work.data.image_bytes
    return _estimate(cluster, seconds, times, work.steps * step, read, 0.0)


def _estimate(
    cluster: Cluster, seconds: float, times: dict[str, float], ideal: float, read: float, written: float
) -> Estimate:
    longest = max(times, key=lambda stage: times[stage])
    hours, count = seconds / HOUR, cluster.num_machines
    return Estimate(
        hours=hours,
        num_machines=count,
        stage_shares={stage: value / times[longest] for stage, value in times.items()},
        bottleneck=longest,
        lost=1 - ideal / seconds,
        read_bytes=read,
        written_bytes=written,
        cost=None if cluster.price is None else cluster.price * hours * count,
    )
