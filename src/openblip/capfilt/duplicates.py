"""Groups of equal and nearly equal images and texts across all shards, and what also stands in an evaluation set.

Images are compared by perceptual hash (imagehash), texts by MinHash (datasketch); duckdb groups them in a database on
disk, so that memory does not grow with the run, only with the number of pairs that are nearly equal.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from openblip.errors import MissingExtraError

if TYPE_CHECKING:
    import duckdb

_HASH_BITS = 64
_SPARE_BLOCKS = 3  # of those that hashes are cut into, so many are equal in near hashes, whatever the others are
_NUM_PERMUTATIONS = 128
_MISSED_WEIGHT = 0.9  # of a near text that is not found, against a far one that is compared in vain
_MARGIN = 0.85  # texts of this share of the similarity are compared too, so that few near ones are missed
_GRAM = 4  # characters
_MEMORY = "4GB"  # beyond which duckdb works on disk
_MANY = 1 << 24  # pairs of hashes that are compared at once

Int64s = np.ndarray[Any, np.dtype[np.int64]]


class Groups(NamedTuple):
    """Of consecutive images or texts: the number of the first of their group in the run, and how many of the group
    came before; null for texts without words.
    """

    group: pa.Array  # int64
    repeat: pa.Array  # int64


class GroupTable:
    """The images or texts of a run, by their number in it, and their groups. Its database lies in `folder`."""

    def __init__(self, connection: "duckdb.DuckDBPyConnection") -> None:
        self._connection = connection

    @classmethod
    @contextmanager
    def in_folder(cls, folder: Path) -> "Iterator[GroupTable]":
        """An empty table, in a folder that exists and that the caller removes."""
        import duckdb

        settings: dict[str, Any] = {"memory_limit": _MEMORY, "temp_directory": str(folder / "spilled")}
        settings |= {"python_enable_replacements": False, "preserve_insertion_order": False}
        with duckdb.connect(folder / "groups.duckdb", config=settings) as connection:
            connection.execute("CREATE TABLE items (number BIGINT, value VARCHAR, bands BLOB)")
            yield cls(connection)

    def add(
        self, first: int, values: pa.ChunkedArray | pa.Array, bands: pa.ChunkedArray | pa.Array | None = None
    ) -> None:
        """Add consecutive images or texts, from number `first` on: what is equal of equal ones, null where it is not
        known, and the bands of texts (`minhash_bands`).
        """
        numbers = pa.array(np.arange(first, first + len(values)))
        bands = pa.nulls(len(values), pa.binary()) if bands is None else bands
        texts = values.cast(pa.string())
        self._load("INSERT INTO items SELECT * FROM given", {"number": numbers, "value": texts, "bands": bands})

    def group_equal(self) -> None:
        """Put what is equal into one group. After all were added."""
        self._connection.execute("CREATE TABLE firsts AS SELECT value, min(number) AS first FROM items GROUP BY value")
        self._number(np.zeros(0, np.int64), np.zeros(0, np.int64))

    def group_near_hashes(self, distance: int) -> None:
        """The same for perceptual hashes, as decimal int64, of which at most `distance` bits differ, and for those that
        are joined by others in between.
        """
        self._connection.execute("CREATE TABLE firsts AS SELECT value, min(number) AS first FROM items GROUP BY value")
        self._connection.execute("CREATE TABLE hashes AS SELECT value::BIGINT AS hash FROM firsts WHERE value NOT NULL")
        self._connection.execute("CREATE TABLE pairs (a BIGINT, b BIGINT)")
        for mask in _masks(distance):
            self._connection.execute(
                "INSERT INTO pairs SELECT x.hash, y.hash FROM hashes x JOIN hashes y"
                " ON (x.hash & $mask) = (y.hash & $mask) AND x.hash < y.hash"
                " WHERE bit_count(xor(x.hash, y.hash)) <= $distance",
                {"mask": mask, "distance": distance},
            )
        edges = self._connection.sql(
            "SELECT DISTINCT x.first AS a, y.first AS b FROM pairs"
            " JOIN firsts x ON x.value = a::VARCHAR JOIN firsts y ON y.value = b::VARCHAR"
        ).fetchnumpy()
        self._number(edges["a"], edges["b"])

    def group_near_texts(self, similarity: float) -> None:
        """The same for texts whose `text_similarity` is at least this."""
        connection = self._connection
        connection.execute(
            "CREATE TABLE firsts AS SELECT value, min(number) AS first, any_value(bands) AS bands FROM items"
            " GROUP BY value"
        )
        connection.execute("CREATE TABLE bands (first BIGINT, band BIGINT)")
        rows = connection.cursor().sql("SELECT first, bands FROM firsts WHERE bands NOT NULL")
        for batch in rows.to_arrow_reader(100_000):
            signatures = np.frombuffer(b"".join(batch["bands"].to_pylist()), np.int64).reshape(len(batch), -1)
            repeated = pa.array(np.repeat(batch["first"].to_numpy(), signatures.shape[1]))
            band = pa.array(signatures.reshape(-1))
            self._load("INSERT INTO bands SELECT * FROM given", {"first": repeated, "band": band})
        candidates = connection.cursor().sql(
            "SELECT DISTINCT x.first AS a, y.first AS b, x.value AS text, y.value AS other FROM"
            " (SELECT band, min(first) AS least FROM bands GROUP BY band HAVING count(*) > 1) shared"
            " JOIN bands USING (band) JOIN firsts x ON x.first = bands.first JOIN firsts y ON y.first = least"
            " WHERE x.first <> y.first"
        )
        edges = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for batch in candidates.to_arrow_reader(100_000):
            pairs = zip(batch["text"].to_pylist(), batch["other"].to_pylist(), strict=True)
            is_near = np.array([text_similarity(text, other) >= similarity for text, other in pairs], bool)
            edges.append((batch["a"].to_numpy()[is_near], batch["b"].to_numpy()[is_near]))
        self._number(np.concatenate([a for a, _ in edges]), np.concatenate([b for _, b in edges]))

    def _number(self, a: Int64s, b: Int64s) -> None:
        """Make the groups of what is equal, and of what edges from `a` to `b` join, by their first numbers."""
        joined = _components(a, b) if len(a) else (a, b)
        self._connection.execute("CREATE TABLE joined (first BIGINT, least BIGINT)")
        columns = {name: pa.array(column, pa.int64()) for name, column in zip(("first", "least"), joined, strict=True)}
        self._load("INSERT INTO joined SELECT * FROM given", columns)
        self._connection.execute(
            "CREATE TABLE groups AS SELECT number, if(value IS NULL, NULL, grp) AS grp,"
            " if(value IS NULL, NULL, row_number() OVER (PARTITION BY value IS NULL, grp ORDER BY number) - 1) AS nth"
            " FROM (SELECT number, items.value, coalesce(least, first) AS grp FROM items"
            " JOIN firsts ON items.value IS NOT DISTINCT FROM firsts.value LEFT JOIN joined USING (first))"
            " ORDER BY number"
        )

    def read(self, first: int, count: int) -> Groups:
        """The groups of `count` images or texts from number `first` on."""
        table = self._connection.sql(
            "SELECT grp, nth FROM groups WHERE number >= ? AND number < ? ORDER BY number",
            params=[first, first + count],
        ).to_arrow_table()
        return Groups(*(table[name].combine_chunks() for name in ("grp", "nth")))

    def _load(self, statement: str, columns: dict[str, Any]) -> None:
        """Run a statement that reads the view `given`, which has these columns."""
        self._connection.register("given", pa.table(columns))
        self._connection.execute(statement)
        self._connection.unregister("given")


def _masks(distance: int) -> Iterator[int]:
    """Masks over the bits of a hash, as int64, such that any two hashes of which at most `distance` bits differ are
    equal under one of them: the hash is cut into blocks, and of `distance` + 3 of them 3 must be equal.
    """
    num_blocks = distance + _SPARE_BLOCKS
    edges = [_HASH_BITS * block // num_blocks for block in range(num_blocks + 1)]
    blocks = [(1 << end) - (1 << start) for start, end in itertools.pairwise(edges)]
    for chosen in itertools.combinations(blocks, _SPARE_BLOCKS):
        yield int(np.uint64(sum(chosen)).astype(np.int64))


def _components(a: Int64s, b: Int64s) -> tuple[Int64s, Int64s]:
    """The nodes of a graph with edges from `a` to `b`, and of each the least node that it is joined with."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes, ends = np.unique(np.concatenate([a, b]), return_inverse=True)
    graph = coo_array((np.ones(len(a), bool), (ends[: len(a)], ends[len(a) :])), shape=(len(nodes), len(nodes)))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)  # nodes are sorted: the first of a component is the least
    return nodes, nodes[first][component]


# Images


def perceptual_hash(image: Image.Image) -> str:
    """64 bits in hexadecimal digits, of which few differ between images that look the same."""
    return str(_library("imagehash").phash(image))


def hash_numbers(hashes: Iterable[str]) -> Int64s:
    """Perceptual hashes as int64."""
    return np.array([int(text, 16) for text in hashes], np.uint64).astype(np.int64)


def near_any(hashes: Int64s, others: Int64s, distance: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each hash differs from one of the others in at most `distance` bits. bool, of the length of `hashes`."""
    found = np.zeros(len(hashes), bool)
    step = max(1, _MANY // max(1, len(others)))
    for start in range(0, len(hashes), step):
        part = slice(start, start + step)
        differing = np.bitwise_count(hashes[part, None].view(np.uint64) ^ others[None].view(np.uint64))
        found[part] = (differing <= distance).any(axis=1)
    return found


# Texts


def folded_text(text: str) -> str:
    """A text as texts are compared: without case, and with single spaces."""
    return " ".join(text.casefold().split())


def character_grams(text: str) -> set[str]:
    """The parts of `_GRAM` characters of a folded text; of a shorter one itself."""
    return {text[start : start + _GRAM] for start in range(max(1, len(text) - _GRAM + 1))}


def text_similarity(text: str, other: str) -> float:
    """The share of the parts of two folded texts that both have (Jaccard)."""
    ours, others = character_grams(text), character_grams(other)
    return len(ours & others) / len(ours | others)


def minhash_bands(texts: Sequence[str], similarity: float) -> list[bytes | None]:
    """Of each folded text 8 bytes for each band of its MinHash; texts that are similar enough have a band in common,
    most likely. None for an empty text.
    """
    _, rows, num_bands = _lsh_bands(similarity)
    given = [text for text in texts if text]
    bands = np.zeros((len(given), num_bands), np.uint64)
    for number, signature in enumerate(_minhashes(given)):
        values = signature.hashvalues[: rows * num_bands].astype(np.uint64).reshape(num_bands, rows)
        mixed = np.arange(1, num_bands + 1, dtype=np.uint64)
        for column in values.T:  # FNV-1a over whole values; equal values in different bands differ
            mixed = (mixed ^ column) * np.uint64(0x100000001B3)
        bands[number] = mixed
    remaining = iter(bands)
    return [next(remaining).tobytes() if text else None for text in texts]


class TextsSeen:
    """The texts of an evaluation set, in memory."""

    def __init__(self, texts: Iterable[str], similarity: float) -> None:
        self.similarity = similarity
        self._lsh, *_ = _lsh_bands(similarity)
        self._texts = sorted({folded for text in texts if (folded := folded_text(text))})
        for number, signature in enumerate(_minhashes(self._texts)):
            self._lsh.insert(number, signature)

    def has(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text, or nearly the same one, is among them."""
        folded = [folded_text(text) for text in texts]
        signatures = iter(_minhashes([text for text in folded if text]))
        return [bool(text) and self._has(text, next(signatures)) for text in folded]

    def _has(self, text: str, signature: Any) -> bool:
        found = self._lsh.query(signature)
        return any(text_similarity(text, self._texts[number]) >= self.similarity for number in found)


def _minhashes(texts: Sequence[str]) -> list[Any]:
    """The MinHash of each folded text."""
    grams = ([gram.encode("utf-8", "surrogatepass") for gram in character_grams(text)] for text in texts)
    minhashes: list[Any] = _library("datasketch").MinHash.bulk(grams, num_perm=_NUM_PERMUTATIONS)
    return minhashes


def _lsh_bands(similarity: float) -> tuple[Any, int, int]:
    """An empty index of texts that are as similar as this, and the rows and the number of its bands."""
    weights = (1 - _MISSED_WEIGHT, _MISSED_WEIGHT)
    threshold = _MARGIN * similarity
    lsh = _library("datasketch").MinHashLSH(threshold=threshold, num_perm=_NUM_PERMUTATIONS, weights=weights)
    return lsh, lsh.r, lsh.b


@cache
def _library(name: str) -> Any:
    """A library that computes scores; raises `MissingExtraError` where it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f'{name} is not installed: pip install "openblip[capfilt]"') from error
