"""An index of images, and of the texts that came with them: built from any source, searched by text or by image.

```
DIR/index.json      what was indexed with which model; written first
DIR/shards.json     the state of the file of each shard that is wholly indexed
DIR/lance/          LanceDB's tables: `images`, a row per image vector, and `texts`, a row per text
```

ITC finds candidates by their embeddings, ITM re-ranks the best of them (BLIP section 5.1). Every commit of a table is
atomic, and what is missing or has changed is found by comparing with the source: after a kill at any moment, the same
call goes on.

D embedding width, Q vectors of an image (1 for BLIP), M vectors of a query, R rows.
"""

import io
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from itertools import compress, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from openblip.data.config import DecodingAhead, SourceOptions
from openblip.data.decision import columns_of
from openblip.data.images import ImageInput, Pixels, read_image, upright_size
from openblip.data.reader import read_source
from openblip.data.sample import Reject, Sample, Source
from openblip.data.sources import absolute_spec, check_options_used, open_source, storage
from openblip.errors import ConfigError, MissingExtraError, SourceError, UnsupportedTaskError
from openblip.files import (
    PARTIAL,
    changed_settings,
    hash_bytes,
    is_local,
    locate,
    read_json,
    remove_partials,
    write_json,
)
from openblip.predictor import BasePredictor
from openblip.predictor.reranking import rerank_scores
from openblip.progress import Progress

STORES = ("s3", "gs", "az")
"""Of the URLs below which an index can lie, what stands before ://."""
LOCK = "index.lock"  # beside a local index, held by the process that writes it
ROWS_PER_COMMIT = 4096  # of images; a commit writes a file of each column
SECONDS_PER_COMMIT = 60.0  # what was not committed is embedded again after a kill
HELD_BYTES = 256 << 20  # of image files that are kept until a commit
SEEN_AFTER = timedelta(seconds=1)  # an open index is that of so long ago
APPROXIMATE_ABOVE = 50_000
"""Vectors from which on they are searched by an approximate index; below, every one is compared."""
PROBED_SHARE, FEWEST_PROBED = 0.1, 20  # of the partitions of the approximate index
TRAINING_ROWS, TRAINING_PASSES = 64, 20  # of k-means: rows for each partition; more take longer and find no more
REFINE_FACTOR = 50  # times as many candidates are compared by their whole vectors
SHOWN_SIZE = 192
KEPT_VERSIONS = timedelta(minutes=10)  # of a table, for searches that have begun on one
Searched = Literal["images", "texts"]


@dataclass(kw_only=True)
class IndexSummary:
    """What a call of `build_index` did, in numbers of images, and what could not be read."""

    added: int = 0
    changed: int = 0
    deleted: int = 0
    unchanged: int = 0
    rejects: list[Reject] = field(default_factory=list)


class Hit(NamedTuple):
    """One result of a search."""

    shard: str
    key: str
    text: str
    """Of a search for texts the text that was found; else the first text of the image, which may be empty."""
    similarity: float
    """The cosine of the ITC embeddings; of several vectors of an image the largest."""
    match: float | None
    """The probability that image and text match, by ITM; None for what was not re-ranked."""
    thumbnail: bytes | None
    """A small JPEG file; None when it was not asked for."""


def build_index(
    spec: str,
    predictor: BasePredictor,
    out: str | Path,
    *,
    checkpoint: str,
    reading: DecodingAhead,
    batch_size: int = 32,
) -> IndexSummary:
    """Index every image of a source, and every text that came with one, or bring an index up to date.

    New images, and those whose bytes or texts have changed, are embedded; those that are gone leave the index. What has
    only another name, or lies in another shard, keeps its vectors, and counts as unchanged. A tar or parquet file that
    is as it was, and of which all could be read, is not read again. Nothing leaves of a shard that ends early or cannot
    be opened. `out` is a local folder or a URL of `STORES`; `checkpoint` is what the index says its vectors are of.

    Raises SourceError for a source that is missing or empty; UnsupportedTaskError for a model without ITC; ConfigError,
    which shows the difference, when `out` holds the index of another source or model, or another process writes it.
    """
    if missing := {"embed_images", "embed_texts"} - predictor.tasks:
        raise UnsupportedTaskError(
            f"{checkpoint} cannot {' and '.join(sorted(missing))}, which an index needs; `openblip models` lists those "
            "that can (match, similarity)"
        )
    root = index_place(out)
    source = open_source(spec, **reading.reading)
    check_options_used([source], reading)
    shards = list(source.shards())
    if not shards:
        raise SourceError(f"{spec} holds no shards; there is nothing to index")
    summary = IndexSummary()
    with _written_by_one(root):
        writer = _IndexWriter(root, predictor, reading, batch_size, summary)
        writer.begin(spec, checkpoint)
        states = {shard: _state(source, shard) for shard in shards}
        writer.read(source, {shard: state for shard, state in states.items() if not writer.holds(shard, state)})
        writer.remove_gone()  # after all was read, since what is gone from one shard may have moved to another
        writer.forget(writer.shards.keys() - set(shards))
        for table in (writer.images, writer.texts):
            optimize(table)
    return summary


def _state(source: Source, shard: str) -> dict[str, Any]:
    """What tells that a shard is as it was; nothing where its samples have to be compared one by one, such as files of
    their own, and for a file that cannot be opened.
    """
    try:
        return dict(source.file_state(shard)) if source.is_self_contained(shard) else {}
    except (SourceError, OSError):  # reading it says why
        return {}


@contextmanager
def _written_by_one(root: Path) -> Iterator[None]:
    """Keep other processes from writing a local index; the lock of a process that was killed holds nobody up."""
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    if "index.json" not in names and any(name != LOCK and not name.endswith(PARTIAL) for name in names):
        raise ConfigError(f"{root} is not empty and no index; choose another --out")
    if not is_local(root):
        yield  # object stores have no locks
        return
    root.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(root / LOCK).acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(f"{root} is being written by another `openblip index`; wait until it has ended") from error
    with lock:
        remove_partials(root)
        yield


class _Image(NamedTuple):
    """An image as the model takes it, its width and height, and a small JPEG file."""

    pixels: Pixels
    size: tuple[int, int]
    thumbnail: bytes


class _Entry(NamedTuple):
    """An image that is to be in the index; without its file, unless the index holds it in another place."""

    sample: Sample
    stamp: str
    replaces: bool  # an earlier image, or earlier texts, of its shard and key


class _Embedded(NamedTuple):
    """An image that only has to be written."""

    entry: _Entry
    size: tuple[int, int]
    thumbnail: bytes
    vectors: Tensor  # (Q, D)


class _IndexWriter:
    """The tables of an index that is being written.

    Threads read and decode ahead while the model embeds one batch after another. What is embedded is written after
    some thousand images, or after a while; a kill loses no more than that.
    """

    def __init__(
        self, root: Path, predictor: BasePredictor, reading: DecodingAhead, batch_size: int, summary: IndexSummary
    ) -> None:
        self.root, self.predictor, self.reading = root, predictor, reading
        self.batch_size, self.summary = batch_size, summary
        self.shards: dict[str, Any] = {}  # as shards.json says
        self.finished: dict[str, Mapping[str, Any]] = {}  # shards that were read whole, but are not noted yet
        self.gone: dict[str, list[str]] = {}  # by shard, keys that the source has no more
        self.copied: set[tuple[str, str]] = set()  # shard and key of images whose vectors new ones have taken
        self.waiting: list[tuple[_Entry, _Image]] = []  # for the model
        self.embedded: list[_Embedded] = []  # to be written
        self.held: list[_Entry] = []  # in another place of the index, from which they are to be copied
        self.held_bytes = 0

    def begin(self, spec: str, checkpoint: str) -> None:
        """Make the folder, or check that it is the index of the same source and model."""
        reading = self.reading
        width = self.predictor.embed_texts(["a"]).shape[1]
        identity = {
            "source": absolute_spec(spec),
            "images": reading.images and storage.absolute(reading.images),
            "image_column": reading.image_column,
            "caption_column": reading.caption_column,
            "model": self.predictor.fingerprint(),
            "embed_dim": width,
        }
        path = self.root / "index.json"
        if path.is_file():
            earlier = read_json(path)
            if changed := changed_settings({name: earlier.get(name) for name in identity}, identity):
                raise ConfigError(
                    f"{self.root} holds another index: {'; '.join(changed.values())}. Repeat the earlier settings to "
                    "bring it up to date, or choose another --out.",
                    page="image-search.md",
                )
        write_json(path, {**identity, "checkpoint": checkpoint, "openblip": version("openblip")})
        self.images, self.texts = make_tables(self.root, width)
        if (self.root / "shards.json").is_file():
            self.shards = read_json(self.root / "shards.json")
        self.begun = {shard for shard, state in self.shards.items() if not state}
        self._look_over()

    def _look_over(self) -> None:
        """Learn how many images of each shard the index holds, and the beginnings of all stamps, sorted."""
        rows, stamps = Counter[str](), [np.zeros(0, np.uint64)]
        for batch in _batches(self.images, ["shard", "stamp"]):
            for entry in batch["shard"].value_counts().to_pylist():
                rows[entry["values"]] += entry["counts"]
            digits = bytes.fromhex("".join(batch["stamp"].to_pylist()))
            stamps.append(np.unique(np.frombuffer(digits, ">u8").reshape(batch.num_rows, -1)[:, 0].astype(np.uint64)))
        self.stamps = np.unique(np.concatenate(stamps))
        per_image = _vectors_per_image(self.images)
        self.num_images = {shard: count // per_image for shard, count in rows.items()}

    def holds(self, shard: str, state: Mapping[str, Any]) -> bool:
        """Whether a whole shard is in the index as it is; its images then count as unchanged."""
        if not state or self.shards.get(shard) != state:
            return False
        self.summary.unchanged += self.num_images.get(shard, 0)
        return True

    def read(self, source: Source, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Embed what is new or has changed in these shards, and list what is gone of each."""

        def prepare(sample: Sample) -> tuple[str, _Image | None]:
            stamp = hash_bytes("\0".join(["", *sample.captions]) + "\0" + hash_bytes(sample.image).hex()).hex()
            return stamp, None if self._may_hold(stamp) else self._decode(sample)

        self._note({shard: {} for shard in states})  # before anything of them is written
        entries = read_source(
            source,
            prepare,
            shards=[*states],
            num_workers=self.reading.num_workers,
            ahead=4 * self.batch_size,
            keep_going=True,
        )
        self.written_at = time.monotonic()
        with closing(entries), Progress("indexing", unit="images") as bar:
            for shard, of_shard in _by_shard(entries, [*states]):
                known = self._known(shard)
                met: set[str] = set()
                num_rejects, is_whole = len(self.summary.rejects), True
                for entry in of_shard:
                    bar.advance()
                    if isinstance(entry, Reject):
                        self.summary.rejects.append(entry)
                        is_whole = is_whole and bool(entry.key)
                        continue
                    sample, (stamp, image) = entry
                    met.add(sample.key)
                    if known.get(sample.key) == stamp:
                        self.summary.unchanged += 1
                    else:
                        self._take(_Entry(sample, stamp, sample.key in known), image)
                        self._write_if_due()
                if is_whole and (gone := sorted(known.keys() - met)):
                    self.gone[shard] = gone
                # What could not be read is tried again by the next call.
                self.finished[shard] = states[shard] if len(self.summary.rejects) == num_rejects else {}
                self._write_if_due()
        self._write()
        self._embed()
        self._write()

    def _known(self, shard: str) -> dict[str, str]:
        """The stamp of each image of a shard that is in the index, by key."""
        rows = None
        if self.num_images.get(shard):
            rows = _select(self.images, f"shard = {quoted(shard)}", ["key", "stamp"])
        known = {} if rows is None else dict(zip(rows["key"].to_pylist(), rows["stamp"].to_pylist(), strict=True))
        if shard in self.begun:  # a kill may have left texts without their images
            keys = _select(self.texts, f"shard = {quoted(shard)}", ["key"])["key"].unique().to_pylist()
            for group in _groups(sorted(set(keys) - known.keys())):
                self.texts.delete(f"shard = {quoted(shard)} AND key IN ({', '.join(map(quoted, group))})")
        return known

    def _may_hold(self, stamp: str) -> bool:
        """Whether the index held this image somewhere when this call began."""
        beginning = np.uint64(int(stamp[:16], 16))
        at = int(self.stamps.searchsorted(beginning))
        return at < len(self.stamps) and bool(self.stamps[at] == beginning)

    def _decode(self, sample: Sample) -> _Image:
        scaled_for = self.predictor.preprocessing.image_size if self.reading.jpeg == "scaled" else None
        with read_image(sample.image, name=sample.place, scaled_for=scaled_for) as image:
            pixels = self.predictor.preprocessing(image)
            # A JPEG may have been scaled down as it was decoded.
            size = max(image.size, upright_size(sample.image, sample.place), key=math.prod)
            image.thumbnail((SHOWN_SIZE, SHOWN_SIZE))
            file = io.BytesIO()
            image.save(file, "JPEG", quality=80)
        return _Image(pixels, size, file.getvalue())

    def _take(self, entry: _Entry, image: _Image | None) -> None:
        """Put a new or changed image to those that wait."""
        self.summary.changed += entry.replaces
        self.summary.added += not entry.replaces
        if image is None:
            self.held.append(entry)
            self.held_bytes += len(entry.sample.image)
        else:
            self._wait(entry, image)

    def _write_if_due(self) -> None:
        """Write where there is much to write, or it was long ago."""
        if (
            len(self.embedded) + len(self.held) >= ROWS_PER_COMMIT
            or self.held_bytes >= HELD_BYTES
            or time.monotonic() - self.written_at >= SECONDS_PER_COMMIT
        ):
            self._write()

    def _wait(self, entry: _Entry, image: _Image) -> None:
        self.waiting.append((entry._replace(sample=replace(entry.sample, image=b"")), image))
        if len(self.waiting) == self.batch_size:
            self._embed()

    def _embed(self) -> None:
        """Embed the images that wait, as one batch."""
        if not self.waiting:
            return
        vectors = self.predictor.embed_images(
            self.predictor.stack([image.pixels for _, image in self.waiting]), self.batch_size
        )
        for (entry, image), of_image in zip(self.waiting, vectors, strict=True):  # (D,) or (Q, D)
            if of_image.isfinite().all():
                of_image = of_image.reshape(-1, vectors.shape[-1])
                self.embedded.append(_Embedded(entry, image.size, image.thumbnail, of_image))
                continue
            self._reject(entry.sample, "the model's vector of this image is not a number")
            if entry.replaces:
                self._remove([entry.sample])
                self.summary.changed -= 1
                self.summary.deleted += 1
            else:
                self.summary.added -= 1
        self.waiting.clear()

    def _reject(self, sample: Sample, reason: str) -> None:
        self.summary.rejects.append(Reject(sample.shard, sample.key, reason))
        if sample.shard in self.finished:
            self.finished[sample.shard] = {}

    def _write(self) -> None:
        """Write what was embedded, and what the index holds in another place; note what is whole by this."""
        held, self.held, self.held_bytes = self.held, [], 0
        for entry in self._copy(held):  # those that have left the other place meanwhile
            self._wait(entry, self._decode(entry.sample))
        self._add(self.embedded)
        self.embedded.clear()
        if not self.waiting:
            self._note({shard: state for shard, state in self.finished.items() if shard not in self.gone})
        self.written_at = time.monotonic()

    def _copy(self, entries: Sequence[_Entry]) -> list[_Entry]:
        """Put images and texts that the index holds in other places into these; returns those that it does not hold."""
        if not entries:
            return []
        images = _select_in(self.images, "stamp", sorted({entry.stamp for entry in entries}))
        origin: dict[str, tuple[str, str]] = {}  # of a stamp, shard and key of an image that has it
        for stamp, place in zip(images["stamp"].to_pylist(), _places_of(images), strict=True):
            origin.setdefault(stamp, place)
        texts = _select_in(self.texts, "id", sorted({_image_id(*place) for place in origin.values()}))
        found = [(entry, origin[entry.stamp]) for entry in entries if entry.stamp in origin]

        def moved(rows: pa.Table) -> pa.Table:
            rows_of: dict[tuple[str, str], list[int]] = {}
            for row, place in enumerate(_places_of(rows)):
                rows_of.setdefault(place, []).append(row)
            taken = [(entry.sample, row) for entry, place in found for row in rows_of.get(place, [])]
            rows = rows.take(pa.array([row for _, row in taken], pa.int64()))
            for name, column in _places(sample for sample, _ in taken).items():
                rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(column, pa.string()))
            return rows

        images, texts = moved(images), moved(texts)
        self._remove([entry.sample for entry, _ in found if entry.replaces])
        for table, rows in ((self.texts, texts), (self.images, images)):  # in the order of `_add`
            if rows.num_rows:
                table.add(rows)
        self.copied.update(place for entry, place in found if not entry.replaces)
        return [entry for entry in entries if entry.stamp not in origin]

    def _add(self, embedded: Sequence[_Embedded]) -> None:
        """Put images and their texts into the tables, in place of what was there.

        Texts go first: an image whose row is there is whole.
        """
        if not embedded:
            return
        self._remove([image.entry.sample for image in embedded if image.entry.replaces])
        texts = [(sample, text) for (sample, _, _), *_ in embedded for text in sample.captions if text.strip()]
        vectors = self.predictor.embed_texts([text for _, text in texts], self.batch_size)
        is_finite = vectors.isfinite().all(1).tolist()
        for sample, text in compress(texts, (not finite for finite in is_finite)):
            self._reject(sample, f"the model's vector of the text {text!r:.100} is not a number")
        if texts := list(compress(texts, is_finite)):
            places, captions = _places(sample for sample, _ in texts), [text for _, text in texts]
            self.texts.add(_table(self.texts, vectors[is_finite].numpy(), places, caption=captions))
        repeated = [image for image in embedded for _ in image.vectors]
        # Of several vectors of an image the first has it.
        thumbnails = [image.thumbnail if n == 0 else None for image in embedded for n in range(len(image.vectors))]
        self.images.add(
            _table(
                self.images,
                torch.cat([image.vectors for image in embedded]).numpy(),
                _places(image.entry.sample for image in repeated),
                stamp=[image.entry.stamp for image in repeated],
                caption=[next(iter(image.entry.sample.captions), "") for image in repeated],
                width=[image.size[0] for image in repeated],
                height=[image.size[1] for image in repeated],
                thumbnail=thumbnails,
            )
        )

    def _remove(self, samples: Iterable[Sample]) -> None:
        """Take images and their texts out of the tables."""
        keys_of: dict[str, list[str]] = {}
        for sample in samples:
            keys_of.setdefault(sample.shard, []).append(sample.key)
        for shard, keys in keys_of.items():
            self._remove_keys(shard, keys)

    def _remove_keys(self, shard: str, keys: Sequence[str]) -> None:
        for group in _groups(keys):
            where = f"shard = {quoted(shard)} AND key IN ({', '.join(map(quoted, group))})"
            self.images.delete(where)
            self.texts.delete(where)

    def remove_gone(self) -> None:
        """Take out of the index what `read` did not find any more."""
        for shard, keys in self.gone.items():
            self._count_gone(shard, keys)
            self._remove_keys(shard, keys)
        self._note({shard: self.finished[shard] for shard in self.gone})

    def forget(self, shards: Iterable[str]) -> None:
        """Take shards out of the index."""
        for shard in (forgotten := frozenset(shards)):
            self._count_gone(shard, self._known(shard))
            for table in (self.images, self.texts):
                table.delete(f"shard = {quoted(shard)}")
        if forgotten:
            self.shards = {shard: state for shard, state in self.shards.items() if shard not in forgotten}
            write_json(self.root / "shards.json", self.shards)

    def _count_gone(self, shard: str, keys: Iterable[str]) -> None:
        for key in keys:
            if (shard, key) in self.copied:  # it has moved: what was counted as added is not new
                self.summary.added -= 1
                self.summary.unchanged += 1
            else:
                self.summary.deleted += 1

    def _note(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Note that the index holds all of shards whose files have these states, or, where empty, a part of them."""
        if changed := {shard: state for shard, state in states.items() if self.shards.get(shard) != state}:
            self.shards |= changed
            write_json(self.root / "shards.json", self.shards)


class ImageIndex:
    """An index that was built, for searching; safe to use from several threads."""

    def __init__(
        self,
        folder: str | Path,
        predictor: BasePredictor | str | None = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        """Open an index, in a local folder or below a URL of `STORES`.

        predictor: the model that the index was built with, or its checkpoint where that has moved.

        A model that is not given is loaded to `device` in `dtype`, once it is clear that the folder is an index. What
        another process adds to the index later is found, too.

        Raises ConfigError when the folder is no index, or the predictor another model.
        """
        import openblip

        self.root = index_place(folder)
        path = self.root / "index.json"
        try:
            is_index = storage.exists(str(path))
        except OSError as error:
            raise ConfigError(f"{folder} cannot be read: {error}") from error
        if not is_index:
            raise ConfigError(f"{folder} is no index: it has no index.json; make one with `openblip index`")
        self.settings = read_json(path)
        database = connect(self.root)
        try:
            self.images, self.texts = database.open_table("images"), database.open_table("texts")
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"{folder} has no whole tables; run `openblip index` again ({error})") from error
        if isinstance(predictor, str | None):
            predictor = openblip.load(predictor or self.settings["checkpoint"], device=device, dtype=dtype)
        self.predictor = predictor
        if self.predictor.fingerprint() != self.settings["model"]:
            raise ConfigError(
                f"{folder} was made with {self.settings['checkpoint']}, whose weights differ from those given now; "
                "search with the same model, or make another index"
            )

    def __len__(self) -> int:
        """Number of image vectors; BLIP has one per image, BLIP-2 one per query."""
        return int(self.images.count_rows())

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self) // _vectors_per_image(self.images)

    def search(
        self,
        text: str | None = None,
        image: ImageInput | None = None,
        *,
        find: Searched = "images",
        top: int = 20,
        rerank: int = 0,
        where: str | None = None,
        exact: bool = False,
        thumbnails: bool = False,
    ) -> list[Hit]:
        """The images, or texts, nearest to a text, an image or both, best first.

        With text and image the sum of their vectors is searched for. rerank: so many of the nearest are compared anew
        by ITM, and these come first, ordered by similarity plus P(match) as in the papers' retrieval; images are read
        again from the source. where: a condition of SQL on the columns `shard`, `key`, `caption`, and of images `width`
        and `height`. exact: compare every vector, where an approximate index would be used.

        Raises ConfigError for what `check_query` refuses, a condition that cannot be understood, or a model that is to
        re-rank without ITM; ImageError for an image that cannot be read; SourceError when one of the source is gone.
        """
        check_query(text, image, find=find, top=top, rerank=rerank)
        query = self._query(text, image)  # (M, D)
        rows = self._nearest(query, find, max(top, rerank), where, exact, thumbnails)
        hits = [
            Hit(row["shard"], row["key"], row["caption"], row["similarity"], None, row.get("thumbnail")) for row in rows
        ]
        if rerank and hits:
            matches = self._matches(hits[:rerank], text, None if find == "images" else image)
            similarity = torch.tensor([hit.similarity for hit in hits])
            itm = torch.zeros_like(similarity)
            itm[: len(matches)] = torch.tensor(matches)
            scores = rerank_scores(similarity, itm, torch.arange(len(hits)) < len(matches))
            compared, others = hits[: len(matches)], hits[len(matches) :]
            hits = [hit._replace(match=match) for hit, match in zip(compared, matches, strict=True)] + others
            hits = [hits[i] for i in scores.argsort(descending=True, stable=True).tolist()]
        return hits[:top]

    def _query(self, text: str | None, image: ImageInput | None) -> NDArray[np.float32]:
        parts = []
        if image is not None:
            vectors = self.predictor.embed_images([image])[0]
            parts.append(vectors if vectors.ndim == 2 else vectors[None])
        if text is not None:
            parts.append(self.predictor.embed_texts([text]))
        vectors = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)
        if not vectors.isfinite().all():
            raise ConfigError("search: the model's vector of what is searched for is not a number")
        found: NDArray[np.float32] = vectors.numpy()
        return found

    def _nearest(
        self, query: NDArray[np.float32], find: Searched, count: int, where: str | None, exact: bool, thumbnails: bool
    ) -> list[dict[str, Any]]:
        """The nearest rows, one of each image or text, with `similarity`, best first."""
        table = self.images if find == "images" else self.texts
        if where:
            check_condition(where, table.schema.names)
        best: dict[tuple[str, str], dict[str, Any]] = {}
        for vector in query:
            for row in self._nearest_rows(table, vector, find, count, where, exact):
                row["similarity"] = 1.0 - row.pop("_distance")
                name = _name_of(row, find)
                if name not in best or best[name]["similarity"] < row["similarity"]:
                    best[name] = row
        nearest = sorted(best.values(), key=lambda row: (-row["similarity"], row["shard"], row["key"]))[:count]
        if thumbnails:
            self._add_thumbnails(nearest, find)
        return nearest

    def _nearest_rows(
        self, table: Any, vector: NDArray[np.float32], find: Searched, count: int, where: str | None, exact: bool
    ) -> list[dict[str, Any]]:
        """The rows of one vector of the query, enough of them for `count` images or texts where there are as many."""
        limit, is_bounded = count, True
        while True:
            search = table.search(vector, vector_column_name="vector").distance_type("dot")
            if where:
                search = search.where(f"({where})", prefilter=True)
            num_probed = 0 if exact else self._num_probed(table, limit)
            if num_probed:
                most = num_probed if is_bounded else 0  # 0 is no bound, and slower even where it is not reached
                search = search.minimum_nprobes(num_probed).maximum_nprobes(most).refine_factor(REFINE_FACTOR)
            else:
                search = search.bypass_vector_index()
            try:
                columns = ["id", "shard", "key", "caption", "_distance"]
                rows = search.with_row_id(True).select(columns).limit(limit).to_arrow().to_pylist()
            except (ValueError, RuntimeError, OSError) as error:
                if not where:
                    raise
                raise _condition_error(where, str(error), table.schema.names) from error
            if len(rows) < limit and num_probed and is_bounded:
                is_bounded = False  # a condition leaves too few rows in the nearest partitions
                continue
            # An image has several vectors, and a text may stand on an image twice.
            if len(rows) < limit or len({_name_of(row, find) for row in rows}) >= count:
                return list(rows)
            limit *= 4

    def _num_probed(self, table: Any, count: int) -> int:
        """Partitions of the approximate index that are searched for so many rows; 0 where each vector is compared."""
        rows: int = table.count_rows()
        if not table.list_indices() or count * REFINE_FACTOR >= rows:  # all would be compared
            return 0
        return max(FEWEST_PROBED, round(PROBED_SHARE * num_partitions(rows)))

    def _add_thumbnails(self, rows: Sequence[dict[str, Any]], find: Searched) -> None:
        wanted = {_image_id(row["shard"], row["key"]) for row in rows}
        columns, files = ["id", "thumbnail"], dict[str, bytes]()
        if find == "images" and rows:
            # Quick, but a commit since the search may have numbered rows anew, and one of several vectors has the file.
            numbered = self.images.take_row_ids([row["_rowid"] for row in rows]).select(columns).to_arrow()
            files = {row["id"]: row["thumbnail"] for row in numbered.to_pylist() if row["thumbnail"] is not None}
        for group in _groups(sorted(wanted - files.keys())):
            names = ", ".join(map(quoted, group))
            found = _select(self.images, f"id IN ({names}) AND thumbnail IS NOT NULL", columns)
            files |= {row["id"]: row["thumbnail"] for row in found.to_pylist()}
        for row in rows:
            row["thumbnail"] = files.get(_image_id(row["shard"], row["key"]))

    def _matches(self, hits: Sequence[Hit], text: str | None, image: ImageInput | None) -> list[float]:
        """P(match) of each hit: of its text with the image, or else of its image with the text."""
        if "match" not in self.predictor.tasks:
            raise ConfigError(f"{self.settings['checkpoint']} has no ITM, so it cannot re-rank; leave --rerank out")
        if image is not None:
            scores = self.predictor.match_matrix([image], [hit.text for hit in hits])
        else:
            assert text is not None  # `search` has asked for one of them
            scores = self.predictor.match_matrix(self._pixels(hits), [text])
        return [float(score) for score in scores.flatten()]

    def _pixels(self, hits: Sequence[Hit]) -> torch.Tensor:
        """The images of the hits, uint8 (I, 3, S, S), read again from the source."""
        source = open_source(self.settings["source"], **SourceOptions.stated(self.settings).reading)
        wanted = {(hit.shard, hit.key) for hit in hits}

        def prepare(sample: Sample) -> Pixels:
            return self.predictor.read_image(sample.image, sample.place)

        shards = [shard for shard in source.shards() if any(shard == hit.shard for hit in hits)]
        found: dict[tuple[str, str], Pixels] = {}
        for entry in read_source(source, prepare, shards=shards, skip=lambda s, k: (s, k) not in wanted):
            if not isinstance(entry, Reject):
                found[entry[0].shard, entry[0].key] = entry[1]
        for hit in hits:
            if (hit.shard, hit.key) not in found:
                raise SourceError(
                    f"{hit.shard}/{hit.key} can no longer be read from {self.settings['source']}; run `openblip index` "
                    "again to bring the index up to date, or search without --rerank"
                )
        return self.predictor.stack([found[hit.shard, hit.key] for hit in hits])


def check_query(
    text: str | None, image: ImageInput | None, *, find: Searched = "images", top: int = 20, rerank: int = 0
) -> None:
    """Raise ConfigError for a search that no index could answer; a command asks before it loads a model."""
    if top < 1 or rerank < 0:
        raise ConfigError("search: top must be at least 1, and rerank at least 0")
    if text is None and image is None:
        raise ConfigError("search: give a text, an image or both")
    if rerank and (text if find == "images" else image) is None:
        advice = "give a text to re-rank images, and an image to re-rank texts"
        raise ConfigError(f"search: re-ranking compares an image with a text by ITM: {advice}")


def check_condition(where: str, columns: Sequence[str]) -> None:
    """Raise ConfigError unless a condition is one expression over the columns that may be asked for. It reaches no
    files, and none of its functions makes values of any size: a server takes it from strangers.
    """
    try:
        unknown = sorted(columns_of(where, "search") - set(_conditional(columns)))
    except ConfigError as error:
        raise _condition_error(where, str(error), columns) from error
    if unknown:
        raise _condition_error(where, f"no column {', '.join(unknown)}; texts stand in single quotes", columns)


def _condition_error(where: str, reason: str, columns: Sequence[str]) -> ConfigError:
    reason = " ".join(reason.split())[:300]
    names = ", ".join(_conditional(columns))
    return ConfigError(
        f"search: the condition {where!r:.200} cannot be used ({reason}); columns: {names}", page="image-search.md"
    )


def _conditional(columns: Sequence[str]) -> list[str]:
    """The columns that a condition may ask for."""
    return [name for name in columns if name not in ("vector", "thumbnail", "stamp")]


def load_lancedb() -> Any:
    """The module of LanceDB. Raises MissingExtraError where it is not installed."""
    try:
        import lancedb
    except ImportError as error:
        raise MissingExtraError('an index needs LanceDB: pip install "openblip[search]"') from error
    return lancedb


def index_place(place: str | Path) -> Path:
    """The folder of an index, as `locate` gives it; a command asks before it loads a model.

    Raises ConfigError for the URL of a store that LanceDB does not write.
    """
    path = locate(place)
    if not is_local(path) and cast(Any, path).protocol not in STORES:
        stores = ", ".join(f"{store}://" for store in STORES)
        raise ConfigError(f"{place}: an index is in a local folder or below one of {stores}; name such a place")
    return path


def connect(root: Path) -> Any:
    """LanceDB's connection to the tables of an index below a path that `locate` gave."""
    return load_lancedb().connect(
        str(root / "lance"), storage_options=_storage_options(root), read_consistency_interval=SEEN_AFTER
    )


def _storage_options(root: Path) -> dict[str, str] | None:
    """What LanceDB must be told so that it reaches the same store as fsspec. Both know the variables of the environment
    and the files of the cloud's own tools, but not each other's settings.
    """
    if is_local(root) or cast(Any, root).protocol != "s3":
        return None
    files = cast(Any, root).fs
    options = {
        "aws_access_key_id": files.key,
        "aws_secret_access_key": files.secret,
        "aws_session_token": files.token,
        "skip_signature": "true" if files.anon else None,
    }
    endpoint, region = files.s3.meta.endpoint_url, files.s3.meta.region_name
    if not re.search(r"\.amazonaws\.com(\.cn)?$", endpoint):
        options |= {
            "aws_endpoint": endpoint,
            "aws_region": region,
            "allow_http": str(endpoint.startswith("http:")).lower(),
        }
    return {name: value for name, value in options.items() if value}


def make_tables(root: Path, width: int) -> tuple[Any, Any]:
    """The tables of images and of texts, with vectors of a width; those that are there already stay as they are."""
    vector = pa.list_(pa.float32(), width)
    place = [("id", pa.string()), ("shard", pa.string()), ("key", pa.string())]
    images = pa.schema([
        *place, ("stamp", pa.string()), ("caption", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
        ("thumbnail", pa.binary()), ("vector", vector),
    ])  # fmt: skip
    texts = pa.schema([*place, ("caption", pa.string()), ("vector", vector)])
    database = connect(root)
    return (
        database.create_table("images", schema=images, exist_ok=True),
        database.create_table("texts", schema=texts, exist_ok=True),
    )


def optimize(table: Any) -> None:
    """Join small files of a table, and make or extend its approximate index where there are enough vectors."""
    table.optimize(cleanup_older_than=KEPT_VERSIONS)
    rows = table.count_rows()
    if rows > APPROXIMATE_ABOVE and not table.list_indices():
        settings = load_lancedb().index.IvfPq(
            distance_type="dot",
            num_partitions=num_partitions(rows),
            num_sub_vectors=max(1, table.schema.field("vector").type.list_size // 8),
            sample_rate=TRAINING_ROWS,
            max_iterations=TRAINING_PASSES,
        )
        table.create_index("vector", config=settings)


def num_partitions(rows: int) -> int:
    """Of the approximate index of a table."""
    return max(1, math.isqrt(rows) // 2)


def quoted(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def _image_id(shard: str, key: str) -> str:
    return f"{shard}/{key}"


def _name_of(row: Mapping[str, Any], find: Searched) -> tuple[str, str]:
    """What tells one image, or one text of an image, from another."""
    return (row["shard"], row["key"]) if find == "images" else (row["id"], row["caption"])


def _vectors_per_image(images: Any) -> int:
    """Of the table of images."""
    first = images.search().select(["shard", "key"]).limit(1).to_arrow().to_pylist()
    if not first:
        return 1
    return int(images.count_rows(f"shard = {quoted(first[0]['shard'])} AND key = {quoted(first[0]['key'])}"))


def _by_shard(
    entries: Iterable[tuple[Sample, Any] | Reject], shards: Sequence[str]
) -> Iterator[tuple[str, Iterator[tuple[Sample, Any] | Reject]]]:
    """Each shard with what was read of it, which may be nothing; `entries` are in the order of the shards."""
    groups = groupby(entries, lambda entry: entry.shard if isinstance(entry, Reject) else entry[0].shard)
    following = next(groups, None)
    for shard in shards:
        if following is None or following[0] != shard:
            yield shard, iter(())
            continue
        yield following
        following = next(groups, None)
    assert following is None, f"{following[0]} is no shard of the source, or not in its order"


def _places(samples: Iterator[Sample]) -> dict[str, list[str]]:
    """The columns that say which image rows belong to."""
    listed = list(samples)
    return {
        "id": [_image_id(sample.shard, sample.key) for sample in listed],
        "shard": [sample.shard for sample in listed],
        "key": [sample.key for sample in listed],
    }


def _table(
    table: Any, vectors: NDArray[np.float32], places: Mapping[str, list[str]], **columns: Sequence[Any]
) -> pa.Table:
    """Rows for a table; vectors (R, D)."""
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    vector = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.table({**places, **columns, "vector": vector}, schema=table.schema)


def _batches(table: Any, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """All rows, a part after another."""
    return iter(table.search().select(list(columns)).limit(max(1, table.count_rows())).to_batches())


def _select(table: Any, where: str, columns: Sequence[str]) -> pa.Table:
    """The rows for which a condition holds."""
    count = table.count_rows(where)
    return table.search().where(where).select(list(columns)).limit(max(1, count)).to_arrow()


def _select_in(table: Any, column: str, values: Sequence[str]) -> pa.Table:
    """The rows, with all columns, that have one of these values in a column."""
    found = [
        _select(table, f"{column} IN ({', '.join(map(quoted, group))})", table.schema.names)
        for group in _groups(values)
    ]
    return pa.concat_tables([table.schema.empty_table(), *found])


def _places_of(rows: pa.Table) -> Iterator[tuple[str, str]]:
    """Shard and key of each row."""
    return zip(rows["shard"].to_pylist(), rows["key"].to_pylist(), strict=True)


def _groups(items: Sequence[Any], size: int = 500) -> Iterator[Sequence[Any]]:
    """Parts of a list, so that no condition grows without bound."""
    return (items[start : start + size] for start in range(0, len(items), size))
