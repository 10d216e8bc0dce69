"""What every benchmark relies on: sides take turns, memory is the child's own, and the page is that of the results."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.all import pages_of_results, with_section, with_tables  # noqa: E402
from benchmarks.harness import Report, alternate, run_child  # noqa: E402
from benchmarks.tables import HEADING, with_table  # noqa: E402


def test_sides_take_turns_in_both_orders() -> None:
    calls: list[str] = []
    seconds = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, warm_up=1)
    assert "".join(calls) == "abbaab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def allocate(num_bytes: int) -> int:
    return len(b"1" * num_bytes)


def test_a_child_is_not_charged_with_the_memory_of_its_parent() -> None:
    ours = bytearray(b"2" * 400_000_000)
    child = run_child(allocate, 100_000_000, env={"PYTHONPATH": f"{ROOT / 'tests'}"})
    assert child.value == 100_000_000
    assert 100e6 < child.peak_bytes < len(ours)


def one_run(folder: Path, value: float) -> None:
    report = Report("speed", "It is fast.", argparse.Namespace(device="cpu", results=folder))
    report.ratio("greedy", peer=[2 * value, 3 * value], ours=[1.0, 1.0], target=4)
    report.save()


def test_the_page_shows_the_last_three_runs_and_keeps_its_text(tmp_path: Path) -> None:
    for value in (100, 1, 2, 3):
        one_run(tmp_path, value)
    results = {"speed": json.loads((tmp_path / "speed.json").read_text())}
    page = with_tables("# Page\n\n<!-- figures: speed -->\n| old |\n\nWhy.\n", results)
    assert page.startswith("# Page\n\n<!-- figures: speed -->\n| figure |")
    assert "| greedy | >= 4 | 5 x | 2.5 (2 to 3); 5 (4 to 6); 7.5 (6 to 9) |" in page
    assert page.endswith("\n\nWhy.\n")
    assert "old" not in page
    assert with_tables(page, results) == page
    added = with_tables(with_section("# Page\n", "speed", results["speed"]["claim"]), results)
    assert "## speed\n\nIt is fast.\n\n<!-- figures: speed -->\n| figure |" in added
    assert with_tables(added, results) == added


def test_the_pages_are_those_of_the_results() -> None:
    written = pages_of_results()
    assert {page: page.read_text() for page in written} == written, "run python -m benchmarks.all"


def test_a_table_of_ablate_is_written_anew_and_what_is_written_by_hand_stays() -> None:
    page = f"# Results\n\n{HEADING}\n\nHow.\n\n## Search\n\nx\n"
    page = with_table(page, "b", "### B\n").replace("<!-- end of b -->\n", "<!-- end of b -->\nBy hand.\n")
    page = with_table(with_table(page, "c", "### C\n"), "b", "### B, anew\n\n| |\n")
    parts = ["How.", "### B, anew\n\n| |", "<!-- end of b -->\nBy hand.", "### C", "## Search"]
    assert [page.index(part) for part in parts] == sorted(page.index(part) for part in parts)
    assert "### B\n" not in page
