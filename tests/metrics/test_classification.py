import numpy as np
import pytest

from openblip.errors import ConfigError
from openblip.metrics.ranking import classification_accuracy


def test_accuracies_by_hand() -> None:
    scores = np.array(
        [
            [6, 5, 4, 3, 2, 1, 0],  # class 0, first
            [6, 5, 4, 3, 2, 1, 0],  # class 0, first
            [1, 2, 3, 4, 5, 6, 0],  # class 0, sixth
            [6, 5, 4, 3, 2, 1, 0],  # class 4, fifth
        ]
    )
    accuracy = classification_accuracy(scores, [0, 0, 0, 4])
    # Class 0 has 2 of 3, class 4 none of 1; the other five have no images.
    assert accuracy == pytest.approx({"top1": 2 / 4, "top5": 3 / 4, "mean_per_class": (2 / 3 + 0) / 2})


def test_constant_scores_count_as_guessing_does() -> None:
    accuracy = classification_accuracy(np.full((6, 10), 0.5, dtype=np.float16), [0, 1, 2, 3, 3, 3])
    assert accuracy == pytest.approx({"top1": 0.1, "top5": 0.5, "mean_per_class": 0.1})


def test_few_classes_are_all_among_the_first_five() -> None:
    assert classification_accuracy([[0.0, 1.0], [0.0, 1.0]], [0, 1]) == {
        "top1": 0.5,
        "top5": 1.0,
        "mean_per_class": 0.5,
    }


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([], [], "scores"),
        ([[0.1, 0.2]], [0, 0], "one whole number per row"),
        ([[0.1, 0.2]], ["dog"], "one whole number per row"),
        ([[0.1, 0.2]], [2], "row 0 has a right one outside"),
        ([[0.1, float("nan")]], [0], "row 0 has scores with a value that is not a number"),
    ],
)
def test_what_cannot_be_scored_is_refused(scores: object, labels: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"classification_accuracy: .*{message}"):
        classification_accuracy(scores, labels)  # type: ignore[arg-type]
