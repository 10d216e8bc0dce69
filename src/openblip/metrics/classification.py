"""Accuracy of classification, zero-shot or not.

I images, C classes. Equal scores count by their expected value under a random order, as in `ranking`.
"""

import numpy as np
from numpy.typing import ArrayLike

from openblip.metrics.ranking import hit_probability, places


def classification_accuracy(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class`, in [0, 1].

    `scores` (I, C), the higher the better; `labels` (I,) int, the right class of every image.
    `mean_per_class` is the mean over classes of their images' top-1 accuracy; a class without images does not
    count. With five classes or fewer `top5` is 1.

    Raises:
        ConfigError: no images, shapes that do not fit, a score that is not a number, or a label that is not a
            class.
    """
    above, tied = places("classification_accuracy", scores, labels)
    first = hit_probability(above, tied, 1)
    _, group, sizes = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return {
        "top1": float(first.mean()),
        "top5": float(hit_probability(above, tied, 5).mean()),
        "mean_per_class": float((np.bincount(group, weights=first) / sizes).mean()),
    }
