"""A stranger's first minutes: seconds and commands from an empty environment to the first caption, the first search and
the first served request, with the shipped models.

Peer: none; these are what README and the guides promise.
Method: for each goal a fresh environment, whose making is not counted, and then the commands as the guides have them,
one after the other, pip's among them. pip takes its packages from where it always does here, without its cache. The
server is asked when /ready says so, and stopped when nothing is timed. Every goal runs --repeats times.

    python -m benchmarks.first_minutes --repeats 1
"""

import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from benchmarks import blip_base
from benchmarks.harness import ROOT, Report, parser, timed

CAPTIONER, FILTER = "openblip-mini-captioner", "openblip-mini-filter"
PORT = "8765"
IMAGES = 8
Steps = list[tuple[str, Callable[[], object]]]
"""The commands of a goal, by what they are called."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--package", type=Path, default=ROOT, help="what pip installs: a clone, or a wheel")
    options.add_argument("--goals", nargs="+", choices=list(GOALS), default=list(GOALS))
    chosen = options.parse_args()
    chosen.package = chosen.package.resolve()
    report = Report("first-minutes", __doc__, chosen)
    for goal in chosen.goals:
        seconds: dict[str, list[float]] = {}
        for _ in range(chosen.repeats):
            with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
                for name, step in GOALS[goal](make_environment(Path(folder)), str(chosen.package), ending):
                    seconds.setdefault(name, []).append(timed(step))
        report.timings(goal, seconds)
        totals = [sum(each) for each in zip(*seconds.values(), strict=True)]
        report.add(goal, sorted(totals)[len(totals) // 2], min(totals), max(totals), unit="s")
        report.add(f"commands to the {goal}", len(seconds), unit="")
    report.save()


def make_environment(folder: Path) -> Path:
    """An empty environment in a folder with some images."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    (folder / "photos").mkdir()
    for number, image in enumerate(blip_base.images(IMAGES)):
        image.save(folder / "photos" / f"{number}.jpg")
    return folder


def run(folder: Path, *words: str) -> str:
    """Run a program of the environment in its folder, and return what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    program = [str(folder / "venv" / "bin" / words[0]), *words[1:]]
    done = subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def install(folder: Path, package: str, extra: str = "") -> tuple[str, Callable[[], object]]:
    pins = ("-c", str(ROOT / "constraints.txt"))
    wanted = f"{package}[{extra}]" if extra else package
    return "pip install", lambda: run(folder, "pip", "install", "--quiet", "--no-cache-dir", *pins, wanted)


def captioned(folder: Path, package: str, _: contextlib.ExitStack) -> Steps:
    return [
        install(folder, package),
        ("openblip caption", lambda: run(folder, "openblip", "caption", "photos/0.jpg", "--model", CAPTIONER)),
    ]


def found(folder: Path, package: str, _: contextlib.ExitStack) -> Steps:
    def search() -> None:
        assert len(run(folder, "openblip", "search", "index", "a red dog").splitlines()) == IMAGES

    return [
        install(folder, package, "search"),
        ("openblip index", lambda: run(folder, "openblip", "index", "photos", "--model", FILTER, "--out", "index")),
        ("openblip search", search),
    ]


def served(folder: Path, package: str, ending: contextlib.ExitStack) -> Steps:
    address = f"http://127.0.0.1:{PORT}"

    def serve() -> None:
        program = str(folder / "venv" / "bin" / "openblip")
        server = subprocess.Popen([program, "serve", "--model", CAPTIONER, "--port", PORT], cwd=folder)
        ending.callback(server.wait)
        ending.callback(server.terminate)
        while True:
            with contextlib.suppress(OSError):  # nobody listens yet, or 503
                urllib.request.urlopen(f"{address}/ready", timeout=5)
                return
            if server.poll() is not None:
                raise RuntimeError(f"openblip serve ended with {server.returncode}")
            time.sleep(0.1)

    def ask() -> None:
        image = base64.b64encode((folder / "photos" / "0.jpg").read_bytes()).decode()
        body = json.dumps({"images": f"data:image/jpeg;base64,{image}"}).encode()
        request = urllib.request.Request(f"{address}/caption", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.load(reply)["captions"]

    return [install(folder, package, "serve"), ("openblip serve, until it is ready", serve), ("a request", ask)]


GOALS = {"first caption": captioned, "first search": found, "first served request": served}

if __name__ == "__main__":
    main()
