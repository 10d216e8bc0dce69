"""`openblip serve`: models, and an index, as an HTTP server."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openblip.cli.options import DeviceOptions
from openblip.errors import ConfigError, MissingExtraError
from openblip.serve.config import ReplicaOptions, ServerLimits

if TYPE_CHECKING:
    from openblip.serve.cluster import ServedModels

OBJECT_STORE_GB = 0.5  # requests and answers pass through it, and are small


def command(
    *,
    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction],
    index: str | None = None,
    capfilt: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    allow_image_url: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    address: str | None = None,
    device: DeviceOptions,
    replicas: ReplicaOptions,
    limits: ServerLimits,
) -> int:
    """Serves models over HTTP: a page, a JSON API, and OpenAI's API at /v1.

    A call goes to the model that it names, or to the first that can do it. SIGTERM and Ctrl-C let the requests end that
    were accepted. Keys come from --api-key-file or from OPENBLIP_API_KEY; without one everyone may ask.

    Args:
        model: a checkpoint folder, file, hub name or shipped model, as NAME or NAME=CHECKPOINT; may be given again.
        index: the folder of an index, for search.
        capfilt: a CapFilt run that the page shows, and that takes labels there for capfilt-calibrate.
        host: address to listen at; 0.0.0.0 is every one of this machine.
        port: port to listen at; 0 is any free one.
        api_key_file: a file of keys, one on each line; a request must have one of them.
        allow_image_url: a prefix such as https://HOST/PATH, below which images are fetched; may be given again. Other
            URLs are refused.
        address: a Ray cluster that serves, as auto, HOST:PORT or ray://HOST:PORT; this machine when not given. HTTP is
            answered at --host and --port of its nodes.
    """
    if not model:
        raise ConfigError("--model must be given")
    require_server_packages()
    from openblip.data.sources.storage import absolute
    from openblip.serve.cluster import ServedModels, named_models, read_keys

    served = ServedModels(
        models=named_models(model), load=asdict(device), limits=limits, replicas=replicas,
        index=index and absolute(index), capfilt=capfilt and absolute(capfilt), keys=read_keys(api_key_file),
        image_urls=allow_image_url,
    )  # fmt: skip
    if address is None:
        serve_models(served, host=host, port=port)
    else:
        serve_on_cluster(served, address, host=host, port=port)
    return 0


def serve_models(served: "ServedModels", *, host: str, port: int, opens_page: bool = False) -> None:
    """Serve on this machine until SIGTERM or Ctrl-C. opens_page: in a browser, where there is a display."""
    import ray
    import uvicorn
    from ray import serve

    from openblip.cluster import start_ray
    from openblip.serve.cluster import deploy_on_this_machine

    opened = served.open()
    # Ray's processes become other programs at once, so that LanceDB's warning of what a fork shares is not about them.
    warnings.filterwarnings("ignore", message="lancedb fork support")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it would tell of its own steps
    start_ray(OBJECT_STORE_GB)
    try:
        serve.start(proxy_location="Disabled")
        print(f"loading {', '.join(served.models)}", file=sys.stderr, flush=True)
        app = served.app(deploy_on_this_machine(served), *opened)
        config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False)
        asyncio.run(_run(uvicorn.Server(config), app.state.server, served.limits, opens_page))
    finally:
        with contextlib.suppress(Exception):  # the cluster may be gone
            serve.shutdown()
        ray.shutdown()


def serve_on_cluster(served: "ServedModels", address: str, *, host: str, port: int) -> None:
    """Serve on a Ray cluster until SIGTERM or Ctrl-C, behind the proxies of Ray Serve."""
    from ray import serve

    from openblip.cluster import EngineOptions, connected
    from openblip.serve.cluster import APP_NAME, cluster_app, run_deployment

    ended = threading.Event()
    with connected(EngineOptions(engine="ray", address=address)):
        # While models are loaded. Ray's own handler, which it installs as it connects, would abort the process.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        serve.start(http_options={"host": host, "port": port})
        print(f"loading {', '.join(served.models)}", file=sys.stderr, flush=True)
        try:
            run_deployment(APP_NAME, cluster_app(served), what=", ".join(served.models), route_prefix="/")
            print(f"serving at http://{host}:{port}, on each node with a worker", file=sys.stderr, flush=True)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: ended.set())
            while not ended.wait(1.0):
                pass
            print("ending: requests that were accepted are answered", file=sys.stderr, flush=True)
        finally:
            serve.delete(APP_NAME)


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
