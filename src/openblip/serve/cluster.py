"""The models as deployments of Ray Serve, and on a cluster the app before them as another one.

`openblip serve` deploys the models on this machine and answers HTTP itself. With `--address`, or by `serve run` and
`serve deploy` of Ray with `build_app`, the same app is a deployment too, behind the proxies of Ray Serve on the nodes.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from openblip.data.reader import num_cores
from openblip.errors import ConfigError
from openblip.serve.app import ModelServer, make_app
from openblip.serve.capfilt import capfilt_router
from openblip.serve.config import ReplicaOptions, ServerLimits
from openblip.serve.openai import openai_router
from openblip.serve.page import page_router
from openblip.serve.remote_images import AllowedPrefix
from openblip.serve.worker import ModelWorker

APP_NAME = "openblip"
NUM_FRONTS = 16  # at most, each of which has a call at every worker that only waits for its death


@dataclass(frozen=True, kw_only=True)
class ServedModels:
    """What is served: checkpoints by the names of their models, and what is said and allowed around them."""

    models: Mapping[str, str]
    load: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `openblip.load`: device and dtype."""
    limits: ServerLimits = field(default_factory=ServerLimits)
    replicas: ReplicaOptions = field(default_factory=ReplicaOptions)
    index: str | None = None
    """The folder of an index, which the app opens."""
    capfilt: str | None = None
    """The folder of a CapFilt run, which the app browses."""
    keys: Sequence[str] = ()
    image_urls: Sequence[str] = ()

    def __post_init__(self) -> None:
        for prefix in self.image_urls:
            AllowedPrefix(prefix)

    def open(self) -> tuple[Any, list[APIRouter]]:
        """The index, if there is one, and the routes of the page. Raises ConfigError for an index or a run that is
        none.
        """
        index = None
        if self.index is not None:
            from openblip.search.index import ImageIndex

            index = ImageIndex(self.index, **self.load)
        return index, [page_router()] if self.capfilt is None else [page_router(), capfilt_router(self.capfilt)]

    def app(self, handles: Mapping[str, Any], index: Any, routers: Sequence[APIRouter]) -> FastAPI:
        """The app before deployed models, with what `open` gave; its `state.server` is the `ModelServer`."""
        num_replicas = self.replicas.num_replicas
        server = ModelServer(handles, self.limits, index, num_replicas=num_replicas, image_urls=self.image_urls)
        return make_app(server, keys=self.keys, routers=[*routers, openai_router(server)])

    def deployment(self, number: int, *, gpus: float, cpus: float, num_threads: int | None = None) -> Any:
        """A model by its number. num_threads: of its computations, where Ray does not decide that by `cpus`."""
        limits, checkpoint = self.limits, list(self.models.values())[number]
        deployment: Any = serve.deployment(  # of a class; its types say a function
            ModelWorker,
            name=f"model-{number}",
            num_replicas=self.replicas.num_replicas,
            max_ongoing_requests=2 * limits.batch_size + NUM_FRONTS,
            max_queued_requests=limits.queue,
            health_check_period_s=1.0,
            graceful_shutdown_timeout_s=5.0,
            ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        )
        return deployment.bind(
            {"source": checkpoint, **self.load},
            batch_size=limits.batch_size,
            batch_wait=limits.batch_wait,
            cache_bytes=limits.cache * 1_000_000,
            max_pixels=limits.max_pixels,
            num_threads=num_threads,
        )


def run_deployment(name: str, application: Any, *, what: str, route_prefix: str | None) -> Any:
    """The handle of an application that now runs. Raises ConfigError where it does not: `what` cannot be served."""
    try:
        return serve.run(application, name=name, route_prefix=route_prefix)
    except (RuntimeError, RayError, RayServeException) as error:
        raise ConfigError(f"{what} cannot be served: {' '.join(str(error).split())[:500]}") from error


def deploy_on_this_machine(served: ServedModels) -> dict[str, Any]:
    """Handles of the models by their names, which share its GPUs and CPU cores evenly unless that is said."""
    num_workers, options = len(served.models) * served.replicas.num_replicas, served.replicas
    gpus = options.gpus_per_replica
    if gpus is None:
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / num_workers)
    threads = options.cpus_per_replica
    if threads is None and "OMP_NUM_THREADS" not in os.environ:  # Ray would set it to 1
        threads = max(1, num_cores() // num_workers)
    handles = {}
    for number, name in enumerate(served.models):
        application = served.deployment(number, gpus=gpus, cpus=0, num_threads=threads)
        handles[name] = run_deployment(f"model-{number}", application, what=f"--model {name}", route_prefix=None)
    return handles


def cluster_app(served: ServedModels) -> Any:
    """The app and its models as one application of Ray Serve. A worker reserves a CPU, and a GPU where the cluster has
    any, unless that is said.
    """
    gpus, cpus = served.replicas.gpus_per_replica, served.replicas.cpus_per_replica or 1
    if gpus is None:
        is_gpu = str(served.load.get("device") or "cuda").startswith("cuda")
        gpus = 1.0 if is_gpu and ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
    models = [served.deployment(number, gpus=gpus, cpus=cpus) for number in range(len(served.models))]

    def make() -> FastAPI:  # in the process of the app
        handles = {name: serve.get_deployment_handle(f"model-{number}") for number, name in enumerate(served.models)}
        return served.app(handles, *served.open())

    front: Any = serve.deployment(
        serve.ingress(make)(),
        name="app",
        max_ongoing_requests=10_000,  # the app itself says when there are too many
        graceful_shutdown_timeout_s=served.limits.timeout,
        ray_actor_options={"num_cpus": 1},
    )
    return front.bind(*models)


class ClusterSettings(BaseModel):
    """The `args` of `build_app`, in the words of `openblip serve`."""

    model_config = ConfigDict(extra="forbid")

    model: str | list[str]
    index: str | None = None
    capfilt: str | None = None
    api_key_file: Path | None = None
    allow_image_url: list[str] = []
    device: str | None = None
    dtype: str = "auto"
    num_replicas: int = 1
    gpus_per_replica: float | None = None
    cpus_per_replica: int | None = None
    limits: dict[str, Any] = Field({}, description="Fields of `ServerLimits`.")


def build_app(settings: ClusterSettings) -> Any:
    """The application for `serve run openblip.serve.cluster:build_app model=NAME`, and for files of `serve deploy`."""
    names = ("num_replicas", "gpus_per_replica", "cpus_per_replica")
    return cluster_app(
        ServedModels(
            models=named_models([settings.model] if isinstance(settings.model, str) else settings.model),
            load={"device": settings.device, "dtype": settings.dtype},
            limits=ServerLimits(**settings.limits),
            replicas=ReplicaOptions(**{name: getattr(settings, name) for name in names}),
            index=settings.index,
            capfilt=settings.capfilt,
            keys=read_keys(settings.api_key_file),
            image_urls=settings.allow_image_url,
        )
    )


def named_models(models: Sequence[str]) -> dict[str, str]:
    """Checkpoints by the name under which they are served, from NAME=CHECKPOINT or CHECKPOINT: of a path the last part.
    Raises ConfigError for one that is given twice.
    """
    named: dict[str, str] = {}
    for given in models:
        name, separator, checkpoint = given.partition("=")
        if not separator:
            name, checkpoint = (Path(given).name if Path(given).exists() else given), given
        if name in named:
            raise ConfigError(f"--model {name} is given twice; name them apart: --model NAME={checkpoint}")
        named[name] = os.path.abspath(checkpoint) if Path(checkpoint).exists() else checkpoint
    return named


def read_keys(path: Path | None) -> list[str]:
    """The keys in a file, one on each line, and in OPENBLIP_API_KEY. ConfigError for a file without any."""
    text = os.environ.get("OPENBLIP_API_KEY", "")
    if path is not None:
        try:
            text += "\n" + path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--api-key-file {path} cannot be read: {error}") from error
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if path is not None and not keys:
        raise ConfigError(f"--api-key-file {path} holds no key")
    return keys
