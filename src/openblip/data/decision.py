"""Which texts of a CapFilt run are kept, and how often training draws them: a rule over the stored scores.

A rule may be an SQL expression over the columns of the caption files and of later scores. duckdb evaluates it, in a
database that holds nothing but the texts, reaches no files and cannot be given other settings. What an expression may
consist of is decided on the parsed expression: columns, constants, operators, and functions of them.
"""

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from openblip.errors import ConfigError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

_PAGE = "capfilt.md#choosing-what-is-kept"  # of the documentation, about expressions
MAX_EXPRESSION = 10_000  # characters
_ALLOWED = frozenset({  # kinds of expressions in duckdb's parser
    "CONJUNCTION", "COMPARISON", "BETWEEN", "OPERATOR", "CASE", "CAST", "FUNCTION", "CONSTANT", "TYPE",
})  # fmt: skip
_REFUSED = {"SUBQUERY": "a query", "WINDOW": "a window function", "STAR": "a *", "PARAMETER": "a parameter"}
_FUNCTIONS = """
SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type = 'scalar' AND stability = 'CONSISTENT'
"""
_UNBOUNDED = frozenset({  # functions that make a value as large as a number says
    "repeat", "lpad", "rpad", "range", "generate_series", "list_resize", "array_resize", "bar",
})  # fmt: skip
_HAS_TEXT = r"regexp_matches(caption, '[^\s\p{Z}\p{C}]')"  # the caption shows anything
_ALWAYS = ("key", "source", "index", "caption", "itm")  # what every decision reads
_RANK = "rank"  # of candidates, where the run ranked them
_ROW = "openblip_row"
_databases = threading.local()
_WORD = re.compile(r"\w+")
_COMMON = frozenset({  # words that say nothing of an image
    "a", "an", "the", "and", "or", "of", "in", "on", "at", "to", "for", "from", "by", "with", "is", "are", "was",
    "were", "be", "this", "that", "it", "its", "as", "there",
})  # fmt: skip
_NUMBERS = [
    "DOUBLE", "FLOAT", "DECIMAL", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT",
    "UINTEGER", "UBIGINT",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What decides about a text beside the threshold; a text is kept when all that is given holds for it."""

    threshold_web: float | None = None
    """For web texts in place of the threshold."""
    threshold_synthetic: float | None = None
    """For synthetic texts in place of the threshold."""
    where: str | None = None
    """What must be true of a text: an SQL expression over the columns."""
    best_captions: int | None = None
    """Of the synthetic texts of an image that meet the rest, only the best so many, by ITM or as the run ranked them
    (the column `rank`); as many as the run's --keep-best, where it had candidates, when not given."""
    max_repeats: int | None = None
    """Of texts of all shards that are equal but for case and spaces, only so many: those with the highest ITM."""
    weight: str | None = None
    """How often training on capfilt:DIR draws a text, compared with the others: an SQL expression; a text without a
    positive one is not kept."""
    repair: Literal["join", "separate"] | None = None
    """Of the texts of an image that are kept, only those that say something different (at least half of the words are
    in none of the longer ones): joined to one text, or as separate pairs."""


@dataclass(frozen=True, kw_only=True)
class Decision(Rule):
    """What is kept of a run: texts for which all conditions that are given hold. The default is the paper's.

    An empty caption is never kept, and neither is a text for which an expression is null or cannot be told (NaN).
    Raises `ConfigError` for values that no text could meet.
    """

    threshold: float | None = 0.5
    """The ITM probability must be strictly above this. None: no threshold."""
    stored: str | None = None
    """The folder below DIR/selected with what `capfilt-select` computed, where the decision needs all shards."""
    largest_weight: float = 1.0
    """Of the texts that were kept then; training compares the others with it."""

    def __post_init__(self) -> None:
        for name in ("threshold", "threshold_web", "threshold_synthetic"):
            if (value := getattr(self, name)) is not None:
                check_threshold(value, name)
        for name in ("best_captions", "max_repeats"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"capfilt: {name} is {value}; it must be at least 1")

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> "Decision":
        """The decision of a run; in earlier versions there was a threshold alone.

        Raises `ConfigError` for one that a later version made.
        """
        stated = manifest.get("decision")
        if stated is None:
            return cls(threshold=float(manifest["threshold"]))
        if unknown := stated.keys() - {field.name for field in fields(cls)}:
            raise ConfigError(f"the run's decision has {', '.join(sorted(unknown))}, of a later version of openblip")
        return cls(**stated)

    def threshold_of(self, source: str) -> float | None:
        """What the ITM probability of a source's texts must be above."""
        own = self.threshold_web if source == "web" else self.threshold_synthetic
        return self.threshold if own is None else own

    @property
    def has_only_thresholds(self) -> bool:
        """Whether ITM alone decides."""
        names = ("threshold", "threshold_web", "threshold_synthetic")
        return self == Decision(**{name: getattr(self, name) for name in names})

    @property
    def needs_all_shards(self) -> bool:
        """Whether a text's fate depends on the texts of other shards, so that it is computed once and stored."""
        return self.max_repeats is not None or self.weight is not None

    def columns(self) -> frozenset[str]:
        """The columns, in lower case, that the expressions use. Raises `ConfigError` for what is no allowed one."""
        stated = (("where", self.where), ("weight", self.weight))
        return frozenset().union(*(columns_of(text, name) for name, text in stated if text is not None))

    def reads(self, available: Iterable[str]) -> list[str]:
        """The columns that `judge` looks at, of those that are `available`. Raises `ConfigError` for a missing one."""
        names = {name.lower(): name for name in available}
        if missing := sorted(({*_ALWAYS} | self.columns()) - names.keys()):
            raise ConfigError(
                f"no column {', '.join(missing)}; there are {', '.join(names.values())}. `openblip capfilt-score` adds "
                "columns; a text that a column is compared with stands in single quotes, as in source = 'web'"
            )
        used = {*_ALWAYS, *self.columns(), *([_RANK] if self.best_captions is not None else [])}
        return [name for lower, name in names.items() if lower in used]

    def check(self, schema: "pa.Schema") -> None:
        """Raise `ConfigError` for an expression that texts with these columns cannot be judged by."""
        self.reads(schema.names)
        with _scores(schema.empty_table(), self) as connection:
            for name, stated, kinds in ("where", self.where, ["BOOLEAN"]), ("weight", self.weight, _NUMBERS):
                [kind] = map(str, connection.sql(f"SELECT {_expression(stated, 'true')} FROM scores").types)
                if stated is not None and kind.partition("(")[0] not in kinds:
                    needed = "true or false" if name == "where" else "a number"
                    raise ConfigError(f"{name}: {stated!r} gives {kind}; it must give {needed} for each text")

    def __str__(self) -> str:
        stated = asdict(self) | {"threshold": None, "stored": None, "largest_weight": None}
        rules = [] if self.threshold is None else [f"itm > {self.threshold:g}"]
        return ", ".join(rules + [f"{name} {value}" for name, value in stated.items() if value is not None])


def check_threshold(threshold: float, name: str = "threshold") -> None:
    """Raises `ConfigError` unless the threshold is a probability (NaN is none)."""
    if not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"capfilt: {name} is {threshold}; it is compared with a probability, so give 0 to 1")


def judge(texts: "pa.Table", decision: Decision) -> "pa.Table":
    """`texts`, which are all texts of a shard, with the columns `kept` (bool) and `weight` (float64).

    The weight is 1 without an expression for it, and 0 for texts that are not kept. `max_repeats`, which is about other
    shards too, is not looked at here. Scores are compared in float64, and those that are not numbers count as null.
    Raises `ConfigError` for an expression that fails.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    used = texts.select(decision.reads(texts.column_names))
    is_above = f"itm > CASE source WHEN 'web' THEN {_limit(decision, 'web')} ELSE {_limit(decision, 'synthetic')} END"
    is_best, order = "true", ""
    if decision.best_captions is not None:
        best = f"{_RANK}, itm DESC" if _RANK in used.column_names else "itm DESC"
        place = f"row_number() OVER (PARTITION BY key, source, passes ORDER BY {best}, index)"
        is_best = f"(source <> 'synthetic' OR {place} <= {decision.best_captions})"
        order = f"ORDER BY {_ROW}"  # without a window the order is that of the texts
    ranked = f", {_RANK}" if _RANK in used.column_names else ""
    query = f"""
    WITH passing AS (
        SELECT {_ROW}, key, source, index, itm{ranked}, {_expression(decision.weight, "1.0")}::DOUBLE AS weight,
            coalesce({_HAS_TEXT} AND {is_above} AND {_expression(decision.where, "true")}, false) AS meets
        FROM scores
    ),
    weighted AS (SELECT *, coalesce(meets AND weight > 0 AND isfinite(weight), false) AS passes FROM passing),
    judged AS (SELECT {_ROW}, weight, passes AND {is_best} AS kept FROM weighted)
    SELECT kept, CASE WHEN kept THEN weight ELSE 0.0 END AS weight FROM judged {order}
    """
    with _scores(used.append_column(_ROW, pa.array(np.arange(texts.num_rows))), decision) as connection:
        judged = connection.sql(query).to_arrow_table()
    if decision.repair is not None:
        is_kept = pa.array(_say_something_new(texts, judged["kept"].to_pylist()), pa.bool_())
        judged = pa.table({"kept": is_kept, "weight": pc.if_else(is_kept, judged["weight"], 0.0)})
    for name in ("kept", "weight"):
        texts = texts.append_column(name, judged[name])
    return texts


def _say_something_new(texts: "pa.Table", kept: list[bool]) -> list[bool]:
    """Of the kept texts of each image, whether at least half of a text's words are in none that was taken before it;
    those with most words come first, then those with the highest ITM."""
    by_image: dict[str, list[int]] = {}
    keys = texts["key"].to_pylist()
    for row, is_kept in enumerate(kept):
        if is_kept:
            by_image.setdefault(keys[row], []).append(row)
    captions, itm = texts["caption"].to_pylist(), texts["itm"].to_pylist()
    for rows in by_image.values():
        words = {row: set(_WORD.findall(captions[row].lower())) - _COMMON for row in rows if len(rows) > 1}
        taken: set[str] = set()
        for row in sorted(words, key=lambda row: (-len(words[row]), -itm[row])):
            new = words[row] - taken
            kept[row] = not taken or 2 * len(new) >= len(words[row]) > 0
            taken |= words[row] if kept[row] else set()
    return kept


def join_texts(texts: Iterable[str]) -> str:
    """Several texts of an image as one, each ended by a full stop or what it ends in, but for the last."""
    *before, last = (text.strip() for text in texts)
    return " ".join([*(text if text.endswith((".", "!", "?", "\u3002")) else f"{text}." for text in before), last])


def _limit(decision: Decision, source: str) -> str:
    """What the ITM probability of a source's texts must be above, as SQL; nothing is below the first."""
    threshold = decision.threshold_of(source)
    return "'-inf'::DOUBLE" if threshold is None else f"{threshold!r}::DOUBLE"


def _expression(stated: str | None, default: str) -> str:
    return default if stated is None else f"(\n{stated}\n)"  # a comment at its end is over with the line


@contextmanager
def _scores(texts: "pa.Table", decision: Decision) -> Iterator["duckdb.DuckDBPyConnection"]:
    """A database with the view `scores`, in which scores are float64, or null where they are not numbers.

    One thread: a process that was forked has none of the others. Raises `ConfigError` for what duckdb cannot compute.
    """
    import duckdb
    import pyarrow as pa

    with _database() as connection:
        try:
            connection.register("texts", texts)
            columns = (
                f"nullif({_quoted(field.name)}::DOUBLE, 'nan') AS {_quoted(field.name)}"
                if pa.types.is_floating(field.type)
                else _quoted(field.name)
                for field in texts.schema
            )
            connection.execute(f"CREATE TEMP VIEW scores AS SELECT {', '.join(columns)} FROM texts")
            yield connection
        except duckdb.Error as error:
            raise ConfigError(f"the texts cannot be judged by {decision}: {_reason(error)}") from error
        finally:
            connection.execute("DROP VIEW IF EXISTS scores")
            connection.unregister("texts")


@contextmanager
def _database() -> Iterator["duckdb.DuckDBPyConnection"]:
    """An empty database in memory: no files, no extensions, and no way back to others.

    A thread opens one, since opening takes longer than judging a shard; a process that was forked opens its own.
    """
    import duckdb

    opened: dict[str, duckdb.DuckDBPyConnection] = _databases.__dict__
    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": "1",
        "enable_external_access": "false",
        "autoload_known_extensions": "false",
        "autoinstall_known_extensions": "false",
        "python_enable_replacements": "false",
        "lock_configuration": "true",
    }
    process = f"of_{os.getpid()}"
    if process not in opened:
        opened[process] = duckdb.connect(":memory:", config=settings)
    yield opened[process]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _reason(error: Exception) -> str:
    """The first line of a message of duckdb, without what it shows of our query."""
    return str(error).splitlines()[0]


@lru_cache(maxsize=64)
def columns_of(expression: str, name: str) -> frozenset[str]:
    """The columns, in lower case, of an expression that depends on nothing else, and whose values are no larger than
    what it is given. Raises `ConfigError`, in which `name` stands for it, for anything else.
    """
    import duckdb

    if len(expression) > MAX_EXPRESSION:
        raise ConfigError(f"{name}: an expression of {len(expression)} characters; at most {MAX_EXPRESSION}")
    with _database() as connection:
        query = f"SELECT {_expression(expression, '')}"
        try:
            answer = connection.execute("SELECT json_serialize_sql(?)", [query]).fetchone()
            functions = set(map(itemgetter(0), connection.execute(_FUNCTIONS).fetchall())) - _UNBOUNDED
        except duckdb.Error as error:
            raise ConfigError(f"{name}: {expression!r} cannot be read: {_reason(error)}") from error
    assert answer is not None
    parsed = json.loads(answer[0])
    if parsed["error"]:
        raise ConfigError(f"{name}: {expression!r} is no SQL expression: {parsed['error_message']}", page=_PAGE)
    only = "give one expression of columns, constants, operators and functions, without queries or other statements"
    [statement, *others] = parsed["statements"]
    node = statement["node"]
    selected = node.pop("select_list", [])
    if others or len(selected) != 1 or node.get("from_table", {}).get("type") != "EMPTY":
        raise ConfigError(f"{name}: {expression!r} is more than an expression; {only}", page=_PAGE)
    columns: set[str] = set()
    for part in _parts([selected, node]):
        kind = part["class"]
        if kind == "COLUMN_REF" and len(part["column_names"]) == 1:
            columns.add(part["column_names"][0].lower())
        elif kind not in _ALLOWED:
            what = _REFUSED.get(kind, ".".join(part.get("column_names", [kind.lower()])))
            raise ConfigError(f"{name}: {expression!r} has {what}; {only}", page=_PAGE)
        elif kind == "FUNCTION" and part["function_name"] not in functions:
            raise ConfigError(
                f"{name}: {expression!r} has the function {part['function_name']}, which there is not, which "
                f"depends on more than the values it is given, or which makes very large ones; {only}",
                page=_PAGE,
            )
    return frozenset(columns)


def _parts(tree: Any) -> Iterator[dict[str, Any]]:
    """All expressions within a parsed statement."""
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _parts(branch)
