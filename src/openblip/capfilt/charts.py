"""Charts of the report page as the numbers of an SVG image, which `page.html` draws.

All charts have one frame, so that those side by side are read alike. K bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LEFT, TOP, WIDTH, HEIGHT = 52, 16, 400, 160  # of the area that data is drawn in
RIGHT, BOTTOM = LEFT + WIDTH, TOP + HEIGHT
NUM_LEVELS = 6  # shades of a density

Values = NDArray[np.float64]


class Tick(NamedTuple):
    """A number at an axis, and where."""

    at: float
    text: str


class Bar(NamedTuple):
    """The texts of a bin, those that are kept below those that are not: from top to bottom `top`, `middle`, BOTTOM."""

    x: float
    width: float
    top: float
    middle: float
    title: str


class Curve(NamedTuple):
    """A curve; `style` is its class on the page, `name` its entry in the legend."""

    name: str
    style: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn in a frame. `label` says to those who cannot see it what is shown."""

    title: str
    detail: str = ""
    label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    bars: Sequence[Bar] = ()
    lines: Sequence[Curve] = ()
    cells: Sequence[str] = ()  # a path for each shade, from the lightest
    marks: Sequence[Tick] = ()  # dashed lines from top to bottom
    points: Sequence[tuple[float, float, str]] = ()  # with their entry in the legend


def at_x(value: Any, low: float = 0.0, high: float = 1.0) -> Any:
    """Where values stand from left to right, kept inside the frame."""
    return LEFT + WIDTH * np.clip((np.asarray(value) - low) / (high - low), 0, 1)


def at_y(value: Any, low: float = 0.0, high: float = 1.0) -> Any:
    """Where values stand from bottom to top, kept inside the frame."""
    return BOTTOM - HEIGHT * np.clip((np.asarray(value) - low) / (high - low), 0, 1)


def ticks_of(low: float, high: float, at: Any) -> list[Tick]:
    """Round numbers at equal distances within an axis, from three to six; `at` is `at_x` or `at_y`."""
    step = 10.0 ** np.floor(np.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) < 6)
    numbers = np.arange(np.ceil(low / step - 1e-6), np.floor(high / step + 1e-6) + 1) * step
    return [Tick(float(at(number, low, high)), f"{number + 0.0:.4g}") for number in numbers]


def share_ticks(highest: float = 1.0) -> list[Tick]:
    """Shares at the left axis: none, and the highest; the quarters between where that is all."""
    shares = np.linspace(0, 1, 5) if highest == 1 else (0.0, highest)
    return [Tick(float(at_y(share, 0, highest)), f"{100 * share:.3g}%") for share in shares]


def line_path(xs: Any, ys: Any) -> str:
    """A line through points in the coordinates of the image."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(np.asarray(xs), np.asarray(ys), strict=True))


def histogram(
    title: str,
    texts: NDArray[np.int64],
    kept: NDArray[np.int64],
    low: float,
    high: float,
    *,
    name: str,
    mark: Tick | None,
) -> Chart:
    """Counts (K,) of texts in equal bins from `low` to `high`, divided into those kept and those not."""
    total, tallest = max(int(texts.sum()), 1), max(int(texts.max(initial=0)), 1)
    step = WIDTH / len(texts)
    bars = []
    for number in np.flatnonzero(texts):
        first = low + (high - low) * number / len(texts)
        last = low + (high - low) * (number + 1) / len(texts)
        tops = [BOTTOM - max(HEIGHT * count / tallest, 1.0) for count in (texts[number], kept[number])]
        words = f"{first + 0.0:.4g} to {last + 0.0:.4g}: {texts[number]:,} texts, {kept[number]:,} kept"
        bars.append(Bar(LEFT + number * step + 0.6, step - 1.2, tops[0], tops[1] if kept[number] else BOTTOM, words))
    count = int(texts.sum())
    return Chart(
        title=title,
        detail=f"{count:,} text{'s' if count != 1 else ''} by {name}",
        label=f"{title}: {count:,} texts by {name}, of which {int(kept.sum()):,} are kept",
        x_ticks=ticks_of(low, high, at_x),
        y_ticks=share_ticks(tallest / total),
        bars=bars,
        marks=[mark] if mark else [],
    )


def density(counts: NDArray[np.int64]) -> list[str]:
    """Counts (K, K) as squares: a path for each shade, which grows with the logarithm of the count."""
    columns, rows = counts.shape
    width, height = WIDTH / columns, HEIGHT / rows
    levels = np.ceil(NUM_LEVELS * np.log1p(counts) / np.log1p(max(int(counts.max(initial=0)), 1))).astype(int)
    paths = []
    for level in range(1, NUM_LEVELS + 1):
        squares = (
            f"M{LEFT + column * width:.0f} {BOTTOM - (row + 1) * height:.0f}h{width:.0f}v{height:.0f}h-{width:.0f}z"
            for column, row in np.argwhere(levels == level)
        )
        paths.append("".join(squares))
    return paths
