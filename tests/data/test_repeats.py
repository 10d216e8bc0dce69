"""One title on many images is found, and ordinary texts are not."""

from openblip.data.repeats import count_repeats


def test_titles_on_many_images_are_named_with_their_share() -> None:
    texts = [f"a text about thing {number}" for number in range(500)]
    assert count_repeats(texts).line() == ""
    titles = ["Clip Art"] * 300 + ["clip art!"] * 100 + ["free stock image"] * 100
    repeats = count_repeats([*texts, *titles])
    assert repeats.texts == [("Clip Art", 400), ("free stock image", 100)]
    assert repeats.line() == "2 texts stand on 500 of 1,000 images (50%), the most frequent on 400: 'Clip Art'"
    assert "one text stands on 100 of 600 images (17%)" in count_repeats([*texts, *titles[400:]]).line()


def test_a_few_repetitions_are_not_worth_saying() -> None:
    repeats = count_repeats([f"text {number}" for number in range(1000)] + ["a dog"] * 30)
    assert repeats.texts == [("a dog", 30)]
    assert repeats.line() == ""
