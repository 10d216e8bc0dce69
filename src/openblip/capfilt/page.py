"""The report page as HTML: one file, nothing loaded from elsewhere, no script.

Every text that comes from data passes `escape`; a Content-Security-Policy forbids scripts in addition.
"""

import html
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from openblip.capfilt.gallery import Gallery, ShownImage, ShownText
from openblip.capfilt.scores import COMBINATIONS, NUM_BINS, SOURCES, RunScores, SourceScores

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
NOTHING = "\N{EN DASH}"
NAMES = {"web": "Web", "synthetic": "Synthetic"}
SYMBOLS = {"web": "T<sub>w</sub>", "synthetic": "T<sub>s</sub>"}
TITLES = {
    (False, True): "Web text rejected, synthetic accepted",
    (True, True): "Both accepted",
    (True, False): "Web text accepted, synthetic rejected",
    (False, False): "Both rejected",
}


@dataclass(frozen=True)
class Section:
    """A part of the page. `body` is HTML as it stands: escape what comes from data."""

    title: str
    body: str


def escape(text: object) -> str:
    """Any text as inert HTML: markup escaped, control characters made visible, direction overrides kept
    inside."""
    shown = "".join("\ufffd" if unicodedata.category(char) in {"Cc", "Cs"} else char for char in str(text))
    return f"<bdi>{html.escape(shown)}</bdi>"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """An HTML table; every cell is escaped. `numbers` are the columns set to the right."""

    def cells(tag: str, values: Sequence[object]) -> str:
        right = [' class="number"' if column in numbers else "" for column in range(len(values))]
        return "".join(
            f"<{tag}{style}>{escape(value)}</{tag}>" for style, value in zip(right, values, strict=True)
        )

    head = f"<thead><tr>{cells('th', headers)}</tr></thead>" if headers else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers: (name, value, remark) each."""
    items = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt>'
        f"<dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in entries
    )
    return f'<dl class="tiles">{items}</dl>'


def render(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """The whole page. `lead` is HTML, the other texts are escaped."""
    css = files("openblip.capfilt").joinpath("page.css").read_text("utf-8")
    body = "".join(
        f"<section><h2>{escape(section.title)}</h2>{section.body}</section>\n" for section in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1>{lead}</header>\n{body}<footer>{escape(footer)}</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def share(part: int, whole: int) -> str:
    """A percentage, or a dash of nothing."""
    return f"{100 * part / whole:.1f}%" if whole else NOTHING


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2,000 shards`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def keep_rates(scores: RunScores) -> str:
    """A bar by source: how many of its texts are kept."""
    rows = []
    for name in SOURCES:
        found = scores.sources[name]
        width = 100 * found.kept / found.texts if found.texts else 0.0
        rows.append(
            f'<div class="rate"><b>{NAMES[name]}</b>'
            f'<div class="bar"><span style="width:{width:.2f}%"></span></div>'
            f"<span>{share(found.kept, found.texts)} "
            f'<span class="quiet">· {found.kept:,} of {found.texts:,}</span></span></div>'
        )
    return "".join(rows)


def histograms(scores: RunScores, threshold: float) -> str:
    """The spread of ITM probabilities, a panel by source on one common scale."""
    shares = [
        found.histogram / found.texts for found in (scores.sources[name] for name in SOURCES) if found.texts
    ]
    tallest = max((float(values.max()) for values in shares), default=1.0)
    panels = "".join(_histogram(name, scores.sources[name], threshold, tallest) for name in SOURCES)
    return f'<div class="panels">{panels}</div>'


def _histogram(name: str, scores: SourceScores, threshold: float, tallest: float) -> str:
    width, height, left, top = 400.0, 150.0, 34.0, 16.0
    step = width / NUM_BINS
    bars = []
    for position, count in enumerate(scores.histogram.tolist()):
        if count:
            tall = max(height * count / scores.texts / tallest, 1.0)  # one text is still seen
            span = f"{position / NUM_BINS:.3f} to {(position + 1) / NUM_BINS:.3f}"
            bars.append(
                f'<rect x="{left + position * step + 0.6:.2f}" y="{top + height - tall:.2f}" '
                f'width="{step - 1.2:.2f}" height="{tall:.2f}" fill="url(#split-{name})">'
                f"<title>{span}: {counted(count, 'text')}</title></rect>"
            )
    at = left + threshold * width
    ticks = "".join(
        f'<text x="{left + value * width:g}" y="{top + height + 16:g}" text-anchor="middle">{value:g}</text>'
        for value in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    anchor, shift = ("end", -5) if threshold > 0.5 else ("start", 5)
    return (
        f"<figure><figcaption><b>{NAMES[name]}</b> · {counted(scores.texts, 'text')} by ITM probability"
        "</figcaption>"
        f'<svg viewBox="0 0 {left + width + 14:g} {top + height + 22:g}" role="img" '
        f'aria-label="ITM probabilities of {name} texts">'
        f'<defs><linearGradient id="split-{name}" gradientUnits="userSpaceOnUse" '
        f'x1="{left}" x2="{left + width}" y1="0" y2="0">'
        f'<stop class="dropped" offset="{threshold:.4f}"/><stop class="kept" offset="{threshold:.4f}"/>'
        f"</linearGradient></defs>"
        f'<text x="{left - 6}" y="{top + 9:g}" text-anchor="end">{100 * tallest:.0f}%</text>'
        f'<text x="{left - 6}" y="{top + height:g}" text-anchor="end">0</text>{"".join(bars)}'
        f'<line class="axis" x1="{left}" x2="{left + width}" y1="{top + height}" y2="{top + height}"/>'
        f'<line class="threshold" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 10}" y2="{top + height}"/>'
        f'<text class="threshold-label" x="{at + shift:.1f}" y="{top - 3:g}" text-anchor="{anchor}">'
        f"threshold {threshold:g}</text>{ticks}</svg></figure>"
    )


def gallery(pictures: Gallery, scores: RunScores) -> str:
    """Cards by what became of an image's texts, accepted in green and rejected in red (BLIP figure 4)."""
    both = sum(scores.combinations.values())
    parts = [f'<p class="quiet">{SYMBOLS["web"]} is web text, {SYMBOLS["synthetic"]} synthetic text.</p>']
    for combination in COMBINATIONS:
        count = scores.combinations[combination]
        if not count:
            continue
        cards = "".join(_card(image) for image in pictures[combination])
        parts.append(
            f"<h3>{TITLES[combination]} "
            f'<span class="quiet">· {counted(count, "image")}, {share(count, both)}</span></h3>'
            f'<div class="gallery">{cards}</div>'
        )
    if not both:
        parts.append('<p class="quiet">No image has both a web and a synthetic text.</p>')
    return "".join(parts)


def _card(image: ShownImage) -> str:
    if image.picture is None:
        picture = '<div class="missing">picture not found at its source</div>'
    else:
        picture = f'<img src="{image.picture}" alt="" loading="lazy">'
    texts = "".join(_text(text) for text in image.texts)
    origin = f"{escape(image.shard)} / {escape(image.key)}"
    return f'<article class="card">{picture}<ul>{texts}</ul><p class="origin">{origin}</p></article>'


def _text(text: ShownText) -> str:
    style, verdict = ("kept", "✓ accepted") if text.kept else ("dropped", "✗ rejected")
    caption = escape(text.caption) if text.caption.strip() else '<span class="quiet">(empty)</span>'
    return (
        f'<li class="text {style}"><div class="verdict">{SYMBOLS[text.source]} {verdict}'
        f"<span>itm {text.itm:.3f} · itc {round(text.itc, 2) + 0.0:.2f}</span></div>{caption}</li>"
    )


def definition_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings as rows of a table; None is shown as a dash."""
    return [(name, NOTHING if value is None else str(value)) for name, value in values.items()]
