"""`report.html` of a CapFilt run, made anew from the run's folder and the original images.

One file, nothing loaded from elsewhere, no script. Every text that comes from data passes `escape`; a
Content-Security-Policy forbids scripts in addition.
"""

import base64
import html
import io
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from openblip.capfilt.folder import CapFiltFolder
from openblip.capfilt.scores import COMBINATIONS, NUM_BINS, SOURCES, RunScores, SourceScores
from openblip.data.captions import is_kept
from openblip.data.images import read_image
from openblip.data.reader import read_source
from openblip.data.sample import Reject, Sample
from openblip.data.sources import open_source
from openblip.errors import OpenBlipError
from openblip.files import hash_int, read_json, write_text

MAX_REJECTS = 50
MAX_FAILURES = 50
IMAGES_PER_COMBINATION = 8
MAX_SHARDS = 16
"""Number of shards that images are drawn from: a report must not open a thousand archives."""
THUMBNAIL_SIZE = 360
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
    """A part of the page. `body` is HTML and is not escaped: use `escape` for what comes from data."""

    title: str
    body: str


def write_report(directory: str | Path, *, extra_sections: Sequence[Section] = ()) -> RunScores:
    """Write `DIR/report.html` and return the scores that it shows.

    Args:
        directory: output of a CapFilt run, finished or not.
        extra_sections: shown after the keep rates, for callers that know more, such as the ground truth about
            the noise. Their bodies are HTML; `table` and `escape` make HTML out of data.

    Raises:
        ConfigError: the folder is not the output of a CapFilt run.
    """
    folder = CapFiltFolder(Path(directory))
    manifest = folder.read_manifest()
    shards = folder.done_shards()
    reports = [read_json(folder.report(shard)) for shard in shards]
    scores = RunScores()
    for shard in shards:
        scores.add_shard(folder.captions(shard), manifest["threshold"])
    failures = folder.failures()
    failed = [(failure["shard"], failure["error"]) for failure in failures[:MAX_FAILURES]]
    sections = [
        Section("Kept by source", _keep_rates(scores)),
        *extra_sections,
        Section(
            "Scores",
            '<p class="quiet">The probability that a text matches its image, by the ITM head of the filter; '
            "bars show the share of the texts.</p>" + _histograms(scores, manifest["threshold"]),
        ),
        Section("Accepted and rejected", _gallery(choose_images(folder, manifest), scores)),
        Section("Samples that could not be read", _rejects(reports)),
        *([Section("Shards that are not finished", table(("Shard", "Error"), failed))] if failures else []),
        Section("How it was made", _provenance(manifest, reports)),
    ]
    lead = _lead(manifest, scores, reports, failures)
    footer = f"Made by OpenBLIP {manifest['openblip']}. BLIP: Li et al., 2022, section 3.3."
    resources = files("openblip.capfilt")
    page = Template(resources.joinpath("page.html").read_text("utf-8")).substitute(
        policy=POLICY,
        css=resources.joinpath("page.css").read_text("utf-8"),
        lead=lead,
        sections="".join(f"<section><h2>{escape(part.title)}</h2>{part.body}</section>\n" for part in sections),
        footer=escape(footer),
    )
    write_text(folder.report_page, page)
    return scores


def _lead(
    manifest: Mapping[str, Any],
    scores: RunScores,
    reports: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
) -> str:
    web, synthetic = scores.sources["web"], scores.sources["synthetic"]
    rejected = sum(len(report["rejects"]) for report in reports)
    total = manifest["num_shards"]
    state = f"{len(reports):,} of {_counted(total, 'shard')}" if len(reports) < total else _counted(total, "shard")
    warning = (
        f'<p class="warning">{_counted(len(failures), "shard")} could not be finished and '
        "is not counted here. The same command tries again.</p>"
        if failures
        else ""
    )
    return f'<p class="quiet">{escape(manifest["source"])} · {state}</p>{warning}' + _tiles(
        [
            ("Images", f"{scores.images:,}", f"{rejected:,} more could not be read"),
            ("Web texts", f"{web.texts:,}", f"{web.kept:,} kept, {_share(web.kept, web.texts)}"),
            (
                "Synthetic texts",
                f"{synthetic.texts:,}",
                f"{synthetic.kept:,} kept, {_share(synthetic.kept, synthetic.texts)}",
            ),
            ("Bootstrapped pairs", f"{scores.kept:,}", f"of {scores.texts:,} texts"),
        ]
    )


def _rejects(reports: Sequence[Mapping[str, Any]]) -> str:
    rejects = [(report["shard"], reject) for report in reports for reject in report["rejects"]]
    if not rejects:
        return '<p class="quiet">Every sample could be read.</p>'
    shown = [(shard, reject["key"], reject["reason"]) for shard, reject in rejects[:MAX_REJECTS]]
    more = len(rejects) - len(shown)
    note = f'<p class="note">and {more:,} more, in <code>captions/*.rejects.jsonl</code></p>' if more else ""
    return table(("Shard", "Sample", "Reason"), shown) + note


def _provenance(manifest: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> str:
    models = [
        (role, manifest[role]["checkpoint"], f"{manifest[role]['parameters']:,}", manifest[role]["sha256"][:16])
        for role in ("captioner", "filter")
    ]
    settings = {**manifest["config"], "threshold": manifest["threshold"]}
    return (
        table(("Model", "Checkpoint", "Parameters", "SHA-256"), models, numbers=(2,))
        + "<h3>Settings</h3>"
        + table((), [(name, NOTHING if value is None else value) for name, value in settings.items()])
        + "<h3>Time</h3>"
        + table(("Stage", "Seconds", "Share"), list(_timing(reports)), numbers=(1, 2))
    )


def _timing(reports: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds.update(report["seconds"])
    total = seconds.pop("total", 0.0)
    images = sum(report["images"] for report in reports)
    for stage, spent in seconds.items():
        yield stage, f"{spent:,.1f}", f"{100 * spent / total:.0f}%" if total else NOTHING
    rate = f"{images / total:,.1f} images/s" if total else NOTHING
    yield "all", f"{total:,.1f}", rate


# --- The gallery: a few images for each fate of their texts, chosen by hash


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image of the gallery with the rows of its texts."""

    shard: str
    key: str
    rows: list[dict[str, Any]]
    """Rows of the caption file, each with `kept`."""
    thumbnail: str | None
    """A data URI; None when the original can no longer be read."""


Gallery = dict[tuple[bool, bool], list[ShownImage]]


def choose_images(folder: CapFiltFolder, manifest: Mapping[str, Any]) -> Gallery:
    """Images by (web kept, synthetic kept), the same for the same rows and threshold.

    Thumbnails are made from the original shards; where those are gone, the texts are shown without.
    """
    shards = sorted(folder.done_shards(), key=hash_int)[:MAX_SHARDS]
    candidates: dict[tuple[bool, bool], list[tuple[int, str, int]]] = {name: [] for name in COMBINATIONS}
    for shard in shards:
        rows_of = RunScores().add_shard(folder.captions(shard), manifest["threshold"])
        for combination, rows in rows_of.items():
            order = np.random.default_rng(hash_int(shard)).permutation(rows)[:IMAGES_PER_COMBINATION]
            # The rank comes first, so that every shard gives its first image before one gives its second.
            candidates[combination] += [(rank, shard, int(row)) for rank, row in enumerate(order)]
    chosen = {name: sorted(ranked)[:IMAGES_PER_COMBINATION] for name, ranked in candidates.items()}
    first_rows: dict[str, list[int]] = {}
    for ranked in chosen.values():
        for _, shard, row in ranked:
            first_rows.setdefault(shard, []).append(row)
    shown = {shard: _show(folder, manifest, shard, rows) for shard, rows in first_rows.items()}
    return {name: [shown[shard][row] for _, shard, row in ranked] for name, ranked in chosen.items()}


def _show(
    folder: CapFiltFolder, manifest: Mapping[str, Any], shard: str, first_rows: Sequence[int]
) -> dict[int, ShownImage]:
    """The images whose texts begin at `first_rows` of the shard's caption file."""
    table = pq.read_table(folder.captions(shard))
    texts: dict[int, list[dict[str, Any]]] = {}
    for first in first_rows:
        rows = table.slice(first).to_batches(max_chunksize=64)[0].to_pylist()
        texts[first] = [
            {**row, "kept": bool(is_kept(np.float32(row["itm"]), manifest["threshold"]))}
            for row in rows
            if row["key"] == rows[0]["key"]  # the rows of an image stand together
        ]
    thumbnails = _thumbnails(manifest, shard, {rows[0]["key"] for rows in texts.values()})
    return {
        first: ShownImage(shard=shard, key=key, rows=rows, thumbnail=thumbnails.get(key))
        for first, rows in texts.items()
        for key in [rows[0]["key"]]
    }


def _thumbnails(manifest: Mapping[str, Any], shard: str, keys: set[str]) -> dict[str, str]:
    """Data URIs of the wanted samples that can still be read, by key."""

    def encode(sample: Sample) -> str:
        with read_image(sample.image, name=sample.key) as image:
            image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG", quality=82)
        return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()

    try:
        source = open_source(manifest["source"], images=manifest["images"])
        entries = read_source(source, encode, shards=[shard], skip=lambda _, key: key not in keys)
        return {sample.key: uri for sample, uri in (e for e in entries if not isinstance(e, Reject))}
    except (OpenBlipError, OSError):
        return {}  # the originals have moved: the page says so at each image


# --- The page as HTML


def escape(text: object) -> str:
    """Any text as inert HTML: markup is escaped, control characters become visible, and overrides of the writing
    direction end with the text."""
    shown = "".join("\ufffd" if unicodedata.category(char) in {"Cc", "Cs"} else char for char in str(text))
    return f"<bdi>{html.escape(shown)}</bdi>"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """An HTML table; every cell is escaped. `numbers` are the columns that are aligned to the right."""

    def cells(tag: str, values: Sequence[object]) -> str:
        right = [' class="number"' if column in numbers else "" for column in range(len(values))]
        return "".join(f"<{tag}{style}>{escape(value)}</{tag}>" for style, value in zip(right, values, strict=True))

    head = f"<thead><tr>{cells('th', headers)}</tr></thead>" if headers else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers: (name, value, remark) each."""
    items = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>'
        for name, value, remark in entries
    )
    return f'<dl class="tiles">{items}</dl>'


def _share(part: int, whole: int) -> str:
    """A percentage; a dash when `whole` is 0."""
    return f"{100 * part / whole:.1f}%" if whole else NOTHING


def _counted(number: int, noun: str) -> str:
    """`1 shard`, `2,000 shards`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _keep_rates(scores: RunScores) -> str:
    """A bar per source: how many of its texts are kept."""
    rows = []
    for name in SOURCES:
        source = scores.sources[name]
        width = 100 * source.kept / source.texts if source.texts else 0.0
        rows.append(
            f'<div class="rate"><b>{NAMES[name]}</b>'
            f'<div class="bar"><span style="width:{width:.2f}%"></span></div>'
            f"<span>{_share(source.kept, source.texts)} "
            f'<span class="quiet">· {source.kept:,} of {source.texts:,}</span></span></div>'
        )
    return "".join(rows)


def _histograms(scores: RunScores, threshold: float) -> str:
    """The distribution of ITM probabilities, a panel per source on one common scale."""
    shares = [source.histogram / source.texts for source in map(scores.sources.get, SOURCES) if source and source.texts]
    tallest = max((float(values.max()) for values in shares), default=1.0)
    panels = "".join(_histogram(name, scores.sources[name], threshold, tallest) for name in SOURCES)
    return f'<div class="panels">{panels}</div>'


def _histogram(name: str, scores: SourceScores, threshold: float, tallest: float) -> str:
    width, height, left, top = 400.0, 150.0, 34.0, 16.0
    step = width / NUM_BINS
    bars = []
    for position, count in enumerate(scores.histogram.tolist()):
        if count:
            tall = max(height * count / scores.texts / tallest, 1.0)  # a single text is still visible
            span = f"{position / NUM_BINS:.3f} to {(position + 1) / NUM_BINS:.3f}"
            bars.append(
                f'<rect x="{left + position * step + 0.6:.2f}" y="{top + height - tall:.2f}" '
                f'width="{step - 1.2:.2f}" height="{tall:.2f}" fill="url(#split-{name})">'
                f"<title>{span}: {_counted(count, 'text')}</title></rect>"
            )
    at = left + threshold * width
    ticks = "".join(
        f'<text x="{left + value * width:g}" y="{top + height + 16:g}" text-anchor="middle">{value:g}</text>'
        for value in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    anchor, shift = ("end", -5) if threshold > 0.5 else ("start", 5)
    return (
        f"<figure><figcaption><b>{NAMES[name]}</b> · {_counted(scores.texts, 'text')} by ITM probability"
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


def _gallery(images: Gallery, scores: RunScores) -> str:
    """Cards by which of an image's texts are kept, accepted in green and rejected in red (BLIP figure 4)."""
    both = sum(scores.combinations.values())
    parts = [f'<p class="quiet">{SYMBOLS["web"]} is web text, {SYMBOLS["synthetic"]} synthetic text.</p>']
    for combination in COMBINATIONS:
        count = scores.combinations[combination]
        if not count:
            continue
        cards = "".join(_card(image) for image in images[combination])
        parts.append(
            f"<h3>{TITLES[combination]} "
            f'<span class="quiet">· {_counted(count, "image")}, {_share(count, both)}</span></h3>'
            f'<div class="gallery">{cards}</div>'
        )
    if not both:
        parts.append('<p class="quiet">No image has both a web and a synthetic text.</p>')
    return "".join(parts)


def _card(image: ShownImage) -> str:
    if image.thumbnail is None:
        thumbnail = '<div class="missing">image not found at its source</div>'
    else:
        thumbnail = f'<img src="{image.thumbnail}" alt="" loading="lazy">'
    texts = "".join(map(_text, image.rows))
    origin = f"{escape(image.shard)} / {escape(image.key)}"
    return f'<article class="card">{thumbnail}<ul>{texts}</ul><p class="origin">{origin}</p></article>'


def _text(row: Mapping[str, Any]) -> str:
    style, verdict = ("kept", "✓ accepted") if row["kept"] else ("dropped", "✗ rejected")
    caption = escape(row["caption"]) if row["caption"].strip() else '<span class="quiet">(empty)</span>'
    return (
        f'<li class="text {style}"><div class="verdict">{SYMBOLS[row["source"]]} {verdict}'
        f"<span>itm {row['itm']:.3f} · itc {round(row['itc'], 2) + 0.0:.2f}</span></div>{caption}</li>"
    )
