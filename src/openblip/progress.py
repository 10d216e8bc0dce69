"""Shows how far long work is, on standard error: a bar on a terminal, plain lines elsewhere.

with Progress("captioning", total=1000, unit="images") as bar:
    for batch in batches:
        ...
        bar.advance(len(batch))
"""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress:
    """A progress display with rate and time left; a context manager.

    Args:
        label: what is being done, e.g. "captioning".
        total: how many units there are; None when nobody knows. May be set later, as `bar.total`.
        unit: the name of a unit, plural.
        done: units an earlier run has done already; they count as done, not towards the rate.
        visible: False shows no progress, e.g. on ranks other than 0; notes are printed all the same.
        stream: where to write; standard error when None.
        interval: seconds between two plain lines.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int | None = None,
        unit: str = "items",
        done: int = 0,
        visible: bool = True,
        stream: TextIO | None = None,
        interval: float = 5.0,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = done
        self._first = done
        self._total_is_estimate = False
        self._visible = visible
        self._stream = stream if stream is not None else sys.stderr
        self._interval = interval
        self._status = ""
        self._started = self._last_line = time.monotonic()
        self._printed = -1
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        if self._visible and self._stream.isatty():
            self._open_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._total_is_estimate and kind is None:
            self.total = self.done
        if self._bar is not None:
            if self._task is not None:
                self._bar.update(self._task, total=self.total)
            self._bar.stop()
            self._bar = None
        elif self._visible and (self.done != self._printed or self._total_is_estimate):
            self._print_line()

    def advance(self, count: int = 1, status: str | None = None) -> None:
        """Adds `count` finished units; `status` is a short text beside the numbers, e.g. "loss 2.31"."""
        self.done += count
        if status is not None:
            self._status = status
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, total=self.total, completed=self.done, rate=self._rate_text(), status=self._status
            )
        elif self._visible and time.monotonic() - self._last_line >= self._interval:
            self._print_line()

    def estimate_total(self, parts_done: int, num_parts: int) -> None:
        """Estimate the total, which nobody knows, from how many of `num_parts` like parts are done."""
        if 0 < parts_done < num_parts:
            self._total_is_estimate = True
            self.total = max(self.done * num_parts // parts_done, self.done + 1)
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, total=self.total)

    def note(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    @property
    def rate(self) -> float:
        """Units per second since the start of this run."""
        return (self.done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def _rate_text(self) -> str:
        digits = 0 if self.rate >= 100 else 1 if self.rate >= 1 else 2
        return f"{self.rate:,.{digits}f} {self.unit}/s"

    def _print_line(self) -> None:
        parts = [f"{self.done:,} {self.unit}", self._rate_text()]
        if self.total:
            parts[0] = f"{self.done:,}/{self.total:,} {self.unit} ({100 * self.done / self.total:.0f}%)"
            if self.done < self.total and self.rate > 0:
                parts.append(f"{_clock((self.total - self.done) / self.rate)} left")
        if self._status:
            parts.append(self._status)
        print(f"{self.label}: {', '.join(parts)}", file=self._stream, flush=True)
        self._last_line, self._printed = time.monotonic(), self.done

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[status]}", markup=False),
            console=Console(file=self._stream),
        )
        self._bar.start()
        self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, rate="", status=self._status)


def _clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
