"""`openblip serve`: models, and an index, as an HTTP server."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro

from openblip.cli.options import DeviceOptions
from openblip.errors import ConfigError, MissingExtraError
from openblip.serve.config import ServerLimits


def command(
    *,
    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction],
    index: str | None = None,
    capfilt: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    allow_image_url: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    device: DeviceOptions,
    limits: ServerLimits,
) -> int:
    """Serves models over HTTP: a page, a JSON API, and OpenAI's API at /v1.

    A call goes to the model that it names, or to the first that can do it. SIGTERM and Ctrl-C let the requests end that
    were accepted. Keys come from --api-key-file or from OPENBLIP_API_KEY; without one everyone may ask.

    Args:
        model: a checkpoint folder, file, hub name or shipped model, as NAME or NAME=CHECKPOINT; may be given again.
        index: the folder or URL of an index, for search.
        capfilt: a CapFilt run that the page shows, and that takes labels there for capfilt-calibrate.
        host: address to listen at; 0.0.0.0 is every one of this machine.
        port: port to listen at; 0 is any free one.
        api_key_file: a file of keys, one on each line; a request must have one of them.
        allow_image_url: a prefix such as https://HOST/PATH, below which images are fetched; may be given again. Other
            URLs are refused.
    """
    if not model:
        raise ConfigError("--model must be given")
    require_server_packages()
    serve_models(
        _named(model), index=index, capfilt=capfilt, host=host, port=port, keys=keys_of(api_key_file), device=device,
        limits=limits, image_urls=allow_image_url,
    )  # fmt: skip
    return 0


def serve_models(
    models: dict[str, str],
    *,
    index: str | Path | None,
    capfilt: str | None,
    host: str,
    port: int,
    keys: list[str],
    device: DeviceOptions,
    limits: ServerLimits,
    image_urls: Sequence[str] = (),
    opens_page: bool = False,
) -> None:
    """Serve checkpoints by their names until SIGTERM or Ctrl-C. opens_page: in a browser, where there is a display."""
    import uvicorn

    from openblip.serve.app import ModelServer, make_app
    from openblip.serve.capfilt import capfilt_router
    from openblip.serve.openai import openai_router
    from openblip.serve.page import page_router

    found = None
    if index is not None:
        from openblip.search.index import ImageIndex

        found = ImageIndex(index, device=device.device, dtype=device.dtype)
    routers = [page_router()] if capfilt is None else [page_router(), capfilt_router(capfilt)]
    with _deployed(models, device, limits) as handles:
        server = ModelServer(handles, limits, found, image_urls=image_urls)
        app = make_app(server, keys=keys, routers=[*routers, openai_router(server)])
        config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False)
        asyncio.run(_run(uvicorn.Server(config), server, limits, opens_page))


def require_server_packages() -> None:
    """Raises MissingExtraError when the server cannot run."""
    try:
        import aiohttp  # noqa: F401
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import ray.serve  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('openblip serve needs more packages: pip install "openblip[serve]"') from error


def _named(models: tuple[str, ...]) -> dict[str, str]:
    """Checkpoints by the name under which they are served: of a path the last part."""
    named: dict[str, str] = {}
    for given in models:
        name, separator, checkpoint = given.partition("=")
        if not separator:
            name, checkpoint = (Path(given).name if Path(given).exists() else given), given
        if name in named:
            raise ConfigError(f"--model {name} is given twice; name them apart: --model NAME={checkpoint}")
        named[name] = checkpoint
    return named


def keys_of(path: Path | None) -> list[str]:
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


@contextlib.contextmanager
def _deployed(models: dict[str, str], device: DeviceOptions, limits: ServerLimits) -> Iterator[dict[str, Any]]:
    """Handles of the models, each in a process of a Ray cluster on this machine, which ends afterwards."""
    import ray
    from ray import serve

    from openblip.serve.worker import ModelWorker

    start_ray()
    try:
        serve.start(proxy_location="Disabled")
        num_gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / len(models))
        handles = {}
        for number, (name, checkpoint) in enumerate(models.items()):
            print(f"loading {name}", file=sys.stderr, flush=True)
            deployment: Any = serve.deployment(  # of a class; its types say a function
                ModelWorker,
                name=f"model-{number}",
                max_ongoing_requests=2 * limits.batch_size + 1,  # one is `stay`
                max_queued_requests=limits.queue,
                health_check_period_s=1.0,
                graceful_shutdown_timeout_s=5.0,
                ray_actor_options={"num_cpus": 0, "num_gpus": num_gpus},
            )
            application = deployment.bind(
                {"source": checkpoint, **asdict(device)},
                batch_size=limits.batch_size,
                batch_wait=limits.batch_wait,
                cache_bytes=limits.cache * 1_000_000,
                max_pixels=limits.max_pixels,
            )
            try:
                handles[name] = serve.run(application, name=f"model-{number}", route_prefix=None)
            except RuntimeError as error:
                raise ConfigError(f"--model {name} cannot be served: {' '.join(str(error).split())[:500]}") from error
        yield handles
    finally:
        with contextlib.suppress(Exception):  # the cluster may be gone
            serve.shutdown()
        ray.shutdown()


def start_ray() -> None:
    """A cluster on this machine. Ray gives it 30 s, too few where much else runs, so a second and third try follow."""
    import ray

    for tries_left in (2, 1, 0):
        try:
            ray.init(
                address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
                object_store_memory=512 * 1024**2,
            )  # fmt: skip
            return
        except Exception as error:  # Ray's own has no class
            ray.shutdown()
            if not tries_left or "timed out during startup" not in str(error):
                raise


async def _run(http: Any, server: Any, limits: ServerLimits, opens_page: bool) -> None:
    """Serve until SIGTERM or SIGINT; then say no to /ready for a while, take no more, and let what was accepted end."""
    loop = asyncio.get_running_loop()

    async def drain() -> None:
        if server.is_draining:
            return
        server.is_draining = True
        print("ending: requests that were accepted are answered", file=sys.stderr, flush=True)
        await asyncio.sleep(limits.drain)
        http.should_exit = True

    draining: set[asyncio.Task[None]] = set()
    http.capture_signals = contextlib.nullcontext  # the handlers below take their place
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: draining.add(asyncio.ensure_future(drain())))
    serving = asyncio.ensure_future(http.serve())
    while not http.started and not serving.done():
        await asyncio.sleep(0.02)
    if http.started:
        (address,) = {socket.getsockname()[:2] for each in http.servers for socket in each.sockets}
        print(f"serving at http://{address[0]}:{address[1]}", file=sys.stderr, flush=True)
        if opens_page and _has_display():
            webbrowser.open(f"http://{address[0]}:{address[1]}")
    await serving


def _has_display() -> bool:
    return sys.platform in ("win32", "darwin") or any(os.environ.get(x) for x in ("DISPLAY", "WAYLAND_DISPLAY"))
