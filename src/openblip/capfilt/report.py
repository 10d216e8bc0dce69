"""`report.html` of a CapFilt run, made anew from the run's folder and the original images.

One file, nothing loaded from elsewhere, no script. `page.html` is its template: every text that comes from data is
escaped, and a Content-Security-Policy forbids scripts in addition.
"""

import base64
import io
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from openblip.capfilt.folder import COMBINATIONS, SCORED, CapFiltFolder, RunScores
from openblip.data.captions import read_judged
from openblip.data.config import SourceOptions
from openblip.data.decision import Decision
from openblip.data.images import read_image
from openblip.data.reader import read_source
from openblip.data.sample import Reject, Sample
from openblip.data.sources import open_source
from openblip.errors import OpenBlipError
from openblip.files import hash_int, write_text

MAX_LISTED = 50  # rejects, and unfinished shards
IMAGES_PER_COMBINATION = 8
MAX_SHARDS = 16  # that images are drawn from: a report must not open a thousand archives
THUMBNAIL_SIZE = 360
NOTHING = "\N{EN DASH}"
TITLES = {  # of the images of each combination, in the order in which they are shown
    (False, True): "Web text rejected, synthetic accepted",
    (True, True): "Both accepted",
    (True, False): "Web text accepted, synthetic rejected",
    (False, False): "Both rejected",
}


class ReportTable(NamedTuple):
    """A table of the page; its cells are escaped. `numbers` are the columns that are aligned to the right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    numbers: Collection[int] = ()


def write_report(
    directory: str | Path, *, extra_tables: Mapping[str, Sequence[ReportTable]] | None = None
) -> RunScores:
    """Write `DIR/report.html` of a run, finished or not, and return the scores that it shows.

    extra_tables: sections by title, shown after the keep rates, for callers that know more, such as the ground truth
    about the noise. Raises `ConfigError` when the folder is not the output of a CapFilt run.
    """
    folder = CapFiltFolder(directory)
    manifest = folder.read_manifest()
    decision = Decision.of_manifest(manifest)
    shards = folder.done_shards()
    reports = [folder.read_report(shard) for shard in shards]
    scores = RunScores()
    for shard in shards:
        scores.add_shard(read_judged(folder.root, shard, decision, SCORED))
    environment = Environment(
        loader=PackageLoader("openblip.capfilt", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["text"] = escape
    page = environment.get_template("page.html").render(
        manifest=manifest,
        threshold=manifest["threshold"],
        reports=reports,
        rejects=[(r["shard"], reject["key"], reject["reason"]) for r in reports for reject in r["rejects"]],
        failures=[(failure["shard"], failure["error"]) for failure in folder.failures()],
        max_listed=MAX_LISTED,
        nothing=NOTHING,
        scores=scores,
        tallest=max((float((s.histogram / s.texts).max()) for s in scores.sources.values() if s.texts), default=1.0),
        extra_tables=extra_tables or {},
        titles=TITLES,
        gallery=choose_images(folder, manifest),
        models=[
            (role, model["checkpoint"], f"{model['parameters']:,}", model.get("dtype"), model["sha256"][:16])
            for role, model in manifest["models"].items()
        ],
        settings=[*manifest["config"].items(), ("threshold", manifest["threshold"])],
        timing=list(_timing(reports)),
    )
    write_text(folder.report_page, page)
    return scores


def escape(text: object) -> Markup:
    """Any text as inert HTML: markup is escaped, control characters become visible, and overrides of the writing
    direction end with the text. None is a dash."""
    text = NOTHING if text is None else str(text)
    shown = "".join("\ufffd" if unicodedata.category(char) in {"Cc", "Cs"} else char for char in text)
    return Markup("<bdi>{}</bdi>").format(shown)


def _timing(reports: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Each stage with its seconds and its share of all."""
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds.update(report["seconds"])
    total = seconds.pop("total", 0.0)
    images = sum(report["counts"]["images"] for report in reports)
    for stage, spent in seconds.items():
        yield stage, f"{spent:,.1f}", f"{100 * spent / total:.0f}%" if total else NOTHING
    yield "all", f"{total:,.1f}", f"{images / total:,.1f} images/s" if total else NOTHING


# The gallery: a few images for each fate of their texts, chosen by hash.


class ShownImage(NamedTuple):
    """An image of the gallery with the rows of its texts."""

    shard: str
    key: str
    rows: list[dict[str, Any]]  # of the caption file, each with `kept`
    thumbnail: str | None  # a data URI; None when the original can no longer be read


def choose_images(folder: CapFiltFolder, manifest: Mapping[str, Any]) -> dict[tuple[bool, bool], list[ShownImage]]:
    """Images by (web kept, synthetic kept), the same for the same rows and threshold.

    Thumbnails are made from the original shards; where those are gone, the texts are shown without.
    """
    candidates: dict[tuple[bool, bool], list[tuple[int, str, int]]] = {name: [] for name in COMBINATIONS}
    for shard in sorted(folder.done_shards(), key=hash_int)[:MAX_SHARDS]:
        rows_of = RunScores().add_shard(read_judged(folder.root, shard, Decision.of_manifest(manifest), SCORED))
        for combination, rows in rows_of.items():
            order = np.random.default_rng(hash_int(shard)).permutation(rows)[:IMAGES_PER_COMBINATION]
            # The rank comes first, so that every shard gives its first image before one gives its second.
            candidates[combination] += [(rank, shard, int(row)) for rank, row in enumerate(order)]
    chosen = {name: sorted(ranked)[:IMAGES_PER_COMBINATION] for name, ranked in candidates.items()}
    first_rows: dict[str, list[int]] = defaultdict(list)
    for _, shard, row in chain(*chosen.values()):
        first_rows[shard].append(row)
    shown = {shard: _shown_images(folder, manifest, shard, rows) for shard, rows in first_rows.items()}
    return {name: [shown[shard][row] for _, shard, row in ranked] for name, ranked in chosen.items()}


def _shown_images(
    folder: CapFiltFolder, manifest: Mapping[str, Any], shard: str, first_rows: Sequence[int]
) -> dict[int, ShownImage]:
    """The images whose texts begin at `first_rows` of the shard's caption file."""
    table = read_judged(folder.root, shard, Decision.of_manifest(manifest))
    texts: dict[int, list[dict[str, Any]]] = {}
    for first in first_rows:
        rows = table.slice(first, 64).to_pylist()
        texts[first] = [row for row in rows if row["key"] == rows[0]["key"]]  # the rows of an image stand together
    keys = {first: rows[0]["key"] for first, rows in texts.items()}

    def encode(sample: Sample) -> str:
        with read_image(sample.image, name=sample.key) as image:
            image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG", quality=82)
        return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()

    thumbnails: dict[str, str] = {}
    try:
        source = open_source(manifest["source"], **SourceOptions.stated(manifest).reading)
        entries = read_source(source, encode, shards=[shard], skip=lambda _, key: key not in keys.values())
        thumbnails = {entry[0].key: entry[1] for entry in entries if not isinstance(entry, Reject)}
    except (OpenBlipError, OSError):
        pass  # the originals have moved: the page says so at each image
    return {first: ShownImage(shard, key, texts[first], thumbnails.get(key)) for first, key in keys.items()}
