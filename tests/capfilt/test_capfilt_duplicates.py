"""Groups of nearly equal images and texts, against a slow comparison of every pair."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from capfilt_world import drawing
from PIL import Image

from openblip.capfilt.duplicates import (
    GroupTable,
    TextsSeen,
    folded_text,
    hash_numbers,
    minhash_bands,
    near_any,
    perceptual_hash,
    text_similarity,
)


def slow_groups(items: list, are_near) -> list[int]:
    """The least number that each item is joined with, directly or by others."""
    group = list(range(len(items)))
    for i, j in combinations(range(len(items)), 2):
        if are_near(items[i], items[j]):
            low, high = sorted((group[i], group[j]))
            group = [low if each == high else each for each in group]
    return group


def read_groups(table: GroupTable, count: int) -> tuple[list, list]:
    parts = [table.read(first, min(7, count - first)) for first in range(0, count, 7)]
    return [g for part in parts for g in part.group.to_pylist()], [r for part in parts for r in part.repeat.to_pylist()]


def test_near_hashes_are_grouped_as_by_comparing_every_pair(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(-(2**63), 2**63, 40, dtype=np.int64)
    flips = np.array([sum(1 << int(b) for b in rng.choice(64, n % 7, replace=False)) for n in range(160)], np.uint64)
    hashes = (base[np.arange(160) % 40].view(np.uint64) ^ flips).view(np.int64)
    expected = slow_groups(hashes.tolist(), lambda a, b: ((a ^ b) & (2**64 - 1)).bit_count() <= 4)
    assert len(set(expected)) < len(set(hashes.tolist())), "some are near and not equal"
    with GroupTable.in_folder(tmp_path) as table:
        table.add(0, pa.array(hashes[:100]))
        table.add(100, pa.array(hashes[100:]))
        table.group_near_hashes(4)
        groups, repeats = read_groups(table, 160)
    assert groups == expected
    assert repeats == [expected[:number].count(group) for number, group in enumerate(expected)]


def test_near_texts_are_grouped_as_by_comparing_every_pair(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    words = np.array(["red", "green", "blue", "dog", "cat", "bird", "house", "river", "under", "above", "photo", "old"])
    texts = [" ".join(rng.choice(words, 12)) for _ in range(30)]
    texts += [f"{text} now" for text in texts[:10]] + [text.upper() for text in texts[:5]] + ["", " "]
    folded = [folded_text(text) for text in texts]
    expected = slow_groups(folded, lambda a, b: bool(a and b) and text_similarity(a, b) >= 0.8)
    with GroupTable.in_folder(tmp_path) as table:
        table.add(0, pa.array([text or None for text in folded]), pa.array(minhash_bands(folded, 0.8), pa.binary()))
        table.group_near_texts(0.8)
        groups, repeats = read_groups(table, len(texts))
    assert groups[:-2] == expected[:-2]
    assert len(set(groups)) < 36
    assert groups[-2:] == repeats[-2:] == [None, None], "a text without words is like no other"


def test_equal_values_are_grouped_and_nulls_are_not(tmp_path: Path) -> None:
    with GroupTable.in_folder(tmp_path) as table:
        table.add(0, pa.array(["b", "a", None]))
        table.add(3, pa.array(["a", None, "b", "a"]))
        table.group_equal()
        assert read_groups(table, 7) == ([0, 1, None, 1, None, 0, 1], [0, 0, None, 1, None, 1, 2])


def test_a_resized_and_compressed_image_is_near_and_another_is_not(tmp_path: Path) -> None:
    images = [drawing(seed) for seed in range(20)]
    hashes = hash_numbers(map(perceptual_hash, images))
    smaller = [image.resize((120, 90)) for image in images]
    for number, image in enumerate(smaller):
        image.save(tmp_path / f"{number}.jpg", quality=60)
    again = hash_numbers(perceptual_hash(Image.open(tmp_path / f"{number}.jpg")) for number in range(20))
    assert near_any(again, hashes, 4).sum() >= 18
    others = hash_numbers(perceptual_hash(drawing(seed)) for seed in range(100, 120))
    assert near_any(others, hashes, 4).sum() == 0
    assert not near_any(others, np.zeros(0, np.int64), 4).any()


def test_texts_that_an_evaluation_set_has() -> None:
    seen = TextsSeen(["A small dog runs over the  green grass", "two cats", ""], 0.8)
    given = [
        "a small dog runs over the green grass",
        "A small dog runs over the green grass!",
        "two dogs",
        "",
        "Two Cats",
    ]
    assert seen.has(given) == [True, True, False, False, True]
    assert TextsSeen([], 0.8).has(["a"]) == [False]


@pytest.mark.parametrize("similarity", [0.5, 0.8, 1.0])
def test_bands_of_equal_texts_are_equal(similarity: float) -> None:
    first, second, other, empty = minhash_bands(["a red dog", "a red dog", "something else entirely", ""], similarity)
    assert first == second != other
    assert empty is None
