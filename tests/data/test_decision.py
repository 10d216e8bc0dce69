import math
import multiprocessing

import pyarrow as pa
import pytest

from openblip.data.captions import CAPTION_SCHEMA
from openblip.data.decision import Decision, join_texts, judge
from openblip.errors import ConfigError

NAN = math.nan


def texts_of(*rows: tuple, **columns: list) -> pa.Table:
    """Rows of (key, source, index, caption, itm), and further columns."""
    names = ("key", "source", "index", "caption", "itm")
    table = [dict(zip(names, row, strict=True)) | {"shard": "s", "itc": 0.2, "logprob": None} for row in rows]
    texts = pa.Table.from_pylist(table, schema=CAPTION_SCHEMA)
    for name, values in columns.items():
        texts = texts.append_column(name, pa.array(values))
    return texts


TEXTS = texts_of(
    ("a", "web", 0, "a dog", 0.7),
    ("a", "synthetic", 0, "a brown dog", 0.9),
    ("a", "synthetic", 1, "a cat", 0.2),
    ("b", "web", 0, "shop now", 0.1),
    ("b", "synthetic", 0, " \u200b\u00a0", 0.95),
    ("b", "synthetic", 1, "a ball", 0.55),
    clip=[0.35, 0.31, 0.1, 0.4, 0.5, NAN],
)


def kept(texts: pa.Table = TEXTS, **decision) -> list[int]:
    column = judge(texts, Decision(**decision))["kept"].to_pylist()
    return [row for row, is_kept in enumerate(column) if is_kept]


def test_the_default_is_the_papers_threshold_and_an_empty_caption_is_never_kept():
    assert kept() == [0, 1, 5]
    assert kept(threshold=0.0) == [0, 1, 2, 3, 5]
    assert kept(threshold=None, where="true") == [0, 1, 2, 3, 5]


def test_thresholds_of_each_source():
    assert kept(threshold_web=0.05) == [0, 1, 3, 5]
    assert kept(threshold_web=0.05, threshold_synthetic=0.8) == [0, 1, 3]
    assert kept(threshold=None, threshold_synthetic=0.8) == [0, 1, 3]


def test_expressions_over_all_columns():
    where = "itm > 0.6 and source = 'synthetic' or clip > 0.3"
    assert kept(threshold=None, where=where) == [0, 1, 3]
    assert kept(where=where) == [0, 1]  # both the threshold and the expression
    assert kept(threshold=None, where="CLIP between 0.3 and 0.36 -- a comment") == [0, 1]
    assert kept(threshold=None, where="caption ilike '%DOG%' and not length(caption) > 6") == [0]


def test_what_is_no_number_or_null_is_not_kept():
    assert 5 not in kept(threshold=None, where="clip > 0.3")  # NaN, which SQL has above all numbers
    assert kept(threshold=None, where="logprob > -100") == []
    assert kept(texts_of(("a", "web", 0, "x", NAN))) == []
    assert kept(threshold=None, weight="clip") == [0, 1, 2, 3]
    assert kept(threshold=None, weight="1 / (itm - itm)") == []


def test_a_stored_score_is_compared_in_float64():
    """As the number that it is, so that 0.3 in float32, which is above 0.3, counts as above it."""
    texts = texts_of(*((key, "web", 0, "x", itm) for key, itm in (("a", 0.3), ("b", 0.5), ("c", 0.7))))
    for threshold in (0.1, 0.3, 0.5, 0.7):
        expected = [row for row, itm in enumerate(texts["itm"].to_pylist()) if itm > threshold]
        assert kept(texts, threshold=threshold) == kept(texts, threshold=None, where=f"itm > {threshold}") == expected


def test_the_best_captions_are_those_of_an_image_that_meet_the_rest():
    assert kept(threshold=0.15, best_captions=1) == [0, 1, 5]
    assert kept(threshold=None, where="itm < 0.8", best_captions=1) == [0, 2, 3, 5]
    ranked = TEXTS.append_column("rank", pa.array([None, 2, 1, None, 2, 1]))
    assert kept(ranked, threshold=0.15, best_captions=1) == [0, 2, 5]


def test_order_is_that_of_the_texts_and_weights_stand_beside_them():
    many = texts_of(*((f"{n % 977:04d}", "synthetic", n // 977, "x", n % 101 / 100) for n in range(5000)))
    judged = judge(many, Decision(threshold=None, weight="itm * 2 + index", best_captions=1))
    assert judged["key"].equals(many["key"])
    for row in judged.to_pylist():
        assert row["weight"] == (pytest.approx(row["itm"] * 2 + row["index"]) if row["kept"] else 0)
    assert sum(judged["kept"].to_pylist()) == 977
    assert judge(many, Decision())["weight"].to_pylist() == [1.0 * (n % 101 > 50) for n in range(5000)]


@pytest.mark.parametrize(
    "expression",
    [
        "(select count(*) from read_csv('/etc/passwd')) > 0",
        "exists (select 1)",
        "itm in (select 1)",
        "itm > 0 from read_text('/etc/passwd')",
        "itm > 0) from read_csv('/etc/passwd') where (true",
        "itm > 0); copy (select 1) to '/etc/x'; select (1",
        "itm > 0; attach '/etc/x.db'",
        "install httpfs",
        "pragma version",
        "set threads = 4",
        "true) union select (true",
        "true), (true",
        "true) order by (1",
        "row_number() over () = 1",
        "max(itm) > 0.5",
        "itm > random()",
        "current_setting('threads') = 1",
        "getvariable('x') is null",
        "nextval('x') = 1",
        "itm > $1",
        "itm > ?",
        "columns('.*') > 1",
        "*",
        "texts.itm > 0",
        "list_filter([1], lambda x: x > 0)[1] > 0",
        "query('select 1') = 1",
        "read_text('/etc/passwd') = ''",
        "length(repeat('a', 1000000000)) > 0",
        "len(range(10000000000)) > 0",
        "itm >",
        "",
        "('x' || repeat('(', 20000) = ''",
        "itm" + " + itm" * 5000,
    ],
)
def test_expressions_reach_nothing_but_the_scores(expression: str) -> None:
    for name in ("where", "weight"):
        decision = Decision(**{name: expression})
        for _ in range(2):  # also when it is asked again
            with pytest.raises(ConfigError, match=name):
                decision.check(TEXTS.schema)
        with pytest.raises(ConfigError):
            judge(TEXTS, decision)


def test_unknown_columns_are_named_with_those_there_are():
    with pytest.raises(ConfigError, match=r"no column blip, synthetic; there are key, shard, .*clip"):
        Decision(where='source = "synthetic" or blip > 1').check(TEXTS.schema)
    Decision(where="source = 'synthetic' or clip > 1").check(TEXTS.schema)


def test_expressions_of_another_type_and_those_that_fail():
    with pytest.raises(ConfigError, match=r"where: 'caption' gives VARCHAR; it must give true or false"):
        Decision(where="caption").check(TEXTS.schema)
    with pytest.raises(ConfigError, match=r"weight: 'itm > 0.5' gives BOOLEAN; it must give a number"):
        Decision(weight="itm > 0.5").check(TEXTS.schema)
    with pytest.raises(ConfigError, match="a dog"):
        judge(TEXTS, Decision(where="caption::int > 3"))
    with pytest.raises(ConfigError, match="cannot be judged"):
        Decision(where="itm > caption like 'x'").check(TEXTS.schema)


def test_manifests_of_all_versions():
    assert Decision.of_manifest({"threshold": 0.7}) == Decision(threshold=0.7)
    assert Decision.of_manifest({"threshold": 0.7, "decision": {"threshold": None, "where": "true"}}).where == "true"
    with pytest.raises(ConfigError, match="later version"):
        Decision.of_manifest({"threshold": 0.7, "decision": {"threshold": 0.7, "novelty": 3}})
    for wrong in ({"threshold": 1.5}, {"threshold_web": NAN}, {"max_repeats": 0}, {"best_captions": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Decision(**wrong)


def test_a_forked_process_judges_too():
    assert kept(where="clip > 0.3") == [0, 1]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(kept, kwds={"where": "clip > 0.3"}).get(timeout=60) == [0, 1]


def test_texts_that_say_something_different_are_kept():
    texts = texts_of(
        ("a", "web", 0, "Rex in Lisbon, 2019", 0.7),
        ("a", "synthetic", 0, "a brown dog on the beach", 0.9),
        ("a", "synthetic", 1, "a dog at a beach", 0.95),
        ("a", "synthetic", 2, "an unlikely cat", 0.1),
        ("b", "web", 0, "The brown dog!", 0.8),
        ("b", "synthetic", 0, "brown dog", 0.9),
        ("c", "web", 0, "Is it?", 0.6),
    )
    assert kept(texts) == [0, 1, 2, 4, 5, 6]
    assert kept(texts, repair="separate") == kept(texts, repair="join") == [0, 1, 5, 6]
    assert judge(texts, Decision(weight="2", repair="join"))["weight"].to_pylist() == [2, 2, 0, 0, 0, 2, 2]
    assert join_texts(["Rex in Lisbon ", " What a day!", "a dog"]) == "Rex in Lisbon. What a day! a dog"
