"""The check of a filter: which pairs it takes, what they are compared with, and what is said of the scores."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from listed_source import ListSource
from openblip.data.config import Preprocessing
from openblip.data.sample import Sample
from openblip.evaluation.filter_check import (
    CheckedPair,
    check_curves,
    check_report,
    choose_pairs,
    count_pairs,
    score_pairs,
)
from openblip.predictor.values import TextScore

COLORS = 16


def image_of(color: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (4, 4), (color * 16, 0, 0)).save(encoded, "PNG")
    return encoded.getvalue()


def colored(number: int, *captions: str, image_id: str = "") -> Sample:
    return Sample(f"{number:03d}", "s0", image_of(number % COLORS), captions, image_id or f"list/{number}")


class ColorFilter:
    """Sees the red of an image exactly, and takes the number that a text ends in for a color: the nearer, the more
    alike. `score_texts` is right to within one step.
    """

    preprocessing = Preprocessing(image_size=2)

    def stack(self, pixels: Any) -> torch.Tensor:
        return torch.from_numpy(np.stack(pixels))

    def encode(self, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
        return pixels[:, 0, 0, 0].float() / 16

    def embed_images(self, colors: torch.Tensor, batch_size: int) -> torch.Tensor:
        angle = colors / COLORS * 3
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    def embed_texts(self, texts: Any, batch_size: int) -> torch.Tensor:
        return self.embed_images(torch.tensor([float(text.split()[-1]) for text in texts]), batch_size)

    def score_texts(self, colors: torch.Tensor, texts: Any, batch_size: int) -> list[list[TextScore]]:
        return [
            [TextScore(1 - abs(float(text.split()[-1]) - float(color)) / COLORS, 0.5) for text in image_texts]
            for color, image_texts in zip(colors, texts, strict=True)
        ]


def test_own_captions_are_compared_with_random_and_with_the_closest_others() -> None:
    samples: list[Sample | str] = [colored(number, f"color {number % COLORS}") for number in range(120)]
    source = ListSource([*samples, "damaged"])
    pairs = choose_pairs(source)
    checked, rejects = score_pairs(ColorFilter(), source, pairs, batch_size=7)  # type: ignore[arg-type]
    assert {(pair.key, pair.own) for pair in checked} == {(f"{number:03d}", 1.0) for number in range(120)}
    assert rejects == []
    for pair in checked:
        color = int(pair.caption.split()[-1])
        assert pair.hard_caption in (f"color {color - 1}", f"color {color + 1}")  # never the same text of another image
        assert pair.random_caption != pair.caption
    report = check_report(checked, threshold=0.9)
    assert report["num_pairs"] == 120
    assert report["random"]["auc"]["value"] == report["hard"]["auc"]["value"] == 1.0
    assert report["hard"]["precision"]["value"] == 0.5  # one step apart is above the threshold, too
    assert report["random"]["precision"]["value"] > 0.8
    assert report["hard"]["average_precision"] == 1.0
    assert report["random"]["itc_auc"]["value"] == 0.5  # it is the same for all
    curves = check_curves(checked)["hard"]
    assert curves["itm"].points()[0] == {
        "threshold": 1.0, "recall": 1.0, "false_positive_rate": 0.0, "precision": 1.0,
    }  # fmt: skip
    assert curves["itc"].precision.tolist() == [0.5]
    assert report["recall"] == pytest.approx({"value": 1.0, "low": 0.969, "high": 1.0}, abs=1e-3)


def test_a_pair_of_each_image_is_chosen_by_hash_whatever_the_order() -> None:
    samples = [colored(number, "color 1", image_id=f"list/{number // 2}") for number in range(60)]
    chosen = choose_pairs(ListSource(samples), limit=10)
    assert len({pair.image_id for pair in chosen}) == 10
    again = choose_pairs(ListSource(samples[::-1]), limit=10)
    assert {pair.image_id for pair in again} == {pair.image_id for pair in chosen}
    assert count_pairs(ListSource([*samples, colored(99)]), enough=100) == 30
    assert count_pairs(ListSource(samples), enough=7) == 7


def test_images_that_all_have_one_caption_have_no_others() -> None:
    source = ListSource([colored(number, "color 1") for number in range(5)])
    checked, _ = score_pairs(ColorFilter(), source, choose_pairs(source))  # type: ignore[arg-type]
    report = check_report(checked, threshold=0.5)
    assert set(report["random"].values()) == {0, None}
    assert check_curves(checked) == {"random": {}, "hard": {}}


def test_a_filter_that_guesses_has_an_auc_of_a_half() -> None:
    rng = np.random.default_rng(0)
    checked = [
        CheckedPair(key="", shard="", caption="", random_caption="", hard_caption="", own=a, random=b, hard=c)
        for a, b, c in rng.random((1000, 3))
    ]
    report = check_report(checked, threshold=0.5)["random"]
    assert report["itc_auc"] is None, "checks from before ITC was kept"
    auc = report["auc"]
    assert auc["low"] < 0.5 < auc["high"] < 0.56
