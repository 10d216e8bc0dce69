"""Losses of a run on one process against two that divide its language model (FSDP2): a table in Markdown.

    python benchmarks/sharded_losses.py RECIPE [the options of `openblip train`]

The joint batch is the recipe's in both runs, 64 samples by default; all in float32. CPUs serve (gloo).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

BATCH_SIZE = 64
TRAIN = ["-m", "openblip", "train"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def main() -> None:
    options = [*sys.argv[1:], "--training.dtype", "float32", "--training.log-every", "1"]
    with tempfile.TemporaryDirectory() as name:
        one = losses(TRAIN, [*options, "--training.batch-size", str(BATCH_SIZE)], Path(name) / "one")
        halves = [*options, "--training.batch-size", str(BATCH_SIZE // 2), "--training.shard-frozen"]
        two = losses([*TWO, *TRAIN], halves, Path(name) / "two")
    print("| step | one process | two, divided | difference |\n|---|---|---|---|")
    for step, (alone, divided) in enumerate(zip(one, two, strict=True), start=1):
        if step in (1, 2, 5) or step % 10 == 0:
            print(f"| {step} | {alone:.6f} | {divided:.6f} | {abs(alone - divided):.1e} |")
    largest = max(abs(alone - divided) for alone, divided in zip(one, two, strict=True))
    print(f"\nlargest difference over {len(one)} steps: {largest:.1e}")


def losses(program: list[str], options: list[str], out: Path) -> list[float]:
    """The loss of every step of a run, which is trained to its end."""
    subprocess.run([sys.executable, *program, *options, "--out", str(out)], check=True, capture_output=True)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
