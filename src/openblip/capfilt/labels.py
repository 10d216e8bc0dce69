"""Labels of sampled texts: which texts a person is asked about, the page that asks, and the file of answers.

The sample is stratified: texts are sorted by a score and cut into strata, and every stratum gives equally many. Strata
are narrow where the score is undecided, because labels say most there. Each label has the share of all texts that its
stratum stands for, so what is computed from the labels holds for the whole run.

R texts of a run that are not empty, at most `MOST_DRAWN` of them.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from openblip.capfilt.folder import CapFiltFolder
from openblip.capfilt.report import content_policy, thumbnail
from openblip.capfilt.statistics import Floats
from openblip.data.captions import read_texts
from openblip.data.config import SourceOptions
from openblip.data.reader import read_source
from openblip.data.sample import Reject
from openblip.data.sources import open_source
from openblip.errors import ConfigError
from openblip.files import hash_int, read_jsonl, write_text
from openblip.progress import Progress

MOST_DRAWN = 1_000_000  # that represent a run
NUM_STRATA = 40
LEAST_DOUBT = 0.15  # a filter that is sure is taken to be wrong at least so often
ANSWERS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False, "unsure": None, "": None}
TEXT_KEYS = ("shard", "key", "source", "index")  # name a text
TextName = tuple[str, str, str, int]
"""Their values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A text, the stratum that it was drawn from with the share of all texts in it, and what a person says of it:
    whether it is true of its image, None where that is not known.
    """

    shard: str
    key: str
    source: str
    index: int
    stratum: int
    share: float
    is_true: bool | None = None


class PageSummary(NamedTuple):
    """The page that was written, how many texts it asks about, and how many images could not be read."""

    path: Path
    texts: int
    missing: int


def draw_texts(directory: str | Path, columns: Sequence[str], *, limit: int = MOST_DRAWN, seed: int = 0) -> pa.Table:
    """Columns of texts of a run that are not empty, in random order, each with its `shard`: all, or a uniform sample.

    Every shard is read once, and no more than twice the limit are in memory. The same seed draws the same texts.
    """
    folder = CapFiltFolder(directory)
    drawn: list[pa.Table] = []

    def smallest() -> pa.Table:
        together = pa.concat_tables(drawn)
        return together.take(pc.sort_indices(together["priority"])[:limit])

    shards = folder.done_shards()
    if not shards:
        raise ConfigError(f"{directory}: no shard is finished; run the same openblip capfilt command again")
    wanted = [name for name in columns if name != "shard"]
    for shard in shards:
        texts = read_texts(folder.root, shard, list(dict.fromkeys([*wanted, "caption"])))
        priorities = np.random.default_rng([seed, hash_int(shard)]).random(texts.num_rows)
        is_text = pc.not_equal(pc.utf8_trim_whitespace(texts["caption"]), "")
        texts = texts.select(wanted).append_column("shard", pa.array([shard] * texts.num_rows, pa.string()))
        drawn.append(texts.append_column("priority", pa.array(priorities)).filter(is_text))
        if sum(map(len, drawn)) > 2 * limit:
            drawn = [smallest()]
    return smallest().drop_columns(["priority"])


def stratify(scores: Floats, *, is_probability: bool, num_strata: int = NUM_STRATA) -> NDArray[np.int64]:
    """The stratum of each text (R,), from 0 for the lowest scores.

    Of probabilities, each stratum has the same sum of sqrt(p (1 - p)): then equally many labels from each are Neyman's
    allocation, which has the least variance. Other scores have strata of equal size. Texts with one score are divided
    as they come, which is at random.
    """
    order = np.argsort(scores, kind="stable")
    doubt = np.clip(scores[order], LEAST_DOUBT, 1 - LEAST_DOUBT) if is_probability else np.full(len(scores), 0.5)
    measure = np.cumsum(np.sqrt(doubt * (1 - doubt)))
    strata = np.empty(len(scores), np.int64)
    strata[order] = np.minimum((measure / measure[-1] * num_strata).astype(np.int64), num_strata - 1)
    return strata


def sample_texts(directory: str | Path, num_texts: int, *, by: str = "itm", seed: int = 0) -> list[Label]:
    """Draw texts to label, stratified by the score `by`, in random order and without answers."""
    texts = draw_texts(directory, list(dict.fromkeys([*TEXT_KEYS, by])), seed=seed)
    scores = np.asarray(pc.cast(texts[by], pa.float64()).to_numpy(), np.float64)
    if not np.isfinite(scores).any():
        raise ConfigError(f"{directory}: no text has the score {by}")
    scores = np.nan_to_num(scores, nan=float(np.nanmin(scores)))
    within = bool((scores >= 0).all() and (scores <= 1).all())
    strata = stratify(scores, is_probability=within, num_strata=min(NUM_STRATA, max(1, num_texts // 2)))
    sizes = np.bincount(strata)
    quota, extra = divmod(num_texts, len(sizes))
    drawn: list[Label] = []
    for stratum, size in enumerate(sizes.tolist()):
        # Spread over all strata, so that the rest of the division does not go to one end.
        count = quota + ((stratum + 1) * extra // len(sizes) - stratum * extra // len(sizes))
        for row in np.flatnonzero(strata == stratum)[:count].tolist():  # the texts are in random order
            text = {name: texts[name][row].as_py() for name in TEXT_KEYS}
            drawn.append(Label(**text, stratum=stratum, share=size / len(strata)))
    order = np.random.default_rng([seed, len(drawn)]).permutation(len(drawn))
    return [drawn[position] for position in order.tolist()]


def write_label_page(
    directory: str | Path, out: str | Path, num_texts: int, *, by: str = "itm", seed: int = 0
) -> PageSummary:
    """Write a page on which a person says of each sampled text whether it is true of its image.

    One file that loads nothing from elsewhere and sends nothing: answers stay in the browser until the person downloads
    them. Scores and sources are not shown, so that they do not influence anyone. Raises `ConfigError` when there is
    nothing to show.
    """
    folder = CapFiltFolder(directory)
    manifest = folder.read_manifest()
    asked = sample_texts(directory, num_texts, by=by, seed=seed)
    captions = label_captions(folder.root, asked)
    images = dict(_thumbnails(manifest, asked))
    shown = [label for label in asked if (label.shard, label.key) in images]
    if not shown:
        raise ConfigError(f"{directory}: none of the images can be read from {manifest['source']}; is it still there?")
    numbers = {place: number for number, place in enumerate(images)}
    items = [
        {
            **{name: value for name, value in asdict(label).items() if name != "is_true"},
            "caption": captions[text_name(label)],
            "image": numbers[label.shard, label.key],
        }
        for label in shown
    ]
    facts = {"source": manifest["source"], "openblip": manifest["openblip"], "by": by, "seed": seed}
    run = hash_int(json.dumps([facts, num_texts, manifest["models"]], sort_keys=True))
    loader = PackageLoader("openblip.capfilt", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    style, script = (loader.get_source(environment, name)[0] for name in ("label_page.css", "label_page.js"))
    page = environment.get_template("label_page.html").render(
        style=Markup(style),
        script=Markup(script),
        policy=Markup(content_policy(style, script)),
        data={"run": f"{run:x}", "facts": facts, "items": items, "images": list(images.values())},
        num_texts=len(items),
        command=f"openblip capfilt-calibrate {directory} labels.json",
    )
    write_text(out, page.lstrip())
    return PageSummary(Path(out), len(shown), len(asked) - len(shown))


def text_name(text: Label | Mapping[str, Any]) -> TextName:
    """What names a text within a run."""
    value = asdict(text) if isinstance(text, Label) else text
    return value["shard"], value["key"], value["source"], value["index"]


def label_captions(directory: str | Path, labels: Sequence[Label]) -> dict[TextName, str]:
    """The texts of labels, by what names them. Raises as `labelled_rows`."""
    return {
        text_name(row): row["caption"] for row in labelled_rows(directory, labels, [*TEXT_KEYS, "caption"]).to_pylist()
    }


def labelled_rows(directory: str | Path, labels: Sequence[Label], columns: Sequence[str]) -> pa.Table:
    """The rows of labels, in the order of the labels. Raises `ConfigError` for a label of a text that is not there."""
    by_shard: dict[str, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        by_shard[label.shard].append(position)
    finished = set(CapFiltFolder(directory).done_shards())
    parts, positions = [], []
    for shard, members in by_shard.items():
        if shard not in finished:
            raise ConfigError(f"{directory} has no finished shard {shard}; the labels are of another run")
        texts = read_texts(directory, shard, list(dict.fromkeys([*columns, *TEXT_KEYS])))
        keys = texts.select(["key", "source", "index"]).to_pydict()
        rows = {place: row for row, place in enumerate(zip(*keys.values(), strict=True))}
        chosen = []
        for position in members:
            label = labels[position]
            if (row := rows.get((label.key, label.source, label.index))) is None:
                name = f"{label.shard}/{label.key}, {label.source} text {label.index}"
                raise ConfigError(f"{directory} has no {name}; the labels are of another run")
            chosen.append(row)
        parts.append(texts.select(list(columns)).take(pa.array(chosen, pa.int64())))
        positions += members
    return pa.concat_tables(parts, promote_options="permissive").take(pa.array(np.argsort(positions)))


def _thumbnails(manifest: Mapping[str, Any], labels: Sequence[Label]) -> Iterator[tuple[tuple[str, str], str]]:
    """The images of labels, small, by shard and key, as far as they can be read."""
    keys: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        keys[label.shard].add(label.key)
    source = open_source(manifest["source"], **SourceOptions.stated(manifest).reading)
    with Progress("reading images", total=sum(map(len, keys.values())), unit="images") as bar:
        for shard, wanted in keys.items():
            unread = set(wanted)

            def is_skipped(_: str, key: str, unread: set[str] = unread) -> bool:
                return key not in unread

            entries = read_source(source, thumbnail, shards=[shard], skip=is_skipped, keep_going=True)
            with closing(entries):
                for entry in entries:
                    if not isinstance(entry, Reject):
                        yield (shard, entry[0].key), entry[1]
                    unread.discard(entry.key if isinstance(entry, Reject) else entry[0].key)
                    if not unread:
                        break
            bar.advance(len(wanted))


def read_labels(path: str | Path) -> list[Label]:
    """The answers in a file that the page downloads, json or csv, that `openblip serve` keeps, or that somebody wrote.

    A csv needs the columns shard, key, source, index and label (yes, no, unsure or nothing). Without stratum and share,
    its texts count as drawn at random from the whole run. Raises `ConfigError`, which names the label, for others.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if Path(path).suffix == ".jsonl":
        rows = [line.value for line in read_jsonl(path)]
    elif content.lstrip().startswith("{"):
        try:
            rows = json.loads(content)["labels"]
        except (ValueError, KeyError, RecursionError) as error:
            raise ConfigError(f"{path}: not a file of labels as the page of capfilt-sample downloads it") from error
    else:
        rows = list(csv.DictReader(io.StringIO(content)))
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: `labels` must be a list")
    labels: dict[TextName, Label] = {}
    for number, row in enumerate(rows, 1):
        try:
            answer = str("" if row["label"] is None else row["label"]).strip().lower()
            label = Label(
                shard=str(row["shard"]),
                key=str(row["key"]),
                source=str(row["source"]),
                index=int(row["index"]),
                stratum=int(row.get("stratum") or 0),
                share=float(row.get("share") or 1.0),
                is_true=ANSWERS[answer],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            needed = "shard, key, source, index and label, which is yes, no, unsure or empty"
            raise ConfigError(
                f"{path}, label {number}: cannot be understood ({error!r:.80}); it needs {needed}"
            ) from error
        if not 0 < label.share <= 1:
            raise ConfigError(f"{path}, label {number}: share is {label.share}; it is the part of all texts, up to 1")
        labels[text_name(label)] = label  # a later answer about the same text holds
    return list(labels.values())


def label_weights(labels: Sequence[Label]) -> Floats:
    """The share of all texts that each label stands for, with the sum 1.

    Texts without an answer count as those of their stratum that have one; a stratum without any answer, as the nearest.
    """
    answered = np.array([label.is_true is not None for label in labels])
    strata = np.array([label.stratum for label in labels])
    shares = {label.stratum: label.share for label in labels}
    counts = {stratum: int((answered & (strata == stratum)).sum()) for stratum in shares}
    known = np.array([stratum for stratum, count in counts.items() if count])
    weights = np.zeros(len(labels))
    for stratum, share in shares.items():
        nearest = known[np.abs(known - stratum).argmin()]
        weights += np.where(answered & (strata == nearest), share / counts[int(nearest)], 0.0)
    return np.asarray(weights / weights.sum(), np.float64)
