"""An index of images, and of the texts that came with them: built from any source, searched by text or by image.

```
DIR/index.json      what was indexed with which model
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from openblip.data.config import DecodingAhead, SourceOptions
from openblip.data.images import ImageInput, Pixels, read_image
from openblip.data.reader import in_batches, read_source
from openblip.data.sample import Reject, Sample, Source
from openblip.data.sources import absolute_spec, check_options_used, open_source, storage
from openblip.errors import ConfigError, MissingExtraError, SourceError, UnsupportedTaskError
from openblip.files import changed_settings, hash_bytes, read_json, write_json
from openblip.predictor import BasePredictor
from openblip.predictor.reranking import rerank_scores
from openblip.progress import Progress

ROWS_PER_COMMIT = 4096  # a commit writes a file of each column; what is not committed is embedded again after a kill
APPROXIMATE_ABOVE = 50_000
"""Vectors from which on they are searched by an approximate index; below, every one is compared."""
PROBED_SHARE = 0.1  # of the partitions of the approximate index
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
    is as it was, and of which all could be read, is not read again. `checkpoint` is what the index says its vectors are
    of.

    Raises SourceError for a source that is missing or empty; UnsupportedTaskError for a model without ITC; ConfigError,
    which shows the difference, when `out` holds the index of another source or model.
    """
    if missing := {"embed_images", "embed_texts"} - predictor.tasks:
        raise UnsupportedTaskError(
            f"{checkpoint} cannot {' and '.join(sorted(missing))}, which an index needs; `openblip models` lists those "
            "that can (match, similarity)"
        )
    source = open_source(spec, **reading.reading)
    check_options_used([source], reading)
    shards = list(source.shards())
    if not shards:
        raise SourceError(f"{spec} holds no shards; there is nothing to index")
    writer = _IndexWriter(Path(out), predictor, batch_size)
    writer.begin(spec, reading, checkpoint)
    summary = IndexSummary()
    with Progress("indexing", unit="images") as bar:
        finished: dict[str, Mapping[str, Any]] = {}  # but for what is gone
        for shard in shards:
            # What lies in files of its own is compared sample by sample.
            state = dict(source.file_state(shard)) if source.is_self_contained(shard) else {}
            known = writer.known(shard)
            if state and writer.shards.get(shard) == state:
                summary.unchanged += len(known)
                continue
            rejects = len(summary.rejects)
            writer.note_shard(shard, {})
            writer.index_shard(source, shard, known, reading, summary, bar)
            # What could not be read is tried again by the next call.
            finished[shard] = state if len(summary.rejects) == rejects else {}
            if shard not in writer.gone:
                writer.note_shard(shard, finished[shard])
        # Last, since what is gone from one shard may have moved to another.
        for shard in [*writer.gone]:
            writer.remove_gone(shard, summary)
            writer.note_shard(shard, finished[shard])
        for shard in writer.shards.keys() - set(shards):
            writer.forget(shard, summary)
    writer.optimize()
    return summary


class _IndexWriter:
    """The tables of an index that is being written."""

    def __init__(self, root: Path, predictor: BasePredictor, batch_size: int) -> None:
        self.root, self.predictor, self.batch_size = root, predictor, batch_size
        self.shards: dict[str, Any] = {}
        self.gone: dict[str, list[str]] = {}  # by shard, keys that the source has no more
        self.copied: set[tuple[str, str]] = set()  # shard and key of images whose vectors new ones have taken

    def begin(self, spec: str, reading: SourceOptions, checkpoint: str) -> None:
        """Make the folder, or check that it is the index of the same source and model."""
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
        elif self.root.is_dir() and any(self.root.iterdir()):
            raise ConfigError(f"{self.root} is not empty and no index; choose another --out")
        self.images, self.texts = make_tables(self.root, width)
        write_json(path, {**identity, "checkpoint": checkpoint, "openblip": version("openblip")})
        if (self.root / "shards.json").is_file():
            self.shards = read_json(self.root / "shards.json")

    def known(self, shard: str) -> dict[str, str]:
        """The stamp of each image of a shard that is in the index, by key."""
        rows = _select(self.images, f"shard = {quoted(shard)}", ["key", "stamp"])
        return dict(zip(rows["key"].to_pylist(), rows["stamp"].to_pylist(), strict=True))

    def forget(self, shard: str, summary: IndexSummary) -> None:
        """Take a shard out of the index."""
        self._count_gone(shard, self.known(shard), summary)
        for table in (self.images, self.texts):
            table.delete(f"shard = {quoted(shard)}")
        self.shards.pop(shard)
        write_json(self.root / "shards.json", self.shards)

    def remove_gone(self, shard: str, summary: IndexSummary) -> None:
        """Take out of the index what `index_shard` did not find any more."""
        keys = self.gone.pop(shard)
        self._count_gone(shard, keys, summary)
        self._remove(shard, keys)

    def _count_gone(self, shard: str, keys: Iterable[str], summary: IndexSummary) -> None:
        for key in keys:
            if (shard, key) in self.copied:  # it has moved: what was counted as added is not new
                summary.added -= 1
                summary.unchanged += 1
            else:
                summary.deleted += 1

    def note_shard(self, shard: str, state: Mapping[str, Any]) -> None:
        """Note that the index holds all of a shard whose file has this state, or, when empty, a part of it."""
        if self.shards.get(shard) != state:
            self.shards[shard] = state
            write_json(self.root / "shards.json", self.shards)

    @cached_property
    def _stamps(self) -> NDArray[np.uint64]:
        """The beginnings of the stamps of all images that the index held at first, sorted."""
        rows = self.images.search().select(["stamp"]).limit(max(1, self.images.count_rows())).to_batches()
        begun = [int(stamp[:16], 16) for batch in rows for stamp in batch["stamp"].to_pylist()]
        return np.unique(np.array(begun, np.uint64))

    def _is_held(self, stamp: str) -> bool:
        """Whether the index may hold this image somewhere."""
        begun = np.uint64(int(stamp[:16], 16))
        at = int(self._stamps.searchsorted(begun))
        return at < len(self._stamps) and bool(self._stamps[at] == begun)

    def index_shard(
        self,
        source: Source,
        shard: str,
        known: Mapping[str, str],
        reading: DecodingAhead,
        summary: IndexSummary,
        bar: Progress,
    ) -> None:
        """Embed what is new or has changed in a shard, and list what is gone."""
        self._remove_left_texts(shard, known)
        scaled_for = self.predictor.preprocessing.image_size if reading.jpeg == "scaled" else None
        met: set[str] = set()
        self._stamps  # noqa: B018  # before the threads ask for it

        def prepare(sample: Sample) -> tuple[str, _Image | None]:
            stamp = hash_bytes("\0".join(["", *sample.captions]) + "\0" + hash_bytes(sample.image).hex()).hex()
            return stamp, None if self._is_held(stamp) else self._read(sample, scaled_for)

        entries = read_source(
            source, prepare, shards=[shard], num_workers=reading.num_workers, ahead=4 * self.batch_size
        )
        waiting: list[tuple[Sample, str, _Image]] = []
        held: list[tuple[Sample, str]] = []  # in another place

        def commit() -> None:
            missing = self._copy(held, known)
            self._commit(
                [*waiting, *((sample, stamp, self._read(sample, scaled_for)) for sample, stamp in missing)], known
            )
            waiting.clear()
            held.clear()

        with closing(in_batches(entries, self.batch_size)) as batches:
            for batch in batches:
                summary.rejects += batch.rejects
                for sample, (stamp, image) in batch.samples:
                    met.add(sample.key)
                    if known.get(sample.key) == stamp:
                        summary.unchanged += 1
                        continue
                    if image is None:
                        held.append((sample, stamp))
                    else:
                        waiting.append((sample, stamp, image))
                    summary.changed += sample.key in known
                    summary.added += sample.key not in known
                if len(waiting) + len(held) >= ROWS_PER_COMMIT:
                    commit()
                bar.advance(len(batch.samples) + len(batch.rejects))
        commit()
        if gone := sorted(known.keys() - met):
            self.gone[shard] = gone

    def _read(self, sample: Sample, scaled_for: int | None) -> "_Image":
        with read_image(sample.image, name=sample.place, scaled_for=scaled_for) as image:
            pixels = self.predictor.preprocessing(image)
            size = image.size
            image.thumbnail((SHOWN_SIZE, SHOWN_SIZE))
            file = io.BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=80)
        return _Image(pixels, size, file.getvalue())

    def _remove_left_texts(self, shard: str, known: Mapping[str, str]) -> None:
        """Take out the texts that a kill left without their images, whether or not the source still has these."""
        keys = _select(self.texts, f"shard = {quoted(shard)}", ["key"])["key"].unique().to_pylist()
        for group in _groups(sorted(set(keys) - known.keys())):
            self.texts.delete(f"shard = {quoted(shard)} AND key IN ({', '.join(map(quoted, group))})")

    def _copy(self, entries: Sequence[tuple[Sample, str]], known: Mapping[str, str]) -> list[tuple[Sample, str]]:
        """Put images and texts that the index holds in other places into these; returns those that it does not hold."""
        if not entries:
            return []
        images = _select_in(self.images, "stamp", sorted({stamp for _, stamp in entries}))
        origin: dict[str, tuple[str, str]] = {}  # of a stamp, shard and key of an image that has it
        for stamp, place in zip(images["stamp"].to_pylist(), _places_of(images), strict=True):
            origin.setdefault(stamp, place)
        texts = _select_in(self.texts, "id", sorted({_image_id(*place) for place in origin.values()}))
        found = [(sample, origin[stamp]) for sample, stamp in entries if stamp in origin]

        def moved(rows: pa.Table) -> pa.Table:
            rows_of: dict[tuple[str, str], list[int]] = {}
            for row, place in enumerate(_places_of(rows)):
                rows_of.setdefault(place, []).append(row)
            taken = [(sample, row) for sample, place in found for row in rows_of.get(place, [])]
            rows = rows.take(pa.array([row for _, row in taken], pa.int64()))
            for name, column in _places(sample for sample, _ in taken).items():
                rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(column, pa.string()))
            return rows

        images, texts = moved(images), moved(texts)
        self._remove(entries[0][0].shard, sorted({sample.key for sample, _ in found} & known.keys()))
        for table, rows in ((self.texts, texts), (self.images, images)):  # in the order of `_commit`
            if rows.num_rows:
                table.add(rows)
        self.copied.update(place for sample, place in found if sample.key not in known)
        return [(sample, stamp) for sample, stamp in entries if stamp not in origin]

    def _commit(self, entries: Sequence[tuple[Sample, str, "_Image"]], known: Mapping[str, str]) -> None:
        """Embed images and their texts and put them into the tables, in place of what was there.

        Texts go first: an image whose row is there is whole.
        """
        if not entries:
            return
        samples = [sample for sample, _, _ in entries]
        self._remove(samples[0].shard, sorted({sample.key for sample in samples} & known.keys()))
        texts = [(sample, text) for sample in samples for text in sample.captions if text.strip()]
        if texts:
            vectors = self.predictor.embed_texts([text for _, text in texts], self.batch_size).numpy()
            self.texts.add(
                _table(self.texts, vectors, _places(sample for sample, _ in texts), caption=[t for _, t in texts])
            )
        pixels = self.predictor.stack([image.pixels for _, _, image in entries])
        vectors = self.predictor.embed_images(pixels, self.batch_size).numpy()  # (I, D) or (I, Q, D)
        count = 1 if vectors.ndim == 2 else vectors.shape[1]
        repeated = [entry for entry in entries for _ in range(count)]
        self.images.add(
            _table(
                self.images,
                vectors.reshape(-1, vectors.shape[-1]),
                _places(sample for sample, _, _ in repeated),
                stamp=[stamp for _, stamp, _ in repeated],
                caption=[next(iter(sample.captions), "") for sample, _, _ in repeated],
                width=[image.size[0] for _, _, image in repeated],
                height=[image.size[1] for _, _, image in repeated],
                # of several vectors the first has it
                thumbnail=[e[2].thumbnail if i % count == 0 else None for i, e in enumerate(repeated)],
            )
        )

    def _remove(self, shard: str, keys: Sequence[str]) -> None:
        for group in _groups(keys):
            where = f"shard = {quoted(shard)} AND key IN ({', '.join(map(quoted, group))})"
            self.images.delete(where)
            self.texts.delete(where)

    def optimize(self) -> None:
        """Join small files, and make or extend the approximate index where there are enough vectors."""
        for table in (self.images, self.texts):
            optimize(table)


class _Image(NamedTuple):
    """An image as the model takes it, its width and height, and a small JPEG file."""

    pixels: Pixels
    size: tuple[int, int]
    thumbnail: bytes


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
        """Open an index. `predictor`: the model that it was built with, or its checkpoint where that has moved.

        A model that is not given is loaded to `device` in `dtype`, once it is clear that the folder is an index.

        Raises ConfigError when the folder is no index, or the predictor another model.
        """
        import openblip

        self.root = Path(folder)
        path = self.root / "index.json"
        if not path.is_file():
            raise ConfigError(f"{folder} is no index: it has no index.json; make one with `openblip index`")
        self.settings = read_json(path)
        if not isinstance(predictor, BasePredictor):
            predictor = openblip.load(predictor or self.settings["checkpoint"], device=device, dtype=dtype)
        self.predictor = predictor
        if self.predictor.fingerprint() != self.settings["model"]:
            raise ConfigError(
                f"{folder} was made with {self.settings['checkpoint']}, whose weights differ from those given now; "
                "search with the same model, or make another index"
            )
        database = connect(self.root)
        self.images, self.texts = database.open_table("images"), database.open_table("texts")

    def __len__(self) -> int:
        """Number of image vectors; BLIP has one per image, BLIP-2 one per query."""
        return int(self.images.count_rows())

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
        found: NDArray[np.float32] = torch.nn.functional.normalize(vectors.float(), dim=-1).numpy()
        return found

    def _nearest(
        self, query: NDArray[np.float32], find: Searched, count: int, where: str | None, exact: bool, thumbnails: bool
    ) -> list[dict[str, Any]]:
        """The nearest rows, one of each image or text, with `similarity`, best first."""
        table = self.images if find == "images" else self.texts
        columns = ["id", "shard", "key", "caption"]
        per_image = max(1, self._vectors_per_image) if find == "images" else 1
        best: dict[tuple[str, str], dict[str, Any]] = {}
        for vector in query:
            search = table.search(vector, vector_column_name="vector").distance_type("dot")
            if where:
                search = search.where(f"({where})", prefilter=True)
            if exact:
                search = search.bypass_vector_index()
            elif partitions := self._partitions(table):
                search = search.nprobes(max(20, round(PROBED_SHARE * partitions))).refine_factor(REFINE_FACTOR)
            try:
                rows = search.select([*columns, "_distance"]).limit(count * per_image).to_arrow().to_pylist()
            except (ValueError, RuntimeError, OSError) as error:
                if not where:
                    raise
                names = ", ".join(name for name in table.schema.names if name not in ("vector", "thumbnail", "stamp"))
                reason = " ".join(str(error).split())[:300]
                raise ConfigError(
                    f"search: the condition {where!r} cannot be used ({reason}); columns: {names}"
                ) from error
            for row in rows:
                row["similarity"] = 1.0 - row.pop("_distance")
                name = (row["shard"], row["key"]) if find == "images" else (row["id"], row["caption"])
                if name not in best or best[name]["similarity"] < row["similarity"]:
                    best[name] = row
        nearest = sorted(best.values(), key=lambda row: (-row["similarity"], row["shard"], row["key"]))[:count]
        if thumbnails:
            self._add_thumbnails(nearest)
        return nearest

    @cached_property
    def _vectors_per_image(self) -> int:
        first = self.images.search().select(["shard", "key"]).limit(1).to_arrow().to_pylist()
        if not first:
            return 1
        return int(self.images.count_rows(f"shard = {quoted(first[0]['shard'])} AND key = {quoted(first[0]['key'])}"))

    def _partitions(self, table: Any) -> int:
        """Of the approximate index; 0 without."""
        rows: int = table.count_rows()
        return num_partitions(rows) if table.list_indices() else 0

    def _add_thumbnails(self, rows: Sequence[dict[str, Any]]) -> None:
        for group in _groups(rows):
            names = ", ".join(quoted(_image_id(row["shard"], row["key"])) for row in group)
            found = _select(self.images, f"id IN ({names}) AND thumbnail IS NOT NULL", ["id", "thumbnail"]).to_pylist()
            files = {row["id"]: row["thumbnail"] for row in found}
            for row in group:
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


def load_lancedb() -> Any:
    """The module of LanceDB. Raises MissingExtraError where it is not installed."""
    try:
        import lancedb
    except ImportError as error:
        raise MissingExtraError('an index needs LanceDB: pip install "openblip[search]"') from error
    return lancedb


def connect(root: Path) -> Any:
    """LanceDB's connection to the tables of an index."""
    return load_lancedb().connect(str(root / "lance"))


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
