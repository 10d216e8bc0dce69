"""`openblip demo --page`: the page with the demo's run, its models and an index of its images."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

for package in ("ray.serve", "lancedb"):
    pytest.importorskip(package, reason='needs pip install "openblip[serve,search]"')
pytestmark = pytest.mark.slow


def test_the_demo_opens_the_page(tmp_path: Path) -> None:
    words = ["demo", "--page", "--num-samples", "12", "--num-workers", "1", "--out", "demo", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, "-m", "openblip", *words]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("serving at "):
                break
        else:
            raise AssertionError("".join(said))
        address = line.split()[-1]

        def ask(path: str, body: Any = None) -> Any:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.read()

        assert b"<html" in ask("/").lower()
        assert json.loads(ask("/capfilt/images"))
        found = json.loads(ask("/search", {"text": "a dog", "top": 3}))
        assert len(found["results"]) == 3
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)
