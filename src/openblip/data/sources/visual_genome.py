"""Visual Genome's question_answers.json: one answer to each question, weighted as in BLIP's training for VQA.

The pictures are `VG_100K/1.jpg` or `VG_100K_2/1.jpg`, or without the folder.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from openblip.data.sample import safe_name
from openblip.data.sources import storage
from openblip.data.sources.annotations import (
    AnnotationFile,
    as_object,
    first_objects,
    id_of,
    number_of,
    text_of,
)
from openblip.data.sources.files import FileRecord, present_folders

QUESTION_WEIGHT = 0.2
"""Of a Visual Genome question beside VQAv2's, in the released training code."""


@dataclass(slots=True)
class VisualGenomeQuestions:
    """The questions of all images; the key is `qa_id`."""

    known_as: ClassVar[str] = "Visual Genome question_answers.json (a list of images with qas)"
    has_splits: ClassVar[bool] = False

    source: str
    folders: tuple[str, ...]
    questions: list[tuple[int, int, Any]] = field(repr=False)

    @classmethod
    def recognises(cls, content: Any) -> bool:
        return any("qas" in image for image in first_objects(content))

    @classmethod
    def of(cls, file: AnnotationFile) -> "VisualGenomeQuestions":
        questions = [
            (place, number, row)
            for place, image in enumerate(file.content)
            for number, row in enumerate(_questions(image))
        ]
        return cls(file.source, present_folders(file.images, "VG_100K", "VG_100K_2"), questions)

    def __len__(self) -> int:
        return len(self.questions)

    def where(self, number: int) -> str:
        place, question, _ = self.questions[number]
        return f"[{place}].qas[{question}]"

    def record(self, number: int, shard: str) -> FileRecord:
        row = as_object(self.questions[number][2])
        question_id, image_id = id_of(row, "qa_id"), number_of(row, "image_id")
        path, *others = (storage.join(folder, f"{image_id}.jpg") for folder in self.folders)
        return FileRecord(
            key=safe_name(str(question_id)),
            shard=shard,
            image_path=path,
            captions=(),
            image_id=f"{self.source}#{image_id}",
            info={
                "question": text_of(row, "question"),
                "answers": [text_of(row, "answer")],
                "question_id": question_id,
                "image_id": image_id,
                "weight": QUESTION_WEIGHT,
            },
            other_paths=tuple(others),
        )

    def describe(self) -> dict[str, object]:
        return {"format": "Visual Genome questions"}


def _questions(image: Any) -> list[Any]:
    """A broken image counts as one broken question, so that it is named."""
    found = image.get("qas") if isinstance(image, dict) else None
    return found if isinstance(found, list) else [image]
