"""The progress display: plain lines off a terminal, a bar on one."""

import io
from contextlib import redirect_stderr

import pytest

from openblip.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _print_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "interval", 0.0)


def test_plain_lines_carry_share_rate_and_time_left() -> None:
    with redirect_stderr(io.StringIO()) as stream, Progress("captioning", total=4, unit="images") as bar:
        bar.advance(1)
        bar.advance(3)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("captioning: 1/4 images (25%), ")
    assert "images/s" in first
    assert first.endswith("left")
    assert last.startswith("captioning: 4/4 images (100%)")
    assert "left" not in last


def test_lines_wait_for_the_interval_and_the_last_one_always_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "interval", 3600)
    with redirect_stderr(io.StringIO()) as stream, Progress("reading", unit="shards") as bar:
        for _ in range(100):
            bar.advance()
    assert len(stream.getvalue().splitlines()) == 1
    assert stream.getvalue().startswith("reading: 100 shards, ")


def test_work_of_an_earlier_run_counts_as_done_but_not_towards_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("openblip.progress.time.monotonic", lambda: now[0])
    with Progress("training", total=100, unit="samples", done=90, visible=False) as bar:
        now[0] += 2.0
        bar.advance(4)
        assert bar.done == 94
        assert bar.rate == pytest.approx(2.0)


def test_slow_work_has_a_rate_per_hour_and_work_that_was_done_before_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("openblip.progress.time.monotonic", lambda: now[0])
    with redirect_stderr(io.StringIO()) as stream, Progress("ablate", total=30, unit="jobs", done=10) as bar:
        bar.advance(0)
        now[0] += 600.0
        bar.advance(5)
        now[0] += 3000.0
        bar.advance(15)
    assert stream.getvalue().splitlines() == [
        "ablate: 10/30 jobs (33%)",
        "ablate: 15/30 jobs (50%), 30.0 jobs/h, 0:30:00 left",
        "ablate: 30/30 jobs (100%), 20.0 jobs/h",
    ]


def test_a_terminal_gets_a_bar_and_notes_stay() -> None:
    with redirect_stderr(Terminal()) as stream, Progress("captioning", total=2, unit="images") as bar:
        bar.advance(1)
        bar.note("skipped a[1].jpg: broken")
        bar.advance(1)
    assert "skipped a[1].jpg: broken" in stream.getvalue()
    assert "2/2" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_status_stands_behind_the_rate(stream: io.StringIO) -> None:
    with redirect_stderr(stream), Progress("capfilt", total=4, unit="images") as bar:
        bar.advance(2)
        bar.show("kept [web] 40%")
        bar.advance(2)
    shown = stream.getvalue()
    assert "kept [web] 40%" in shown
    if not stream.isatty():
        first, last = shown.splitlines()
        assert "kept" not in first
        assert last.endswith("images/s, kept [web] 40%")


def test_an_invisible_one_prints_only_notes() -> None:
    with redirect_stderr(io.StringIO()) as stream, Progress("captioning", total=2, visible=False) as bar:
        bar.advance(1)
        bar.note("skipped a.jpg")
    assert stream.getvalue() == "skipped a.jpg\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_an_unknown_total_is_estimated_from_the_parts_that_are_done(stream: io.StringIO) -> None:
    with redirect_stderr(stream), Progress("reading", unit="samples") as bar:
        bar.advance(30)
        bar.estimate_total(0, 4)
        assert bar.total is None
        bar.advance(20)
        bar.estimate_total(2, 4)
        assert bar.total == 100
        bar.advance(1)
    if not stream.isatty():
        *_, estimated, last = stream.getvalue().splitlines()
        assert "51/100 samples (51%)" in estimated
        assert "51/51 samples (100%)" in last
