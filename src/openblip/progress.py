"""Shows how far long work is, on standard error: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from datetime import timedelta
from typing import Self


class Progress:
    """A progress display with rate and time left; a context manager.

    label: what is being done, e.g. "captioning". total: how many units there are; None when nobody knows. It may be set
    later, as `bar.total`. unit: the name of a unit, plural. done: units an earlier run has done already; they count as
    done, not towards the rate. visible: False shows no progress, e.g. on ranks other than 0, but prints notes.
    """

    interval = 5.0  # seconds between two plain lines

    def __init__(
        self, label: str, *, total: int | None = None, unit: str = "items", done: int = 0, visible: bool = True
    ) -> None:
        from rich import console, progress

        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.status = ""
        self._first, self._printed, self._total_is_estimate = done, -1, False
        self._stream = sys.stderr
        self._prints_lines = visible and not self._stream.isatty()
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            progress.TextColumn("{task.fields[status]}", markup=False),
            console=console.Console(file=self._stream),
            disable=self._prints_lines or not visible,
        )
        self._task = self._bar.add_task(label, total=total, completed=done, rate="", status="")

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._total_is_estimate and kind is None:
            self.total = self.done
        self._bar.update(self._task, total=self.total)
        self._bar.stop()
        if self._prints_lines and (self.done != self._printed or self._total_is_estimate):
            self._print_line()

    def advance(self, count: int = 1) -> None:
        self.done += count
        self._bar.update(self._task, total=self.total, completed=self.done, rate=self._rate_text())
        if self._prints_lines and time.monotonic() - self._last_line >= self.interval:
            self._print_line()

    def show(self, status: str) -> None:
        """Show a few words on what has come out so far, behind the time left, until others replace them."""
        self.status = status
        self._bar.update(self._task, status=status)

    def estimate_total(self, parts_done: int, num_parts: int) -> None:
        """Estimate the total, which nobody knows, from how many of `num_parts` like parts are done."""
        if 0 < parts_done < num_parts:
            self._total_is_estimate = True
            self.total = max(self.done * num_parts // parts_done, self.done + 1)
            self._bar.update(self._task, total=self.total)

    def note(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        if self._bar.disable:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    @property
    def rate(self) -> float:
        """Units per second since the start of this run."""
        return (self.done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def _rate_text(self) -> str:
        """Per second, or per hour where that is less than 0.1; "" where nothing has been done yet."""
        if self.rate <= 0:
            return ""
        rate, time_unit = (self.rate, "s") if self.rate >= 0.1 else (3600 * self.rate, "h")
        digits = 0 if rate >= 100 else 1 if rate >= 1 else 2
        return f"{rate:,.{digits}f} {self.unit}/{time_unit}"

    def _print_line(self) -> None:
        parts = [f"{self.done:,} {self.unit}", self._rate_text()]
        if self.total:
            parts[0] = f"{self.done:,}/{self.total:,} {self.unit} ({100 * self.done / self.total:.0f}%)"
            if self.done < self.total and self.rate > 0:
                parts.append(f"{timedelta(seconds=round((self.total - self.done) / self.rate))} left")
        parts.append(self.status)
        print(f"{self.label}: {', '.join(filter(None, parts))}", file=self._stream, flush=True)
        self._last_line, self._printed = time.monotonic(), self.done
