"""What the report page says of a run's texts, in numbers.

They are computed of a sample: whole images with all their texts, drawn by hash, so the same run always gives the same
sample. A run of at most `SAMPLED_TEXTS` texts is its own sample. The memory does not grow with the run.

R rows (texts) of the sample, I images, N texts with a known truth, K bins.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from openblip.files import hash_int

SAMPLED_TEXTS = 100_000
SAMPLED_SHARDS = 64  # of a run with more texts than that: a report does not open a thousand files
NUM_BINS = 40
COUNTED_CHARS = 4000  # of a text whose words are counted: a caption may be a whole page
MOST_LENGTH = 40  # words; longer texts count as so long
MOST_NAMES = 100  # different texts in a column of names, such as languages
MOST_REASONS = 500  # kinds of rejects that are told apart
_NO_SCORES = {"key", "shard", "index", "source", "caption", "rank", "kept", "weight"}
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
# What differs between two rejects for one reason: quoted names, paths, addresses and numbers.
_NAMES = re.compile(r"'[^']*'|\"[^\"]*\"|<[^<>]*>|(?:[\w.+%-]*/)+[\w.+%-]*|0x[0-9a-fA-F]+|\d[\d,.]*")

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class TextSample:
    """Rows of a run as `read_judged` gives them, those of an image together, and their share of the run's texts."""

    table: pa.Table
    share: float

    @cached_property
    def kept(self) -> Mask:
        """Which rows are kept (R,)."""
        return np.asarray(self.table["kept"].to_numpy(), bool)

    def __len__(self) -> int:
        return len(self.kept)

    def of_source(self, name: str) -> Mask:
        """Which rows are "web", or "synthetic" (R,)."""
        return np.asarray(pc.equal(self.table["source"], name).to_numpy(zero_copy_only=False), bool)

    def score_names(self) -> list[str]:
        """The numeric columns that have a value other than one and the same, but for those that number groups; real
        numbers come before counts.
        """
        names: dict[bool, list[str]] = {True: [], False: []}  # whether its values are real numbers
        for column in self.table.schema:
            is_real = pa.types.is_floating(column.type)
            if column.name in _NO_SCORES or not (is_real or pa.types.is_integer(column.type)):
                continue
            values = self.scores(column.name)
            values = values[np.isfinite(values)]
            if len(values) and values.min() < values.max() and not column.name.endswith("_group"):
                names[is_real].append(column.name)
        return names[True] + names[False]

    def scores(self, name: str) -> Floats:
        """A numeric column, NaN where it is null (R,)."""
        return np.asarray(pc.cast(self.table[name], pa.float64()).to_numpy(), np.float64)

    def label_names(self) -> list[str]:
        """The columns of flags and of short names, such as languages."""
        return [
            column.name
            for column in self.table.schema
            if column.name not in _NO_SCORES and (pa.types.is_boolean(column.type) or pa.types.is_string(column.type))
        ]

    def captions(self, rows: Mask) -> list[str]:
        """The texts of some rows, long ones cut."""
        texts = pc.utf8_slice_codeunits(self.table["caption"].filter(pa.array(rows)), 0, COUNTED_CHARS)
        return list(texts.to_pylist())


def first_rows(keys: pa.Array) -> NDArray[np.int64]:
    """The rows with which an image begins (I,); the rows of an image stand together."""
    starts = np.ones(len(keys), bool)
    if len(keys) > 1:
        starts[1:] = pc.not_equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
    return np.flatnonzero(starts)


def draw_sample(shards: Sequence[str], num_texts: int, read_shard: Callable[[str], pa.Table]) -> TextSample:
    """Draw from the shards of a run with `num_texts` texts; `read_shard` reads one as `read_judged` does."""
    fraction = 1.0
    if num_texts > SAMPLED_TEXTS:
        chosen = sorted(sorted(shards, key=hash_int)[:SAMPLED_SHARDS])
        fraction = min(1.0, SAMPLED_TEXTS * len(shards) / (num_texts * len(chosen)))
        shards = chosen
    tables = []
    for shard in shards:
        table = read_shard(shard)
        if fraction < 1:
            starts = first_rows(table["key"].combine_chunks())
            drawn = np.random.default_rng(hash_int(shard)).random(len(starts)) < fraction
            table = table.filter(pa.array(np.repeat(drawn, np.diff([*starts, table.num_rows]))))
        tables.append(table)
    if not tables:
        empty = {"source": pa.array([], pa.string()), "kept": pa.array([], pa.bool_())}
        return TextSample(pa.table(empty), 1.0)
    table = pa.concat_tables(tables, promote_options="permissive")  # a score may not be finished for every shard
    return TextSample(table, table.num_rows / num_texts if num_texts else 1.0)


# Scores


class Distribution(NamedTuple):
    """How a score of one source's texts is distributed: counts (K,) of all texts and of those kept, in equal bins from
    `low` to `high`. Texts without a value are in none, and the rare ones beyond the ends in the outermost.
    """

    name: str
    source: str
    low: float
    high: float
    texts: NDArray[np.int64]
    kept: NDArray[np.int64]


def score_range(values: Floats) -> tuple[float, float]:
    """Round ends of an axis for values, without the half percent at either side that would empty the rest."""
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [0.5, 99.5]) if len(values) else (0.0, 1.0)
    if low >= high:
        low, high = (values.min(), values.max()) if len(values) and values.min() < values.max() else (low, low + 1)
    step = 10.0 ** np.floor(np.log10(high - low)) / 2
    return float(np.floor(low / step) * step), float(np.ceil(high / step) * step)


def distribution(sample: TextSample, name: str, source: str, ends: tuple[float, float]) -> Distribution:
    """The distribution of a score over the sample's texts of a source."""
    values = sample.scores(name)
    rows = sample.of_source(source) & np.isfinite(values)
    counts = [
        np.histogram(np.clip(values[which], *ends), bins=NUM_BINS, range=ends)[0].astype(np.int64)
        for which in (rows, rows & sample.kept)
    ]
    return Distribution(name, source, *ends, *counts)


def joint_counts(
    sample: TextSample, names: tuple[str, str], source: str, ends: Mapping[str, tuple[float, float]]
) -> NDArray[np.int64]:
    """How often two scores of a source's texts fall into each pair of bins (K, K), the first score's bin first."""
    rows = sample.of_source(source)
    first, second = (np.clip(sample.scores(name)[rows], *ends[name]) for name in names)
    both = np.isfinite(first) & np.isfinite(second)
    counts = np.histogram2d(first[both], second[both], bins=NUM_BINS, range=[ends[name] for name in names])[0]
    return np.asarray(counts, np.int64)


# Texts


@dataclass
class TextStatistics:
    """Lengths and words of a group of texts."""

    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(MOST_LENGTH + 1, np.int64))  # in words
    words: Counter[str] = field(default_factory=Counter)
    distinct_texts: int = 0
    sequence: list[str] = field(default_factory=list)  # words in a random order of the texts

    @property
    def texts(self) -> int:
        return int(self.lengths.sum())

    @property
    def mean_length(self) -> float:
        return len(self.sequence) / self.texts if self.texts else 0.0

    @property
    def median_length(self) -> int:
        return int(np.searchsorted(np.cumsum(self.lengths), self.texts / 2)) if self.texts else 0

    def distinct_words(self, num_words: int) -> int:
        """How many different words stand among the first `num_words`, which compares groups of different size."""
        return len(set(self.sequence[:num_words]))


def text_statistics(captions: Sequence[str]) -> TextStatistics:
    """Counts of texts without the empty ones; words are runs of letters and digits, in lower case."""
    texts = [text for text in captions if text.strip()]
    order = np.random.default_rng(0).permutation(len(texts))
    split = [_WORD.findall(text.lower()) for text in texts]
    lengths = np.bincount([min(len(each), MOST_LENGTH) for each in split], minlength=MOST_LENGTH + 1)
    sequence = [word for number in order for word in split[number]]
    return TextStatistics(lengths.astype(np.int64), Counter(sequence), len(set(texts)), sequence)


def changed_words(before: TextStatistics, after: TextStatistics, most: int = 12) -> tuple[list[str], list[str]]:
    """The words that CapFilt made more frequent, and those that it made rarer, the largest change first.

    A change is the difference of log frequencies over its standard error, with every count raised by a half, so rare
    words need a large one.
    """
    num_before, num_after = max(len(before.sequence), 1), max(len(after.sequence), 1)
    change = {}
    for word in before.words.keys() | after.words.keys():
        first, second = before.words[word] + 0.5, after.words[word] + 0.5
        change[word] = np.log((second / num_after) / (first / num_before)) / np.sqrt(1 / first + 1 / second)
    ranked = sorted(change, key=lambda word: (-change[word], word))
    more = [word for word in ranked[:most] if change[word] > 2]
    less = [word for word in ranked[::-1][:most] if change[word] < -2]
    return more, less


class RepeatedText(NamedTuple):
    """A text that stands at several images of the sample: how often, and how often it is kept."""

    source: str
    text: str
    times: int
    kept: int


def repeated_texts(sample: TextSample, most: int = 20) -> list[RepeatedText]:
    """The most frequent texts of each source that occur more than once, the most frequent first."""
    if not len(sample):
        return []
    table = pa.table(
        {
            "source": sample.table["source"],
            "text": pc.utf8_slice_codeunits(pc.utf8_trim_whitespace(sample.table["caption"]), 0, COUNTED_CHARS),
            "kept": pa.array(sample.kept.astype(np.int64)),
        }
    )
    groups = table.group_by(["source", "text"]).aggregate([("kept", "count"), ("kept", "sum")])
    groups = groups.filter(pc.greater(groups["kept_count"], 1))
    groups = groups.sort_by([("kept_count", "descending"), ("text", "ascending")]).slice(0, most)
    columns = (groups[name].to_pylist() for name in ("source", "text", "kept_count", "kept_sum"))
    return [RepeatedText(*row) for row in zip(*columns, strict=True)]


class LabelShare(NamedTuple):
    """How often a flag is set, or a name stands, among the texts of each source and among the kept: shares."""

    column: str
    value: str
    web: float | None
    synthetic: float | None
    kept: float | None


def label_shares(sample: TextSample, most: int = 6) -> Iterator[LabelShare]:
    """The most frequent values of every column of flags and of names; of flags only how often they are set. A column of
    more than `MOST_NAMES` different texts has no names but something of each text, such as a hash.
    """
    groups = [sample.of_source("web"), sample.of_source("synthetic"), sample.kept]
    for name in sample.label_names():
        column = sample.table[name].combine_chunks()
        is_flag = pa.types.is_boolean(column.type)
        counts = pc.value_counts(column.drop_null()).to_pylist()
        if len(counts) > MOST_NAMES:
            continue
        counts.sort(key=lambda each: (-each["counts"], str(each["values"])))
        for value in [True] if is_flag else [each["values"] for each in counts[:most]]:
            has_value = np.asarray(pc.fill_null(pc.equal(column, value), False).to_numpy(zero_copy_only=False), bool)
            shares = (float(has_value[rows].mean()) if rows.any() else None for rows in groups)
            yield LabelShare(name, "yes" if is_flag else str(value), *shares)


# Rejects


@dataclass
class RejectedReason:
    """How many samples were rejected for a reason, and the first of them: (shard, key, reason in full)."""

    count: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)


def count_reasons(rejects: Iterable[tuple[str, str, str]], num_examples: int = 3) -> dict[str, RejectedReason]:
    """Rejects (shard, key, reason) by the kind of their reason, the most frequent first.

    Names and numbers are left out of a kind. Beyond `MOST_REASONS` kinds, all others are one.
    """
    kinds: dict[str, RejectedReason] = {}
    for shard, key, reason in rejects:
        kind = reason_kind(reason, shard, key)
        if kind not in kinds and len(kinds) >= MOST_REASONS:
            kind = "another reason"
        counted = kinds.setdefault(kind, RejectedReason())
        counted.count += 1
        if len(counted.examples) < num_examples:
            counted.examples.append((shard, key, reason[:COUNTED_CHARS]))
    return dict(sorted(kinds.items(), key=lambda each: (-each[1].count, each[0])))


def reason_kind(reason: str, shard: str = "", key: str = "") -> str:
    """A reason without what is particular to its sample."""
    reason = reason[:COUNTED_CHARS]
    for name in (f"{shard}/{key}: ", f"{shard}/{key}", key):
        reason = reason.replace(name, "") if len(name) > 3 else reason
    return " ".join(_NAMES.sub("…", reason).split()).strip(" :")[:160] or "no reason given"


# Time


def stage_seconds(reports: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], float, int]:
    """The seconds of every stage over all shards, their total, and the images."""
    seconds: Counter[str] = Counter()
    images = 0
    for report in reports:
        seconds.update(report["seconds"])
        images += report["counts"]["images"]
    total = seconds.pop("total", 0.0)
    return seconds, total, images
