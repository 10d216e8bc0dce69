"""A new decision over 10 million texts takes seconds.

Method: the run of random texts and scores of `benchmarks.report_time`, with a shard for every 5,000 images and a later
score in files of its own. Each decision is made by a process of its own: all shards are judged, what needs all of them
is stored, and then the manifest names the decision. The report page, which the command writes after that, is left out:
`benchmarks.report_time` has it. Reading the kept texts, as a training does, is timed for 100 shards, one after another.

    python -m benchmarks.selection_time [--texts 10000000] [--folder DIR]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, parser, run_child
from benchmarks.report_time import write_run

DECISIONS: dict[str, dict[str, Any]] = {
    "a threshold": {"threshold": 0.6},
    "an expression": {"where": "itm > 0.6 and source = 'synthetic' or clip > 0.3"},
    "words of captions": {"where": "length(caption) > 20 and caption not ilike '%free shipping%'"},
    "the best caption": {"threshold": 0.5, "best_captions": 1},
    "weights": {"weight": "exp(3 * clip)"},
    "at most 10 repeats": {"threshold": 0.5, "max_repeats": 10},
    "texts that say something new": {"threshold": 0.5, "repair": "join"},
}
SECONDS = 60  # of a decision, at most
SHARDS_READ = 100


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--texts", type=int, default=10_000_000)
    options.add_argument("--folder", type=Path, help="where the run is written, and left; a temporary one if not given")
    options.set_defaults(repeats=1)
    run(options.parse_args())


def run(options: argparse.Namespace) -> None:
    report = Report("selection_time", __doc__, options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / f"{options.texts}"
        if not (folder / "run" / "manifest.json").is_file():
            write_run(folder, options.texts)
        for name, arguments in DECISIONS.items():
            child = run_child(decide, str(folder / "run"), arguments)
            shown = f"{name}, {options.texts:,} texts"
            report.add(f"decision by {shown}", child.value["decision"], unit="s", target=SECONDS, at_most=True)
            report.add(f"CPU time of the decision by {shown}", child.value["cpu"], unit="s")
            report.add(f"texts read per second, {shown}", child.value["texts"] / child.value["reading"], unit="1/s")
            report.add(f"peak memory of {shown}", child.peak_bytes / 1e9, unit="GB")
    report.save()


def decide(folder: str, arguments: dict[str, Any]) -> dict[str, float]:
    """What a process that decides tells of it; the page is left out."""
    from unittest.mock import patch

    from openblip.capfilt import selection
    from openblip.capfilt.folder import CapFiltFolder
    from openblip.data.captions import read_kept_pairs

    started, cpu_started = time.perf_counter(), time.process_time()
    with patch.object(selection, "write_report"):
        selection.select(folder, **arguments)
    decided, cpu_seconds = time.perf_counter(), time.process_time() - cpu_started
    run_folder = CapFiltFolder(folder)
    decision, shards = run_folder.decision, run_folder.done_shards()[:SHARDS_READ]
    texts = sum(run_folder.read_report(shard)["counts"]["images"] * 2 for shard in shards)
    for shard in shards:
        read_kept_pairs(folder, shard, decision, ())
    reading = time.perf_counter() - decided
    return {"decision": decided - started, "cpu": cpu_seconds, "reading": reading, "texts": texts}


if __name__ == "__main__":
    main()
