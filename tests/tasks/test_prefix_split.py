"""Cutting texts for prefix language modelling: where, and how often."""

from collections import Counter

import torch

from openblip.tasks.language_model import split_at_random, split_document, split_texts

DOCUMENT = "one two three four\nQuestion: what is it? Answer: big dog\nfive six"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_text_is_cut_after_one_word_to_half_of_them_equally_often():
    text = "a b c d e f g"
    prefixes, rests = split_texts([text] * 3000, split_at_random, 1, generator())
    assert all(f"{prefix} {rest}" == text for prefix, rest in zip(prefixes, rests, strict=True))
    counts = Counter(prefixes)
    assert set(counts) == {"a", "a b", "a b c"}
    assert min(counts.values()) > 900


def test_the_ends_of_the_range_are_its_first_and_last_place():
    assert split_at_random("a b c d", 0.0) == ("a", "b c d")
    assert split_at_random("a b c d", 0.999999) == ("a b", "c d")
    assert split_at_random("a b", 0.5) == ("a", "b")
    assert split_at_random("dog", 0.5) == ("", "dog")


def test_a_document_is_cut_in_a_line_that_has_lines_before_it():
    counts = Counter(zip(*split_texts([DOCUMENT] * 4000, split_document, 3, generator()), strict=True))
    first, question, last = DOCUMENT.split("\n")
    for prefix, rest in counts:
        *before, cut = prefix.split("\n")
        line = [question, last][len(before) - 1]
        assert before == [first, question][: len(before)]
        assert f"{cut} {rest}".strip() == line
    # Half of the cuts in either line are natural: before the answer, before the whole line.
    assert abs(counts[(f"{first}\nQuestion: what is it? Answer:", "big dog")] / 4000 - 0.25) < 0.03
    assert abs(counts[(f"{first}\n{question}\n", "five six")] / 4000 - 0.25) < 0.03


def test_a_document_of_one_line_is_cut_at_random():
    assert set(split_texts(["a b c d"] * 200, split_document, 3, generator())[0]) == {"a", "a b"}


def test_the_generator_decides():
    texts = [DOCUMENT] * 20
    assert split_texts(texts, split_document, 3, generator(1)) == split_texts(texts, split_document, 3, generator(1))
    assert split_texts(texts, split_document, 3, generator(1)) != split_texts(texts, split_document, 3, generator(2))
