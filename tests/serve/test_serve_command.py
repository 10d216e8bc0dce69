"""`openblip serve` as a process: its replies, a worker that dies, and its end while requests are answered."""

import base64
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve", reason='needs pip install "openblip[serve]"')
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.serve_fuzz import fuzz_server  # noqa: E402

pytestmark = pytest.mark.slow
KEY = "a key of the test"


def image(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Server:
    """A running server."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "keys").write_text(KEY + "\n")
        limits = ["--max-body", "1", "--max-images", "2", "--max-pixels", "10000"]
        words = ["serve", "--model", "openblip-mini", "--api-key-file", "keys", "--port", str(self.port), *limits]
        self.process = subprocess.Popen([sys.executable, "-m", "openblip", *words], cwd=folder)

    def ask(self, path: str, body: Any = None, key: str = KEY) -> tuple[int, Any, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read(), reply.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def until_ready(self) -> None:
        for _ in range(3000):  # Ray, the models and a busy machine
            try:
                if self.ask("/ready")[0] == 200:
                    return
            except OSError:
                assert self.process.poll() is None, "the server has ended"
            time.sleep(0.1)
        raise AssertionError("the server is not ready")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("serve"))
    try:
        started.until_ready()
        yield started
    finally:
        started.process.kill()
        started.process.wait(60)


def test_limits_and_errors(server: Server) -> None:
    red = image("red")
    assert server.ask("/caption", {"images": red}, key="wrong")[0] == 401
    assert server.ask("/health", key="wrong")[0] == 200
    assert server.ask("/caption", {"images": "x" * 2_000_000})[0] == 413
    refused = {"data URI": "x", "opens no URL": "http://127.0.0.1/", "at most 2": [red] * 3, "known format": "data:,x"}
    for reason, images in refused.items():
        status, reply, _ = server.ask("/caption", {"images": images})
        assert (status, json.loads(reply)["error"]["type"]) == (422, "invalid")
        assert reason in json.loads(reply)["error"]["message"]


def test_no_request_is_a_server_error(server: Server) -> None:
    """A part of what benchmarks/serve_faults.py asks."""
    tally = fuzz_server(server.url, "openblip-mini", examples=4, hostile=60, headers={"Authorization": f"Bearer {KEY}"})
    assert tally.violations == []
    assert tally.statuses.keys() >= {200, 400, 404, 405, 413, 422}
    assert tally.num_requests > 100


def test_the_guide_is_true(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/serve.md asks of a server, with this one's address, key and model."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "red").save("scene.png")
    page = (Path(__file__).parents[2] / "docs/serve.md").read_text()
    page = re.sub("openblip-mini-(captioner|filter)", "openblip-mini", page)
    page = page.replace("http://127.0.0.1:8000", server.url).replace('"none"', repr(KEY))
    (python,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(python, "docs/serve.md", "exec"), {})
    commands = re.findall(r"^curl .*$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        words = [*shlex.split(command), "-sS", "--fail-with-body", "-H", f"Authorization: Bearer {KEY}"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert json.loads(done.stdout)["model"] == "openblip-mini"


def test_a_dead_worker_comes_back(server: Server) -> None:
    status, reply, _ = server.ask("/caption", {"images": image("red")})
    assert status == 200
    children = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
    workers = []
    pending = [int(pid) for pid in Path(children).read_text().split()]
    while pending:
        pid = pending.pop()
        title = Path(f"/proc/{pid}/cmdline").read_text()
        workers += [pid] if "ModelWorker" in title or "model-0" in title else []
        pending += [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    status, _, headers = server.ask("/caption", {"images": image("red")})
    assert (status, headers["Retry-After"]) == (503, "1")  # however soon the next worker is there
    server.until_ready()
    assert server.ask("/caption", {"images": image("red")})[:2] == (200, reply)


def test_sigterm_loses_no_request(server: Server) -> None:
    figure = rb'openblip_requests_(?:in_flight{model="openblip-mini"}|total{path="/caption",status="200"}) (.*)'

    def num_accepted() -> float:
        """Requests that are being answered, and those that were."""
        return sum(map(float, re.findall(figure, server.ask("/metrics")[1])))

    colours = [f"#{n:02x}8040" for n in range(0, 240, 10)]
    before = num_accepted()
    with ThreadPoolExecutor(len(colours)) as pool:
        asked = [pool.submit(server.ask, "/caption", {"images": image(colour)}) for colour in colours]
        while num_accepted() < before + len(colours) and not all(each.done() for each in asked):
            pass
        server.process.send_signal(signal.SIGTERM)
        assert {each.result()[0] for each in asked} == {200}
    assert server.process.wait(60) == 0
