"""`openblip serve --address` on a Ray cluster that the test starts: two workers of a model behind Serve's proxies."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

pytest.importorskip("ray.serve", reason='needs pip install "openblip[serve]"')
from ray import cluster_utils
from test_serve_command import image

from openblip.errors import ConfigError
from openblip.serve.cluster import ClusterSettings, ServedModels, build_app, named_models


def test_what_cannot_be_deployed_is_refused() -> None:
    with pytest.raises(ConfigError, match="--num-replicas is 0"):
        build_app(ClusterSettings(model="openblip-mini", num_replicas=0))
    with pytest.raises(ConfigError, match="--allow-image-url"):
        ServedModels(models={}, image_urls=["good.example"])
    with pytest.raises(ConfigError, match="twice"):
        named_models(["a", "b", "a=c"])
    with pytest.raises(ValidationError):
        ClusterSettings(model="a", replicas=2)  # type: ignore[call-arg]
    assert build_app(ClusterSettings(model=["a=openblip-mini", "openblip-mini"], limits={"max_body": 1}))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    memory = {"object_store_memory": 80 * 2**20}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 4, **memory})
    yield cluster
    cluster.shutdown()


def workers() -> list[int]:
    """The processes of the model on this machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            found += [int(entry.name)] if title.startswith("ray::ServeReplica:openblip:model-0") else []
    return found


@pytest.mark.slow
def test_the_app_is_served_by_a_cluster(cluster: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", "openblip-mini", "--num-replicas", "2", "--max-body", "1", "--port", str(port)]
    key = {"OPENBLIP_API_KEY": "a key"}
    process = subprocess.Popen(
        [sys.executable, "-m", "openblip", *words, "--address", cluster.address],
        cwd=tmp_path, env=os.environ | key, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def ask(path: str, body: Any = None, key: str = "a key") -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def until(condition: Any) -> None:
        for _ in range(600):
            if condition():
                return
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        raise AssertionError("it did not happen within a minute")

    try:
        assert process.stderr is not None
        assert next(line for line in process.stderr if "serving at" in line)
        until(lambda: ask("/ready")[0] == 200)
        red = {"images": image("red")}
        status, caption = ask("/caption", red)
        assert status == 200
        assert ask("/caption", red, key="wrong")[0] == 401
        assert ask("/caption", {"images": "x" * 2_000_000})[0] == 413
        assert ask("/match", {**red, "texts": ["a dog"]})[1]["match"][0][0] > 0
        first, _ = workers()
        os.kill(first, signal.SIGKILL)  # the other one answers, and soon there are two again
        until(lambda: ask("/caption", red) == (200, caption))
        until(lambda: len(workers()) == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert workers() == []
    finally:
        process.kill()
        process.wait(60)
