"""A server for the benchmarks of serving: started, asked, measured and stopped, as an operator would."""

import asyncio
import base64
import io
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx2

from benchmarks.harness import ROOT

READY_SECONDS, STOP_SECONDS = 400, 60
OPENBLIP = (sys.executable, "-m", "openblip", "serve", "--port", "PORT")


class Server:
    """A command that serves HTTP at PORT, from `with` to the end of its block, or as often as it is started."""

    def __init__(self, *arguments: str, command: Sequence[str] = OPENBLIP, core: int | None = None) -> None:
        """core: the one for all its processes, with one thread of torch each; by default they may use all."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = [str(self.port) if word == "PORT" else word for word in (*command, *arguments)]
        self.command = words if core is None else ["taskset", "--cpu-list", str(core), *words]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin, without waiting until it is ready."""
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(self.command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)

    def until_ready(self) -> float:
        """Seconds of waiting. Raises RuntimeError when it has ended, or takes too long."""
        began = time.perf_counter()
        while not self.is_ready():
            if self.process.poll() is not None or time.perf_counter() > began + READY_SECONDS:
                self.process.kill()
                raise RuntimeError(f"{' '.join(self.command)} is not ready after {READY_SECONDS} s, or has ended")
            time.sleep(0.1)
        return time.perf_counter() - began

    def is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def __enter__(self) -> Self:
        self.start()
        self.until_ready()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def metric(self, name: str) -> float:
        """A figure of `/metrics`, by its name with labels; 0 where it is not there yet."""
        found = re.search(rf"^{re.escape(name)} (.*)$", httpx2.get(f"{self.url}/metrics", timeout=30).text, re.M)
        return float(found[1]) if found else 0.0

    def processes(self) -> dict[int, str]:
        """The server's process and all that it has started, with their titles."""
        return {process: title for process in descendants(self.process.pid) if (title := title_of(process))}

    def worker(self, model: str) -> int:
        """The process that has a model, by the number of its deployment such as `model-0`."""
        return next(
            process for process, title in self.processes().items() if title.startswith(f"ray::ServeReplica:{model}")
        )

    def memory(self) -> dict[str, int]:
        """Bytes by process and kind: its own, of files, shared. A page that several share counts once."""
        sizes: dict[str, int] = {}
        for process, title in self.processes().items():
            try:
                lines = Path(f"/proc/{process}/smaps_rollup").read_text()
            except OSError:
                continue  # it has ended
            for kind in ("Anon", "File", "Shmem"):
                found = re.search(rf"^Pss_{kind}: *(\d+) kB", lines, re.M)
                name = f"{title}, {kind.lower()}"
                sizes[name] = sizes.get(name, 0) + (int(found[1]) * 1024 if found else 0)
        return sizes

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time by process."""
        seconds: dict[str, float] = {}
        for process, title in self.processes().items():
            try:
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            seconds[title] = seconds.get(title, 0.0) + ticks
        return seconds


def descendants(process: int) -> Iterator[int]:
    """A process, its children and theirs."""
    yield process
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from descendants(int(child))


def title_of(process: int) -> str:
    """The program of a process, or the name that Ray gives it; nothing where it has ended."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return ""
    if words[0].startswith("ray::"):
        return words[0].strip()
    script = next((Path(word).stem for word in words if word.endswith(".py")), None)
    return "openblip serve" if "openblip" in words else script or Path(words[0]).name


# Requests.


class Reply(NamedTuple):
    status: int  # 0: there was none, and the body says why
    headers: httpx2.Headers
    body: Any
    sent: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.sent


def jpeg_files(images: Iterable[Any]) -> list[bytes]:
    files = []
    for image in images:
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=87)
        files.append(encoded.getvalue())
    return files


def fresh_images(files: Sequence[bytes]) -> Callable[[int], list[str]]:
    """Gives so many data URIs of files that no call has given before: these in turn, from the first on."""
    numbers = itertools.count()

    def give(count: int) -> list[str]:
        given = [files[number % len(files)] + b"#%d" % next(numbers) for number in range(count)]
        return ["data:image/jpeg;base64," + base64.b64encode(file).decode() for file in given]

    return give


async def ask(client: httpx2.AsyncClient, path: str, body: Any) -> Reply:
    sent = time.perf_counter()
    try:
        response = await client.post(path, json=body)
    except httpx2.TransportError as error:
        return Reply(0, httpx2.Headers(), repr(error), sent, time.perf_counter())
    return Reply(response.status_code, response.headers, response.json(), sent, time.perf_counter())


def client_of(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=url, timeout=180, limits=httpx2.Limits(max_connections=None))


async def ask_all(url: str, path: str, bodies: Sequence[Any], at_once: int) -> list[Reply]:
    """A reply to each body; so many are under way at a time."""
    free = asyncio.Semaphore(at_once)

    async def one(client: httpx2.AsyncClient, body: Any) -> Reply:
        async with free:
            return await ask(client, path, body)

    async with client_of(url) as client:
        return await asyncio.gather(*(one(client, body) for body in bodies))


async def ask_at_rate(url: str, path: str, bodies: Sequence[Any], rate: float) -> list[Reply]:
    """A reply to each body; so many are sent every second, whatever becomes of those before."""
    start = time.perf_counter()

    async def later(client: httpx2.AsyncClient, number: int, body: Any) -> Reply:
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        return await ask(client, path, body)

    async with client_of(url) as client:
        return await asyncio.gather(*(later(client, number, body) for number, body in enumerate(bodies)))


async def leave_after(seconds: float, url: str, path: str, bodies: Sequence[Any]) -> None:
    """Clients that ask all at once, and go away without waiting for a reply."""
    asking = asyncio.ensure_future(ask_all(url, path, bodies, len(bodies)))
    await asyncio.sleep(seconds)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
