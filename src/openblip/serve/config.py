"""Settings of the server."""

from dataclasses import dataclass

from openblip.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What a server takes on; more is refused with a status that says so."""

    max_body: int = 32
    """Megabytes of a request; more is answered 413."""
    max_pixels: int = 40_000_000
    """Of an image, as its header says, before it is decoded; more is answered 422."""
    max_images: int = 16
    """Images in a request."""
    max_texts: int = 1024
    """Texts of a request that are read or written, each counted again for every image that it goes with."""
    queue: int = 64
    """Requests that may wait for each model; more are answered 429, with the time after which to try again."""
    timeout: float = 60.0
    """Seconds until a request is given up, and answered 504."""
    batch_size: int = 32
    """Requests that a model answers together, at most."""
    batch_wait: float = 0.005
    """Seconds that a free model waits for more requests to join the first one."""
    cache: int = 512
    """Megabytes of encoded images that each model keeps: one that is asked about again is not encoded again."""
    drain: float = 1.0
    """Seconds after SIGTERM in which requests are still taken while /ready says no, for balancers to see it."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name not in ("cache", "drain", "batch_wait")):
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """How many workers each model has, and what each of them takes of the machines."""

    num_replicas: int = 1
    """Workers of each model, among which its requests are shared."""
    gpus_per_replica: float | None = None
    """GPUs of a worker, 0.5 for two workers on each; when not given, on this machine an even share of its GPUs, at most
    one, and on a cluster 1 where it has any."""
    cpus_per_replica: int | None = None
    """CPU cores with which a worker computes; when not given, on this machine an even share, and on a cluster 1."""

    def __post_init__(self) -> None:
        for name in ("num_replicas", "cpus_per_replica"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        gpus = self.gpus_per_replica
        if gpus is not None and not (0 <= gpus <= 1 or gpus == int(gpus) > 0):
            raise ConfigError(f"--gpus-per-replica is {gpus}: a part of one GPU, 0 to 1, or a whole number of them")
