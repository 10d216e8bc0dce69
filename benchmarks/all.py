"""Writes the tables of docs/benchmarks.md and docs/results.md from benchmarks/results: `python -m benchmarks.all`.

The pages are written by hand but for these tables. A line `<!-- figures: NAME -->` stands above the table of
benchmarks/results/NAME.json, which is written anew; results that have no such line on either page get a section at the
end of docs/benchmarks.md. A figure is the median of the last three runs; each run is a median itself, over its rounds.

    python -m benchmarks.all [--run NAME ...]

--run measures first: every benchmark of RUNS, or those that are named.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, Figure, machine_text

PAGES = (ROOT / "docs" / "results.md", ROOT / "docs" / "benchmarks.md")
RUNS = {
    "captions-greedy": ["benchmarks.captions", "greedy"],
    "captions-beam": ["benchmarks.captions", "beam"],
    "captions-nucleus": ["benchmarks.captions", "nucleus"],
    "exported-onnx": ["benchmarks.exported", "--format", "onnx"],
    "first-minutes": ["benchmarks.first_minutes", "--repeats", "1"],
    "matching": ["benchmarks.matching"],
    "encoding": ["benchmarks.encoding"],
    "memory": ["benchmarks.memory"],
    "start-up": ["benchmarks.start_up"],
    "command_line-caption-640x480": ["benchmarks.command_line", "caption", "640x480", "--jpeg", "scaled"],
    "command_line-caption-4032x3024": ["benchmarks.command_line", "caption", "4032x3024"],
    "command_line-capfilt-640x480": ["benchmarks.command_line", "capfilt", "640x480", "--jpeg", "scaled"],
    "command_line-capfilt-4032x3024": ["benchmarks.command_line", "capfilt", "4032x3024"],
    "command_line-index-640x480": ["benchmarks.command_line", "index", "640x480", "--jpeg", "scaled"],
    "training_step": ["benchmarks.training_step"],
    "openvino": ["benchmarks.openvino_pipeline"],
    "quality": ["benchmarks.quality"],
    "capfilt-cost-simulation": ["benchmarks.capfilt_cost", "simulation"],
    "capfilt-cost-workers": ["benchmarks.capfilt_cost", "workers"],
    "capfilt-cost-rate": ["benchmarks.capfilt_cost", "rate"],
    "report_time": ["benchmarks.report_time"],
    "score_time": ["benchmarks.score_time"],
    "selection_time": ["benchmarks.selection_time"],
    "search_recall": ["benchmarks.search_recall"],
    "search_memory": ["benchmarks.search_memory"],
    "serve_load": ["benchmarks.serve_load"],
    "serve_faults": ["benchmarks.serve_faults"],
    "capfilt_rivals": ["benchmarks.capfilt_rivals", "--captions", "1", "--images", "16", "--repeats", "1"],
    "blip2-opt-greedy": ["benchmarks.blip2_decoding", "opt", "greedy"],
    "blip2-t5-greedy": ["benchmarks.blip2_decoding", "t5", "greedy"],
    "blip2-opt-beam": ["benchmarks.blip2_decoding", "opt", "beam"],
    "blip2-opt-nucleus": ["benchmarks.blip2_decoding", "opt", "nucleus"],
    "blip2-opt-ranking": ["benchmarks.blip2_decoding", "opt", "ranking"],
    "training_memory": ["benchmarks.training_step", "--part", "memory"],
}
MARK = re.compile(r"<!-- figures: (?P<name>[\w.-]+) -->\n(?:\|.*\n|\*Measured.*\n|\n(?=\||\*Measured))*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", choices=list(RUNS), help="benchmarks to measure first; none named: all")
    parser.add_argument("--check", action="store_true", help="only say whether the pages are those of the results")
    options = parser.parse_args()
    for name in [] if options.run is None else options.run or RUNS:
        subprocess.run([sys.executable, "-m", *RUNS[name]], check=True, cwd=ROOT)
    written = pages_of_results()
    if options.check:
        old = [page for page in PAGES if written[page] != page.read_text()]
        raise SystemExit(f"{old[0]} is not that of {RESULTS}: python -m benchmarks.all" if old else 0)
    for page, text in written.items():
        page.write_text(text)


def pages_of_results() -> dict[Path, str]:
    """The pages as they are with the tables of all results; those that none mentions are at the end of the last."""
    results = {path.name.removesuffix(".json"): json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    texts = {page: page.read_text() for page in PAGES}
    mentioned = {match["name"] for text in texts.values() for match in MARK.finditer(text)}
    for name in results.keys() - mentioned:
        texts[PAGES[-1]] = with_section(texts[PAGES[-1]], name, results[name]["claim"])
    return {page: with_tables(text, results) for page, text in texts.items()}


def with_section(page: str, name: str, claim: str) -> str:
    """The page with a section for a result at its end."""
    claim = claim.partition("\n    python")[0].strip()
    return f"{page.rstrip()}\n\n## {name}\n\n{claim}\n\n<!-- figures: {name} -->\n"


def with_tables(page: str, results: Mapping[str, Any]) -> str:
    """The page with the tables of these results."""
    return MARK.sub(lambda m: f"{m[0].splitlines()[0]}\n{table(results.get(m['name']))}", page)


def table(result: dict[str, Any] | None) -> str:
    """The figures of a benchmark's runs, or nothing where it was never run."""
    if result is None:
        return ""
    runs: list[dict[str, Any]] = result["runs"]
    rows: dict[str, list[Figure]] = {}
    for run in runs:
        for fields in run["figures"]:
            rows.setdefault(fields["name"], []).append(Figure(**fields))
    lines = [
        "| figure | target | median of the runs | each run (its slowest to its fastest round) |",
        "|---|---|---|---|",
    ]
    for name, figures in rows.items():
        last = figures[-1]
        middle = statistics.median(figure.value for figure in figures)
        value = f"{number(middle)} {last.unit}".strip()
        if last.target is not None:
            is_met = middle <= last.target if last.at_most else middle >= last.target
            value = value if is_met else f"**{value}** (missed)"
        bound = "" if last.target is None else f"{'<=' if last.at_most else '>='} {last.target:g}"
        each = "; ".join(
            number(f.value) if f.low == f.high else f"{number(f.value)} ({number(f.low)} to {number(f.high)})"
            for f in figures
        )
        lines.append(f"| {name} | {bound} | {value} | {each} |")
    loads = ", ".join(f"{run['machine']['load'][0]:.1f}" for run in runs)
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    dates = ", ".join(dict.fromkeys(run["date"][:10] for run in runs))
    last_run = runs[-1]["machine"]
    measured = f"*Measured {dates} at {commits}: {machine_text(last_run)}; load before each run {loads}.*"
    return "\n".join([*lines, "", measured, ""])


def number(value: float) -> str:
    return f"{value:.3g}"


if __name__ == "__main__":
    main()
