"""Parts of a source, `SOURCE[:95%]`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from openblip.data.sources import open_mixture, open_source
from openblip.errors import SourceError


def keys(spec: str) -> list[tuple[str, str]]:
    source = open_source(spec)
    return [(s, record.key) for s in source.shards() for record in source.index(s).records]


def test_parts_that_meet_are_the_whole_once(tmp_path: Path, write_shards: Callable[..., Path]) -> None:
    folder = write_shards(tmp_path, [7, 5, 1])
    whole, first, rest = keys(f"{folder}"), keys(f"{folder}[:60%]"), keys(f"{folder}[60%:]")
    assert sorted(first + rest) == sorted(whole)
    assert [shard for shard, _ in first].count(first[0][0]) == 4  # 60% of 7, rounded down
    assert keys(f"{folder}[0%:100%]") == whole


def test_a_part_is_a_source_of_a_mixture(tmp_path: Path, write_shards: Callable[..., Path]) -> None:
    folder = write_shards(tmp_path, [10])
    mixture = open_mixture(f"{folder}[:20%],{folder}[20%:]")
    assert mixture.weights == pytest.approx((0.2, 0.8))


@pytest.mark.parametrize("part", ["[60%:60%]", "[90%:10%]", "[:101%]", "[:0%]"])
def test_an_empty_part_is_refused(part: str, tmp_path: Path, write_shards: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match="percentage"):
        open_source(f"{write_shards(tmp_path, [3])}{part}")
