"""Numbers of the report page: samples of whole images, and counts that a plain loop agrees with."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from openblip.capfilt import statistics
from openblip.capfilt.charts import BOTTOM, HEIGHT, LEFT, WIDTH, at_x, density, histogram, ticks_of
from openblip.capfilt.statistics import TextSample, draw_sample


def shard_table(shard: str, num_images: int) -> pa.Table:
    """Each image has a web text and up to two synthetic ones; every second image of a shard repeats one web text."""
    rng = np.random.default_rng(int(shard))
    rows = []
    for number in range(num_images):
        for source, index in [("web", 0), ("synthetic", 0), ("synthetic", 1)][: 2 + number % 2]:
            caption = "Stock photo" if source == "web" and number % 2 else f"a dog {shard} {number} {index}"
            row = {"key": f"{number}", "shard": shard, "index": index, "source": source, "caption": caption}
            itm = rng.random()
            rows.append(row | {"itm": itm, "itc": rng.normal(), "flag": number % 4 == 0, "kept": itm > 0.5})
    return pa.Table.from_pylist(rows)


def test_a_small_run_is_its_own_sample() -> None:
    sample = draw_sample(["1", "2"], 50, lambda shard: shard_table(shard, 10))
    assert len(sample) == 50
    assert sample.share == 1
    assert sample.table["shard"].to_pylist() == ["1"] * 25 + ["2"] * 25
    assert sample.kept.tolist() == [kept for shard in "12" for kept in shard_table(shard, 10)["kept"].to_pylist()]


def test_a_sample_has_whole_images_of_some_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SAMPLED_TEXTS", 1000)
    monkeypatch.setattr(statistics, "SAMPLED_SHARDS", 5)
    opened = []

    def read_shard(shard: str) -> pa.Table:
        opened.append(shard)
        return shard_table(shard, 200)

    shards = [f"{number}" for number in range(40)]
    sample = draw_sample(shards, 40 * 500, read_shard)
    assert len(set(opened)) == len(opened) == 5
    assert 800 < len(sample) < 1200
    assert sample.share == pytest.approx(len(sample) / 20_000)
    images = Counter(zip(sample.table["shard"].to_pylist(), sample.table["key"].to_pylist(), strict=True))
    assert all(count == 2 + int(key) % 2 for (_, key), count in images.items())
    again = draw_sample(shards, 40 * 500, read_shard)
    assert again.table.equals(sample.table)
    np.testing.assert_array_equal(again.kept, sample.table["itm"].to_numpy() > 0.5)


def test_a_score_of_some_shards_is_null_in_the_others() -> None:
    def read_shard(shard: str) -> pa.Table:
        table = shard_table(shard, 4)
        scored = table.append_column("clip", pa.array(np.arange(table.num_rows) / 10))
        return scored if shard == "1" else table

    sample = draw_sample(["1", "2"], 20, read_shard)
    assert sample.score_names() == ["itm", "itc", "clip"]
    assert np.isnan(sample.scores("clip")).sum() == 10
    assert statistics.distribution(sample, "clip", "web", (0, 1)).texts.sum() == 4


def test_distributions_and_pairs_of_scores_hold_every_text() -> None:
    sample = TextSample(shard_table("3", 300), 1.0)
    ends = {name: statistics.score_range(sample.scores(name)) for name in ("itm", "itc")}
    for source in ("web", "synthetic"):
        found = statistics.distribution(sample, "itc", source, ends["itc"])
        assert found.texts.sum() == sample.of_source(source).sum()
        assert found.kept.sum() == (sample.of_source(source) & sample.kept).sum()
        assert statistics.joint_counts(sample, ("itm", "itc"), source, ends).sum() == found.texts.sum()
    low, high = statistics.score_range(np.random.default_rng(0).normal(size=10_000))
    assert -4 <= low <= -2
    assert 2 <= high <= 4


def test_numbers_of_groups_and_hashes_are_no_scores_and_no_names() -> None:
    table = shard_table("3", 200)
    numbers = list(range(table.num_rows))
    columns = {
        "text_group": numbers,
        "text_repeat": [n % 7 for n in numbers],
        "image_hash": [f"{n:x}" for n in numbers],
    }
    for name, values in (columns | {"clip": [n / 3 for n in numbers]}).items():
        table = table.append_column(name, pa.array(values))
    sample = TextSample(table, 1.0)
    assert sample.score_names() == ["itm", "itc", "clip", "text_repeat"]
    assert {label.column for label in statistics.label_shares(sample)} == {"flag"}


def test_flags_by_source() -> None:
    sample = TextSample(shard_table("3", 100), 1.0)
    (found,) = statistics.label_shares(sample)
    flags = np.array(sample.table["flag"].to_pylist())
    assert (found.column, found.value) == ("flag", "yes")
    assert found.web == pytest.approx(0.25)
    assert found.kept == pytest.approx(flags[sample.kept].mean())


def test_text_statistics_are_plain_counts() -> None:
    found = statistics.text_statistics(["A dog, a cat.", "", "  ", "don't stop", "A dog, a cat."])
    assert found.texts == 3
    assert found.distinct_texts == 2
    assert found.words == Counter({"a": 4, "dog": 2, "cat": 2, "don't": 1, "stop": 1})
    assert found.mean_length == pytest.approx(10 / 3)
    assert found.median_length == 4
    assert found.distinct_words(10) == 5


def test_words_that_changed() -> None:
    before = statistics.text_statistics(["stock photo of a dog"] * 50)
    after = statistics.text_statistics(["a small dog on a lawn"] * 50)
    more, less = statistics.changed_words(before, after)
    assert set(more) >= {"small", "lawn"}
    assert set(less) == {"stock", "photo", "of"}


def test_repeated_texts_are_the_most_frequent() -> None:
    sample = TextSample(shard_table("5", 40), 1.0)
    (found,) = statistics.repeated_texts(sample)
    assert (found.source, found.text, found.times) == ("web", "Stock photo", 20)


def test_reasons_without_names_and_numbers() -> None:
    reasons = [
        ("0", "0001", "0/0001: cannot identify image file 'a b.jpg'"),
        ("0", "0002", "0/0002: cannot identify image file 'c.png'"),
        ("1", "x", "image of 90,000 x 90,000 pixels is larger than 89,478,485"),
        ("1", "y", "image of 80,000 x 3 pixels is larger than 89,478,485"),
        ("1", "z", ""),
    ]
    found = statistics.count_reasons(reasons)
    assert [kind.count for kind in found.values()] == [2, 2, 1]
    assert next(iter(found)) == "cannot identify image file …"


def test_kinds_of_reasons_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MOST_REASONS", 10)
    letters = "abcdefghijklmnopqrstuvwxyz"
    found = statistics.count_reasons(("0", "1", f"reason {letter}") for letter in letters)
    assert len(found) == 11
    assert found["another reason"].count == len(letters) - 10


def test_charts_keep_to_their_frame() -> None:
    chart = histogram("Web", np.array([4, 0, 2]), np.array([1, 0, 2]), 0, 3, name="score", mark=None)
    first, last = chart.bars
    assert (first.top, last.top) == (BOTTOM - HEIGHT, BOTTOM - HEIGHT / 2)
    assert first.middle == BOTTOM - HEIGHT / 4
    assert last.middle == last.top
    assert at_x([-1, 2]).tolist() == [LEFT, LEFT + WIDTH]
    paths = density(np.array([[0, 1], [100, 0]]))
    assert sum(path.count("M") for path in paths) == 2
    assert paths[-1].count("M") == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.5, 1), (-14.5, -1.0), (0, 0.004), (3, 90_000)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = ticks_of(low, high, at_x)
    assert 3 <= len(ticks) <= 7
    assert all(LEFT <= tick.at <= LEFT + WIDTH for tick in ticks)
    assert all(low - 1e-9 <= float(tick.text) <= high * (1 + 1e-3) + 1e-9 for tick in ticks)
