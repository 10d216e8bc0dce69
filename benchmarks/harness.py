"""What the benchmarks share: alternating timings, measured ceilings, child processes, a table and a JSON file.

A benchmark is a script like this one (the docstring says what is claimed, beside which peer, and how it is measured):

    def main() -> None:
        options = parser(__doc__).parse_args()
        report = Report("decoding", __doc__, options)
        times = alternate({"transformers": theirs, "openblip": ours}, options.repeats)
        report.timings("greedy, 8 images", times)
        report.ratio("greedy, bfloat16", times["transformers"], times["openblip"], target=2.2)
        report.save()

`save` prints the tables and adds the run to benchmarks/results/NAME.json, which keeps the last three runs on one kind
of machine; `python -m benchmarks.all` writes the tables of docs/benchmarks.md and docs/results.md.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEPT_RUNS = 3


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark; a benchmark adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    return parser


# Time.


def alternate(sides: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every call of each side. The sides take turns, in reversed order in every other round.

    What happens to the machine meanwhile so happens to all sides. CUDA is waited for before and after each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + repeats):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            elapsed = timed(sides[name])
            if number >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, CUDA's work included."""
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


# Ceilings, which a figure is a share of.


def matmul_ceiling(dtype: Any, device: str = "cpu", size: int | None = None, repeats: int = 5) -> float:
    """FLOP/s of the fastest of some products of two square matrices, in this process and with its threads."""
    import torch

    size = size or (4096 if device == "cpu" else 8192)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timed(lambda: left @ right)
    return 2 * size**3 / min(timed(lambda: left @ right) for _ in range(repeats))


def copy_ceiling(device: str = "cpu", num_bytes: int = 1 << 29, repeats: int = 5) -> float:
    """Bytes read per second by the fastest of some copies of a large tensor (as many are written)."""
    import torch

    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed(lambda: target.copy_(source))
    return num_bytes / min(timed(lambda: target.copy_(source)) for _ in range(repeats))


# Child processes: what a user's process costs, imports and loading included.


@dataclass(frozen=True)
class Child:
    """A process that has ended."""

    value: Any  # what the function returned, or the standard output of a command
    seconds: float  # wall time
    cpu_seconds: float  # user and system, of its own children too
    peak_bytes: int  # the largest resident memory of it, or of one of its children


LAUNCHER = """
import json, os, sys, time
started = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - started
cpu_seconds = usage.ru_utime + usage.ru_stime
with open(sys.argv[1], "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), seconds, cpu_seconds, usage.ru_maxrss * 1024], file)
"""


def run_command(command: Sequence[str], env: Mapping[str, str] | None = None) -> Child:
    """Run a program to its end; CalledProcessError, with what it printed, when that is not a good one.

    A small process starts it: Linux counts the memory of the starting process as the started one's.
    """
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as answer:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", LAUNCHER, f"/dev/fd/{write_end}", *command],
                env={**os.environ, **(env or {})}, cwd=ROOT, pass_fds=[write_end],
                capture_output=True, text=True,
            )  # fmt: skip
        finally:
            os.close(write_end)
        text = answer.read()
    if not text:
        raise RuntimeError(f"{' '.join(command)} did not start:\n{done.stderr}")
    code, seconds, cpu_seconds, peak_bytes = json.loads(text)
    if code:
        sys.stderr.write(done.stderr)
        raise subprocess.CalledProcessError(code, list(command), done.stdout, done.stderr)
    return Child(done.stdout, seconds, cpu_seconds, peak_bytes)


def run_child(function: Callable[..., Any], *arguments: Any, env: Mapping[str, str] | None = None) -> Child:
    """Call a module's function in a new process; its arguments and its result are of JSON's types."""
    module = function.__module__
    if module == "__main__":
        spec = sys.modules["__main__"].__spec__
        assert spec is not None, "run it as python -m benchmarks.NAME"
        module = spec.name
    call = [sys.executable, "-m", "benchmarks.harness", module, function.__name__, json.dumps(arguments)]
    child = run_command(call, env)
    return Child(json.loads(child.value.splitlines()[-1]), child.seconds, child.cpu_seconds, child.peak_bytes)


# Results.


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where and with what a run is measured, and how busy the machine is just now."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    processor = next((line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")), "")
    flags = set(next((line.partition(": ")[2] for line in info.splitlines() if line.startswith("flags")), "").split())
    features = [flag for flag in ("amx_tile", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx2") if flag in flags]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    name = processor or platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"{name} ({', '.join(features)})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": [round(load, 2) for load in os.getloadavg()],
    }


@dataclass(frozen=True)
class Figure:
    """One number that is claimed: a ratio to a peer, a share of a ceiling, or memory."""

    name: str
    value: float
    low: float
    high: float
    unit: str = "x"
    target: float | None = None
    at_most: bool = False  # the target is an upper bound
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass
class Report:
    """The run of one benchmark.

    name: of the JSON file; on a GPU ".cuda" is added.
    claim: the script's docstring.
    """

    name: str
    claim: str | None
    options: argparse.Namespace
    figures: list[Figure] = field(default_factory=list)
    tables: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # what else is worth keeping: peers' versions, sizes, profiles

    def __post_init__(self) -> None:
        self.before = machine(self.options.device)

    def timings(self, title: str, seconds: Mapping[str, list[float]]) -> None:
        """Keep and print the seconds of every side."""
        self.tables[title] = {name: list(values) for name, values in seconds.items()}
        print(f"\n{title}\n| side | median | fastest to slowest |\n|---|---|---|")
        for name, values in seconds.items():
            print(f"| {name} | {seconds_text(statistics.median(values))} | {spread_text(values)} |", flush=True)

    def ratio(self, name: str, peer: Sequence[float], ours: Sequence[float], **settings: Any) -> None:
        """How many times as fast as the peer: the median over the rounds, since a round's two sides are neighbours."""
        ratios = [theirs / own for theirs, own in zip(peer, ours, strict=True)]
        self.add(name, statistics.median(ratios), min(ratios), max(ratios), **settings)

    def add(
        self, name: str, value: float, low: float | None = None, high: float | None = None, **settings: Any
    ) -> None:
        """Keep and print a figure; `settings` are further fields of `Figure`."""
        figure = Figure(name, value, value if low is None else low, value if high is None else high, **settings)
        self.figures.append(figure)
        print(f"\n{name}: {figure_text(figure)}", flush=True)

    def save(self) -> Path:
        """Add this run to its file, of which the last three on this kind of machine stay."""
        after = machine(self.options.device)
        print(f"\n{machine_text(self.before)}; load {self.before['load'][0]} before and {after['load'][0]} after")
        run = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": {**self.before, "load_after": after["load"]},
            "options": {
                name: value.name if isinstance(value, Path) else str(value)  # without the folders above it
                for name, value in vars(self.options).items()
                if name != "results"
            },
            "figures": [asdict(figure) for figure in self.figures],
            "seconds": self.tables,
            "facts": self.facts,
        }
        suffix = ".cuda.json" if self.options.device.startswith("cuda") else ".json"
        path = Path(self.options.results) / f"{self.name}{suffix}"
        earlier = json.loads(path.read_text())["runs"] if path.exists() else []
        alike = [old for old in earlier if old["machine"]["device"] == run["machine"]["device"]]
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"name": self.name, "claim": (self.claim or "").strip(), "runs": [*alike, run][-KEPT_RUNS:]}
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def commit() -> str:
    """Of the code that is measured; "+" when files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if changed.stdout else "")


def machine_text(of: Mapping[str, Any]) -> str:
    return (
        f"{of['cores']} cores, {of['threads']} threads, {of['device']}, {of['memory_gib']} GiB; "
        f"Python {of['python']}, torch {of['torch']}"
    )


def seconds_text(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def spread_text(seconds: Sequence[float]) -> str:
    return f"{seconds_text(min(seconds))} to {seconds_text(max(seconds))}"


def figure_text(figure: Figure) -> str:
    """The value, its spread, and whether it meets its target."""
    text = f"{figure.value:.3g} {figure.unit}"
    if figure.low != figure.high:
        text += f" ({figure.low:.3g} to {figure.high:.3g})"
    if figure.target is not None:
        bound = "at most" if figure.at_most else "at least"
        text += f", target {bound} {figure.target:g}: {'met' if figure.is_met else 'MISSED'}"
    return text


if __name__ == "__main__":
    module_name, function_name, arguments_json = sys.argv[1:]
    result = getattr(importlib.import_module(module_name), function_name)(*json.loads(arguments_json))
    print("\n" + json.dumps(result))
