"""What is lost between a text and a model is counted and said."""

import pytest

from openblip.text_counts import TextCounts, count_text, count_texts


def read(text: str, limit: int = 4) -> None:
    words = text.split()
    kept = words[:limit]
    count_text(text, num_tokens=len(kept), num_unknown=kept.count("?"), is_cut=len(words) > limit, limit=limit)


def test_only_the_outermost_count_says_what_was_lost() -> None:
    said: list[str] = []
    with count_texts(said.append) as outer:
        read("a b ? c d")
        with count_texts(said.append) as inner:
            read("a b ? c d")
            read("a b c d e f")
        with count_texts(apart=True) as apart:
            read("? ? ? ? ?")
    assert (outer.texts, len(outer.cut), inner.texts, len(inner.cut)) == (3, 2, 2, 2), "a text read twice is one text"
    assert (len(apart.cut), apart.unknown_share) == (1, 1.0)
    (line,) = said
    assert line.startswith("2 texts were longer than 4 tokens and cut; 17% of the tokens of the texts are unknown")


def test_nothing_is_said_where_nothing_was_lost_or_the_work_failed() -> None:
    said: list[str] = []
    with count_texts(said.append):
        read("a b")
    with pytest.raises(ZeroDivisionError), count_texts(said.append):
        read(f"a b ? c d {1 / len(said)}")
    read("counted by nobody ? ? ?")
    assert said == []
    assert TextCounts().unknown_share == 0
