"""Zero-shot classification measured against accuracies worked out by hand.

I images, C classes, E embedding width.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from listed_source import ListSource, numbers, sample
from openblip.data.sample import Sample
from openblip.errors import ConfigError, SourceError
from openblip.evaluation.classification import TEMPLATES, embed_classes, evaluate_classification


@dataclass
class Embedder:
    """Vectors of images by number, of texts by text."""

    images: Tensor
    texts: dict[str, list[float]]
    read: list[str] = field(default_factory=list)

    def embed_images(self, images: Any, batch_size: int | None) -> Tensor:
        return self.images[numbers(images)]

    def embed_texts(self, texts: Any, batch_size: int | None) -> Tensor:
        self.read += texts
        return torch.tensor([self.texts[text] for text in texts])


def embedder() -> Embedder:
    images = F.normalize(torch.tensor([[1.0, 0.1, 0.0], [0.9, 1.0, 0.0], [0.0, 1.0, 0.2], [0.0, 0.3, 1.0]]), dim=1)
    return Embedder(images, {"a dog": [1.0, 0.0, 0.0], "a cat": [0.0, 1.0, 0.0], "a cow": [0.0, 0.0, 1.0]})


SOURCE = ListSource([sample(0, label="dog"), sample(1, label="dog"), sample(2, label="cat"), sample(3, label="cow")])


def test_the_class_whose_text_is_most_similar_is_the_answer() -> None:
    scores = evaluate_classification(embedder(), SOURCE, templates=["a {}"])
    assert scores["top1"] == pytest.approx(3 / 4)
    assert scores["top5"] == 1.0
    assert scores["mean_per_class"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert (scores["num_images"], scores["num_classes"], scores["num_templates"]) == (4, 3, 1)
    assert [row["predicted"] for row in scores["predictions"]] == ["dog", "cat", "cat", "cow"]
    assert scores["predictions"][1] == {"shard": "s0", "key": "001", "label": "dog", "predicted": "cat"}
    assert evaluate_classification(embedder(), SOURCE, templates=["a {}"], limit=1)["top1"] == 1.0


def test_a_class_is_the_mean_of_its_texts_made_a_unit_vector() -> None:
    model = Embedder(torch.eye(2), {"a x": [1.0, 0.0], "one x": [0.0, 1.0], "a y": [0.6, 0.8], "one y": [0.6, 0.8]})
    found = embed_classes(model, ["x", "y"], ["a {}", "one {}"], None)
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))
    assert model.read == ["a x", "one x", "a y", "one y"]


def test_labels_may_be_called_something_else_and_classes_may_have_no_image() -> None:
    model = embedder()
    classes = {"n01": "dog", "n02": "cat", "n03": "cow"}
    source = ListSource([sample(0, label="n01"), sample(1, label="n02")])
    scores = evaluate_classification(model, source, classes=classes, templates=["a {}"])
    assert scores["num_classes"] == 3
    assert scores["top1"] == 1.0
    assert [row["predicted"] for row in scores["predictions"]] == ["n01", "n02"]
    assert model.read == ["a dog", "a cat", "a cow"]


def test_seven_templates_are_the_default() -> None:
    assert len(TEMPLATES) == 7
    model = Embedder(torch.eye(1), {template.format("dog"): [1.0] for template in TEMPLATES})
    scores = evaluate_classification(model, ListSource([sample(0, label="dog")]))
    assert (scores["num_templates"], scores["top1"]) == (7, 1.0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has no \{\} for the class"):
        evaluate_classification(embedder(), SOURCE, templates=["a dog"])
    with pytest.raises(ConfigError, match="list has the label cow, none of the 2 classes"):
        evaluate_classification(embedder(), SOURCE, classes={"dog": "dog", "cat": "cat"}, templates=["a {}"])


def test_what_cannot_be_used_is_skipped_and_named() -> None:
    broken = Sample("bad", "s0", b"x", (), "list/bad", {"label": "dog"})
    source = ListSource([sample(0, label="dog"), broken, sample(1), sample(2, label=3)])
    scores = evaluate_classification(embedder(), source, templates=["a {}"])
    assert (scores["num_images"], scores["top1"]) == (1, 1.0)
    assert [reject["key"] for reject in scores["rejects"]] == ["bad", "001", "002"]
    with pytest.raises(SourceError, match="no label"):
        evaluate_classification(embedder(), ListSource([sample(0)]))
