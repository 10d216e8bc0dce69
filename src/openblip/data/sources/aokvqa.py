"""A-OKVQA: questions with four choices and ten free answers; in the test set neither the right choice nor the
answers.

The pictures are COCO's of 2017, `train2017/000000000009.jpg` or without the folder.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from openblip.data.sample import safe_name
from openblip.data.sources import storage
from openblip.data.sources.annotations import (
    AnnotationFile,
    as_object,
    file_name_of,
    first_objects,
    id_of,
    number_of,
    text_of,
)
from openblip.data.sources.files import FileRecord, present_folders
from openblip.data.sources.task_fields import choices, texts

_PASSED_ON = ("rationales", "difficult_direct_answer", "split")


@dataclass(slots=True)
class AokvqaQuestions:
    """The questions of a split; the key is the question's id."""

    known_as: ClassVar[str] = "A-OKVQA (a list of questions with choices)"
    has_splits: ClassVar[bool] = False

    source: str
    folders: tuple[str, ...]
    questions: list[Any] = field(repr=False)

    @classmethod
    def recognises(cls, content: Any) -> bool:
        return any("choices" in row and "question" in row for row in first_objects(content))

    @classmethod
    def of(cls, file: AnnotationFile) -> "AokvqaQuestions":
        splits = {str(row.get("split")) for row in first_objects(file.content)}
        folders = present_folders(file.images, *(f"{split}2017" for split in sorted(splits)))
        return cls(file.source, folders, file.content)

    def __len__(self) -> int:
        return len(self.questions)

    def where(self, number: int) -> str:
        return f"[{number}]"

    def record(self, number: int, shard: str) -> FileRecord:
        row = as_object(self.questions[number])
        question_id = id_of(row, "question_id")
        # LAVIS adds the path of the picture in COCO's release of 2014.
        name = file_name_of(row, "image") if "image" in row else f"{number_of(row, 'image_id'):012d}.jpg"
        image_id = row.get("image_id", name)
        path, *others = (storage.join(folder, name) for folder in self.folders)
        return FileRecord(
            key=safe_name(str(question_id)),
            shard=shard,
            image_path=path,
            captions=(),
            image_id=f"{self.source}#{image_id}",
            info={
                "question": text_of(row, "question"),
                "answers": texts(row.get("direct_answers"), "direct_answers"),
                "question_id": question_id,
                "image_id": image_id,
                **choices(row.get("choices"), row.get("correct_choice_idx")),
                **{name: row[name] for name in _PASSED_ON if name in row},
            },
            other_paths=tuple(others),
        )

    def describe(self) -> dict[str, object]:
        return {"format": "A-OKVQA questions"}
