"""VQA, VQAv2 and OK-VQA: a questions file, with the annotators' answers in an annotations file beside it.

`v2_OpenEnded_mscoco_train2014_questions.json` goes with `v2_mscoco_train2014_annotations.json`. The pictures
are COCO's of 2014 and 2015, `train2014/COCO_train2014_000000000009.jpg` or without the folder. Test sets have
no annotations, so no answers.
"""

import re
import sys
from collections.abc import Mapping
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
from openblip.data.sources.documents import read_document
from openblip.data.sources.files import FileRecord, present_folders
from openblip.data.sources.task_fields import texts
from openblip.errors import SourceError

Answers = tuple[Any, dict[str, str]]
"""A question's answers as the file has them, and the types that the official evaluation reports by."""


@dataclass(slots=True)
class VqaQuestions:
    """The questions of a file; the key is the question's id."""

    known_as: ClassVar[str] = (
        "VQA, VQAv2 or OK-VQA questions (the list questions; its annotations are found beside it)"
    )
    has_splits: ClassVar[bool] = False

    source: str
    folders: tuple[str, ...]
    subtype: str
    questions: list[Any] = field(repr=False)
    answers: Mapping[Any, Answers] = field(repr=False)
    described: dict[str, object]

    @classmethod
    def recognises(cls, content: Any) -> bool:
        return isinstance(content, dict) and any(
            "question_id" in row and "question" in row for row in first_objects(content.get("questions"))
        )

    @classmethod
    def of(cls, file: AnnotationFile) -> "VqaQuestions":
        subtype = file.content.get("data_subtype")
        if not isinstance(subtype, str) or not subtype:
            raise SourceError(
                f"{file.path}: no data_subtype (train2014, ...), which the pictures are named after"
            )
        described: dict[str, object] = {}
        answers: dict[Any, Answers] = {}
        name = _dataset_name(file.content)
        if subtype.startswith("test"):
            described["format"] = f"{name} questions of a test set, without annotations"
        else:
            companion = _companion(file)
            annotations = read_document(companion)
            answers = _answers(annotations, companion)
            name = _dataset_name(annotations, name)
            described = {"format": f"{name} questions with annotations", "annotations": companion}
        subtype = subtype.replace("test-dev", "test")
        folders = present_folders(file.images, subtype)
        return cls(file.source, folders, subtype, file.content["questions"], answers, described)

    def __len__(self) -> int:
        return len(self.questions)

    def where(self, number: int) -> str:
        return f"questions[{number}]"

    def record(self, number: int, shard: str) -> FileRecord:
        row = as_object(self.questions[number])
        question_id, image_id = id_of(row, "question_id"), number_of(row, "image_id")
        answers, types = self.answers.get(question_id, (None, {}))
        name = f"COCO_{self.subtype}_{image_id:012d}.jpg"
        path, *others = (storage.join(folder, name) for folder in self.folders)
        return FileRecord(
            key=safe_name(str(question_id)),
            shard=shard,
            image_path=path,
            captions=(),
            image_id=f"{self.source}#{image_id}",
            info={
                "question": text_of(row, "question"),
                "answers": texts(answers, "answers"),
                "question_id": question_id,
                "image_id": image_id,
                **types,
            },
            other_paths=tuple(others),
        )

    def describe(self) -> dict[str, object]:
        return self.described


def _companion(file: AnnotationFile) -> str:
    """The annotations beside a questions file, by the names under which both are distributed."""
    name = f"{file.stem}.json"
    if "questions" not in name:
        raise SourceError(
            f"{file.path}: its annotations are found by its name, which has to end in questions.json"
        )
    named = re.sub("OpenEnded_|MultipleChoice_", "", name).replace("questions", "annotations")
    path = file.beside(named)
    if not storage.exists(path):
        raise SourceError(f"{file.path}: the answers to its questions are missing: there is no {path}")
    return path


def _answers(content: Any, path: str) -> dict[Any, Answers]:
    rows = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise SourceError(f"{path}: not the annotations of VQA questions, which are in the list annotations")
    answers: dict[Any, Answers] = {}
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("question_id"), (int, str)):
            types = {
                name: sys.intern(row[name])
                for name in ("question_type", "answer_type")
                if type(row.get(name)) is str
            }
            answers.setdefault(row["question_id"], (row.get("answers"), types))
    return answers


def _dataset_name(content: Any, otherwise: str = "VQA") -> str:
    """`VQAv2`, `OK-VQA` or what else the file's info says that it is."""
    info = content.get("info") if isinstance(content, dict) else None
    description = info.get("description") if isinstance(info, dict) else None
    found = re.search(r"v(\d+)[.\d]* of the ([\w-]*VQA)\b", str(description))
    if found is None:
        return otherwise
    version, name = found.groups()
    return f"{name}v{version}" if name == "VQA" and version != "1" else name
