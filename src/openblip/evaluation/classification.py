"""Zero-shot classification: the class whose texts an image is most similar to, by ITC (as CLIP, section 3.1).

I images, C classes, P prompts, E embedding width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.data.readings import text_field
from openblip.data.sample import Sample, Source
from openblip.errors import ConfigError
from openblip.evaluation.run import walk
from openblip.metrics.classification import classification_accuracy
from openblip.models.similarity import similarity_matrix

# Seven that the authors of CLIP found to do as well as all their eighty for ImageNet.
TEMPLATES = (
    "itap of a {}",
    "a bad photo of the {}",
    "a origami {}",
    "a photo of the large {}",
    "a {} in a video game",
    "art of the {}",
    "a photo of the small {}",
)


class Embedder(Protocol):
    """What classification needs of a model."""

    def embed_images(self, images: Any, batch_size: int | None) -> Tensor: ...
    def embed_texts(self, texts: Any, batch_size: int | None) -> Tensor: ...


class _Embedded(NamedTuple):
    name: dict[str, Any]
    label: str
    vector: Tensor


def evaluate_classification(
    model: Embedder,
    source: Source,
    *,
    classes: Mapping[str, str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy and the mean over classes, 0 to 1, with the predictions.

    classes: what each label is called in a text, by label; None: the labels of the source, by themselves.
    templates: texts with {} for the class; the embedding of a class is the mean over them, of unit length.
    Raises ConfigError for a template without {} or a sample whose label is none of the classes.
    """
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f'The template "{template}" has no {{}} for the class.')

    def work(samples: list[Sample]) -> list[_Embedded]:
        vectors = model.embed_images([sample.image for sample in samples], batch_size)
        return [
            _Embedded({"shard": s.shard, "key": s.key}, s.info["label"], vector)
            for s, vector in zip(samples, vectors, strict=True)
        ]

    def accept(sample: Sample) -> None:
        text_field(sample, "label")

    found, rejects = walk(source, work, label="classifying", accept=accept, limit=limit)
    phrases = classes or {label: label for label in sorted({image.label for image in found})}
    names = list(phrases)
    unknown = sorted({image.label for image in found} - phrases.keys())
    if unknown:
        raise ConfigError(f"{source.name} has the label {unknown[0]}, none of the {len(names)} classes.")
    images = torch.stack([image.vector for image in found])
    class_vectors = embed_classes(model, list(phrases.values()), templates, batch_size)
    scores = similarity_matrix(images, class_vectors)  # (I, C)
    labels = [names.index(image.label) for image in found]
    predicted = [names[i] for i in scores.argmax(dim=1).tolist()]
    return {
        "num_images": len(found),
        "num_classes": len(names),
        "num_templates": len(templates),
        "num_rejects": len(rejects),
        **classification_accuracy(scores.numpy(), labels),
        "predictions": [
            {**image.name, "label": image.label, "predicted": guess}
            for image, guess in zip(found, predicted, strict=True)
        ],
        "rejects": [asdict(reject) for reject in rejects],
    }


def embed_classes(
    model: Embedder, phrases: Sequence[str], templates: Sequence[str], batch_size: int | None
) -> Tensor:
    """Unit vectors (C, E): the mean over the templates of a class's texts."""
    texts = [template.format(phrase) for phrase in phrases for template in templates]
    vectors = model.embed_texts(texts, batch_size).view(len(phrases), len(templates), -1)  # (C, P, E)
    return F.normalize(vectors.mean(dim=1), dim=-1)
