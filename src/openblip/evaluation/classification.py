"""Zero-shot classification: the class whose texts an image is most similar to, by ITC (as CLIP, section 3.1).

I images, C classes, P templates, E embedding width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.data.sample import Sample, Source
from openblip.data.texts import text_field
from openblip.errors import ConfigError
from openblip.evaluation.run import run_evaluation
from openblip.metrics.ranking import classification_accuracy
from openblip.models.blip import similarity_matrix
from openblip.predictor import BasePredictor
from openblip.text_counts import count_texts, warn_caller

# The seven templates that the authors of CLIP found to do as well as all their eighty on ImageNet.
TEMPLATES = (
    "itap of a {}", "a bad photo of the {}", "a origami {}", "a photo of the large {}", "a {} in a video game",
    "art of the {}", "a photo of the small {}",
)  # fmt: skip


@count_texts(warn_caller)
def evaluate_classification(
    predictor: BasePredictor,
    source: Source,
    *,
    classes: Mapping[str, str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return top-1 accuracy, top-5 accuracy and the mean over classes, in [0, 1], with the predictions.

    Samples have a `label`. `classes` has the words for each label in a text; None: the labels that occur, as they are.
    `templates` are texts with {} for the class, whose embedding is their mean, of unit length. Raises `ConfigError` for
    a template without {} and for a label that is none of the classes, and `SourceError` when no sample can be used.
    """
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f'The template "{template}" has no {{}} for the class.')

    def predict(samples: list[Sample]) -> list[Tensor]:
        return list(predictor.embed_images([sample.image for sample in samples], batch_size))

    has_label = partial(text_field, name="label")
    run = run_evaluation(source, predict, label="classifying", check_sample=has_label, limit=limit)
    labels = [sample.info["label"] for sample in run.samples]
    phrases = classes or {label: label for label in sorted(set(labels))}
    names = list(phrases)
    unknown = sorted(set(labels) - phrases.keys())
    if unknown:
        raise ConfigError(f"{source.name} has the label {unknown[0]}, none of the {len(names)} classes.")
    class_vectors = embed_classes(predictor, list(phrases.values()), templates, batch_size)
    scores = similarity_matrix(torch.stack(run.results), class_vectors)  # (I, C)
    predicted = [names[index] for index in scores.argmax(dim=1).tolist()]
    rows = [{"label": label, "predicted": name} for label, name in zip(labels, predicted, strict=True)]
    return run.report(
        {"num_images": len(labels), "num_classes": len(names), "num_templates": len(templates)},
        classification_accuracy(scores.numpy(), [names.index(label) for label in labels]),
        predictions=run.named(rows),
    )


def embed_classes(
    predictor: BasePredictor, phrases: Sequence[str], templates: Sequence[str], batch_size: int | None
) -> Tensor:
    """Return unit vectors (C, E): for each class the mean over the templates of its texts."""
    texts = [template.format(phrase) for phrase in phrases for template in templates]
    vectors = predictor.embed_texts(texts, batch_size).view(len(phrases), len(templates), -1)  # (C, P, E)
    return F.normalize(vectors.mean(dim=1), dim=-1)
