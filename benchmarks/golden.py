"""Golden values: what every command computes on small inputs, so that a rebuild can be shown to change nothing.

Records the losses of 30 steps of every mini recipe, captions, scores, answers, evaluations, the rows of a
CapFilt run, and the tensors of checkpoints in every format; all on one thread, from a fixed seed.

    python benchmarks/golden.py record OLD                        with the old code on the import path
    python benchmarks/golden.py record NEW --inputs OLD/inputs    with the new code, on the data of the old
    python benchmarks/golden.py compare OLD NEW [--tolerance 0]   names every value that differs

Values are compared exactly unless a tolerance is given: bits hold on one machine, not between processors.
tests/test_golden.py records a small part of this and compares it with tests/golden.json, with a tolerance.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = {
    "web": ("captions", "web", 240),
    "human": ("captions", "human", 240),
    "questions": ("questions", "human", 200),
    "statements": ("statements", "human", 160),
    "dialogs": ("dialogs", "human", 120),
    "clips": ("clips", "human", 60),
    "clip-questions": ("clip-questions", "human", 60),
    "documents": ("documents", "web", 400),
    "classes": ("classes", "human", 120),
}
STEPS = 30
MINI, CAPTIONER, FILTER = "openblip-mini", "openblip-mini-captioner", "openblip-mini-filter"


def run_process(words: list[str]) -> None:
    """Run one `openblip` command in a process of its own; its output is shown when it fails."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "openblip", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(f"{time.perf_counter() - started:6.1f} s  openblip {' '.join(words)}", flush=True)
    if done.returncode:
        raise SystemExit(f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


class Recorder:
    """Runs commands in a folder and keeps what they computed.

    run_command: what runs the words of an `openblip` command.
    """

    def __init__(self, out: Path, inputs: Path, run_command: Callable[[list[str]], object] = run_process) -> None:
        self.out, self.inputs, self.run_command = out, inputs, run_command
        self.values: dict[str, Any] = {}

    def run(self, *words: object) -> None:
        """Run one `openblip` command."""
        self.run_command([str(word) for word in words])

    def train(self, recipe: str, *options: object, steps: int = STEPS) -> Path:
        """Record the losses of a short run, to the last digit, and hashes of its final weights."""
        out = self.out / "runs" / recipe
        self.run(
            "train", recipe, "--training.steps", steps, "--training.batch-size", 8, "--training.log-every", 1,
            "--training.num-threads", 1, "--training.dtype", "float32", "--out", out, *options,
        )  # fmt: skip
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        of_speed = ("samples_per_second", "flop_utilisation", "peak_memory_gb", "gflop_per_step")
        self.values[f"train {recipe}"] = [
            {name: value for name, value in line.items() if name not in of_speed} for line in lines
        ]
        self.record_tensors(f"weights {recipe}", out / "model")
        return out / "model"

    def record_tensors(self, name: str, path: Path) -> None:
        """Record a hash of every tensor below a folder, or in a file, by its name."""
        import torch
        from safetensors.torch import load_file

        files = sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
        for file in files:
            if file.suffix == ".safetensors":
                tensors = load_file(file)
            elif file.suffix == ".pth":
                tensors = torch.load(file, weights_only=True)["model"]
            else:
                continue
            where = name if file == path else f"{name} {file.relative_to(path)}"
            self.values[where] = {
                key: hashlib.sha256(
                    f"{tensor.dtype} {tuple(tensor.shape)}".encode()
                    + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                ).hexdigest()[:16]
                for key, tensor in sorted(tensors.items())
            }

    def record_lines(self, name: str, path: Path) -> None:
        """Record the rows of a JSON lines file."""
        self.values[name] = [json.loads(line) for line in path.read_text().splitlines()]

    def record_rows(self, name: str, folder: Path) -> None:
        """Record the rows of the caption files of a CapFilt run."""
        import pyarrow.parquet as pq

        self.values[name] = [
            row for file in sorted((folder / "captions").glob("*.parquet")) for row in pq.read_table(file).to_pylist()
        ]  # fmt: skip

    def make_scenes(self, name: str, count: int | None = None) -> Path:
        """Make the data of one of `KINDS`, and return its folder."""
        kind, split, usual_count = KINDS[name]
        self.run(
            "data", "emoji-scenes", self.inputs / name, "--kind", kind, "--split", split,
            "--num-samples", count or usual_count, "--samples-per-shard", 60, "--seed", 5, "--num-workers", 1,
        )  # fmt: skip
        return self.inputs / name


def record(out: Path, inputs: Path | None) -> None:
    """Record everything into OUT/golden.json."""
    out.mkdir(parents=True)
    recorder = Recorder(out, inputs or out / "inputs")
    data = recorder.inputs
    if inputs is None:
        for name in KINDS:
            recorder.make_scenes(name)
    for name in KINDS:
        files = sorted((data / name).glob("*.tar"))
        recorder.values[f"data {name}"] = [hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files]

    human, both = data / "human", f"{data / 'web'},{data / 'human'}"
    recorder.train("blip-mini", "--data.source", both)
    recorder.train("blip-mini-captioner", "--init", MINI, "--data.source", human)
    recorder.train("blip-mini-filter", "--init", MINI, "--data.source", human)
    vqa = recorder.train("blip-mini-vqa", "--init", MINI, "--data.source", data / "questions")
    nlvr = recorder.train("blip-mini-nlvr", "--init", FILTER, "--data.source", data / "statements")
    visdial = recorder.train("blip-mini-visdial", "--init", MINI, "--data.source", data / "dialogs")
    recorder.train("blip-mini-video-retrieval", "--init", MINI, "--data.source", data / "clips")
    recorder.train("blip-mini-video-qa", "--init", vqa, "--data.source", data / "clip-questions")
    models = {}
    for kind in ("opt", "t5"):
        models[kind] = recorder.train(f"blip2-mini-{kind}", "--data.source", data / "documents")
    stage1 = recorder.train(
        "blip2-mini-stage1", "--data.source", human, "--feature-cache", out / "features"
    )  # fmt: skip
    blip2 = {
        kind: recorder.train(
            f"blip2-mini-stage2-{kind}", "--init", stage1, "--language.source", models[kind], "--data.source", human,
        )
        for kind in models
    }  # fmt: skip

    lines = out / "lines.jsonl"
    for name, options in {
        "caption": ("--model", CAPTIONER),
        "caption greedy": ("--model", CAPTIONER, "--decoding", "greedy"),
        "caption nucleus": ("--model", CAPTIONER, "--decoding", "nucleus", "--num-captions", 2, "--seed", 3),
        "caption blip2 opt": ("--model", blip2["opt"]),
        "caption blip2 t5": ("--model", blip2["t5"], "--decoding", "nucleus", "--seed", 3),
    }.items():
        recorder.run("caption", data / "human/0000.tar", *options, "--out", lines)
        recorder.record_lines(name, lines)
        lines.unlink()
    for name, model in {"match": FILTER, "match blip2": stage1}.items():
        recorder.run("match", data / "web/0000.tar", "--model", model, "--out", lines)
        recorder.record_lines(name, lines)
        lines.unlink()
    for name, model in {"answer": vqa, "answer blip2": blip2["opt"]}.items():
        recorder.run("answer", data / "questions/0000.tar", "--model", model, "--out", lines)
        recorder.record_lines(name, lines)
        lines.unlink()
    for name, captioner, filter_ in (("capfilt", CAPTIONER, FILTER), ("capfilt blip2", blip2["opt"], stage1)):
        folder = out / name.replace(" ", "-")
        recorder.run(
            "capfilt", data / "web", "--captioner", captioner, "--filter", filter_, "--out", folder,
            "--num-captions", 2, "--batch-size", 16,
        )  # fmt: skip
        recorder.record_rows(name, folder)
    for task, model, source in (
        ("caption", CAPTIONER, human),
        ("retrieval", FILTER, human),
        ("filter", FILTER, data / "web"),
        ("classification", MINI, data / "classes"),
        ("vqa", vqa, data / "questions"),
        ("nlvr", nlvr, data / "statements"),
        ("visdial", visdial, data / "dialogs"),
    ):
        file = out / f"{task}.json"
        recorder.run("evaluate", task, "--model", model, "--data", source, "--limit", 60, "--out", file)
        recorder.values[f"evaluate {task}"] = json.loads(file.read_text())
    for name, model, form, target in (
        ("mini to original", MINI, "original", "mini.pth"),
        ("captioner to huggingface", CAPTIONER, "huggingface", "captioner-hf"),
        ("filter to huggingface", FILTER, "huggingface", "filter-hf"),
        ("vqa to huggingface", vqa, "huggingface", "vqa-hf"),
        ("nlvr to original", nlvr, "original", "nlvr.pth"),
        ("opt to huggingface", blip2["opt"], "huggingface", "opt-hf"),
        ("t5 to huggingface", blip2["t5"], "huggingface", "t5-hf"),
        ("stage1 to original", stage1, "original", "stage1.pth"),
        ("opt to openblip", blip2["opt"], "openblip", "opt-native"),
    ):
        recorder.run("convert", model, out / target, "--format", form)
        recorder.record_tensors(f"convert {name}", out / target)
        for file in sorted((out / target).rglob("config.json")) if (out / target).is_dir() else ():
            recorder.values[f"config {name} {file.relative_to(out / target)}"] = json.loads(file.read_text())
    (out / "golden.json").write_text(json.dumps(recorder.values, indent=1) + "\n")


def differences(old: Any, new: Any, place: str, tolerance: float) -> list[str]:
    """Every place at which two recorded values differ by more than the tolerance."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in [*old, *(key for key in new if key not in old)]
            for line in differences(old.get(key), new.get(key), f"{place} > {key}", tolerance)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{place}[{i}]", tolerance)]
    if isinstance(old, float) and isinstance(new, float) and abs(old - new) <= tolerance * max(1.0, abs(old)):
        return []
    return [] if old == new else [f"{place}: {str(old)[:100]} -> {str(new)[:100]}"]


def main() -> int:
    """Exit code 1 when values differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--inputs", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--tolerance", type=float, default=0.0)
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.out.resolve(), arguments.inputs and arguments.inputs.resolve())
        return 0
    folders = (arguments.old.resolve(), arguments.new.resolve())
    old, new = (json.loads((p / "golden.json").read_text().replace(str(p), "OUT")) for p in folders)
    failed = 0
    for name in [*old, *(name for name in new if name not in old)]:
        lines = differences(old.get(name), new.get(name), name, arguments.tolerance)
        failed += bool(lines)
        print(f"{'equal' if not lines else f'{len(lines)} values differ':24} {name}")
        for line in lines[:3]:
            print(f"    {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
