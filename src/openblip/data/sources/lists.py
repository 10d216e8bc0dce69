"""A .json that is a list of objects, one sample each: how the authors of BLIP distribute annotations.

Captions (`coco_karpathy_train.json`, `flickr30k_test.json`, `nocaps_val.json`): `image` with `caption`, one
or a list. Questions (`vqa_train.json`, `vg_qa.json`): `image`, `question` and `answer`, one or a list. Pairs
(`nlvr_train.json`): two `images`, `sentence` and `label`. Instructions of LLaVA
(`llava_instruct_150k.json`): `image` and `conversations`. Paths are relative to the folder of pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from openblip.data.sample import safe_name
from openblip.data.sources import storage
from openblip.data.sources.annotations import AnnotationFile, as_object, file_name_of, first_objects
from openblip.data.sources.files import FileRecord
from openblip.data.sources.tables import IMAGE_COLUMNS, row_captions, row_key
from openblip.data.sources.task_fields import task_fields
from openblip.data.sources.visual_genome import QUESTION_WEIGHT
from openblip.errors import SourceError

_ID_FIELDS = ("question_id", "identifier", "img_id")


@dataclass(slots=True)
class ListedRows:
    """The rows of a list; the key is a question's id, an identifier or else the row's number. Rows that state
    the same image id, or else the same image, share it.
    """

    known_as: ClassVar[str] = (
        "a list of objects with image (or two images) and caption, question, sentence or conversations"
    )
    has_splits: ClassVar[bool] = False

    source: str
    images: str
    rows: list[Any] = field(repr=False)

    @classmethod
    def recognises(cls, content: Any) -> bool:
        return any(_is_pair(row) or _image_field(row) for row in first_objects(content))

    @classmethod
    def of(cls, file: AnnotationFile) -> "ListedRows":
        return cls(file.source, file.images, file.content)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, number: int) -> str:
        return f"[{number}]"

    def record(self, number: int, shard: str) -> FileRecord:
        row = as_object(self.rows[number])
        if _is_pair(row):
            left, right = (file_name_of({"images": name}, "images") for name in row["images"])
        else:
            name = _image_field(row)
            if name is None:
                raise SourceError(f"no image; found: {', '.join(row) or 'nothing'}")
            left, right = file_name_of(row, name), None
        stated = row.get("image_id", row.get("img_id"))
        return FileRecord(
            key=_key(row, number),
            shard=shard,
            image_path=storage.join(self.images, left),
            captions=row_captions(row, "caption"),
            image_id=f"{self.source}#{_shown(left, right) if stated is None else stated}",
            info=_info(row, number),
            second_image_path=None if right is None else storage.join(self.images, right),
        )

    def describe(self) -> dict[str, object]:
        row = first_objects(self.rows)[0]
        if _is_pair(row):
            return {"format": "list of statements about two images"}
        if row.keys() & {"conversations", "instruction", "turns"}:
            return {"format": "list of instructions about images"}
        return {"format": "list of questions" if "question" in row else "list of captioned images"}


def _is_pair(row: Mapping[str, Any]) -> bool:
    images = row.get("images")
    return isinstance(images, list) and len(images) == 2


def _image_field(row: Mapping[str, Any]) -> str | None:
    return next((name for name in IMAGE_COLUMNS if name in row), None)


def _shown(left: str, right: str | None) -> str:
    return left if right is None else f"{left} {right}"


def _key(row: Mapping[str, Any], number: int) -> str:
    stated = (row.get(name) for name in _ID_FIELDS)
    key = next((value for value in stated if isinstance(value, (int, str)) and value != ""), None)
    return row_key(row, number) if key is None else safe_name(str(key))


def _info(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The row under the names of docs/data.md."""
    fields = dict(row)
    if _is_pair(row) and "sentence" in row:
        fields["statement"] = fields.pop("sentence")
    fields = task_fields(fields)
    if "question" in fields:
        fields.pop("answer", None)
        fields.setdefault("question_id", number)
        if row.get("dataset") == "vg":
            fields.setdefault("weight", QUESTION_WEIGHT)
    return fields
