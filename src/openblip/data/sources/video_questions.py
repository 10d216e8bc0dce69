"""MSRVTT-QA and MSVD-QA as distributed: `train_qa.json`, `val_qa.json`, `test_qa.json`, lists of questions
about numbered clips.

Clip 7010 of MSRVTT is `video7010.mp4`. Clip 5 of MSVD is `vid5.avi`, or what `youtube_mapping.txt` beside the
questions calls it: a line `mv89psg6zh4_33_46 vid5` stands for `mv89psg6zh4_33_46.avi`. The questions of
MSRVTT are told by the category of their clips.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from openblip.data.sample import safe_name
from openblip.data.sources import storage
from openblip.data.sources.annotations import AnnotationFile, as_object, first_objects, id_of, text_of
from openblip.data.sources.files import FileRecord
from openblip.data.sources.task_fields import texts
from openblip.data.sources.video_clips import ClipFolder
from openblip.errors import SourceError

_MAPPING = "youtube_mapping.txt"


@dataclass(slots=True)
class VideoQuestions:
    """The questions of a list; the key is a question's id. Questions about one clip share its image id."""

    known_as: ClassVar[str] = "MSRVTT-QA or MSVD-QA (a list of objects with question and video_id)"
    has_splits: ClassVar[bool] = False

    source: str
    clips: ClipFolder
    questions: list[Any] = field(repr=False)
    youtube: dict[str, str] = field(repr=False)
    described: dict[str, object]

    @classmethod
    def recognises(cls, content: Any) -> bool:
        return any("question" in row and "video_id" in row for row in first_objects(content))

    @classmethod
    def of(cls, file: AnnotationFile) -> "VideoQuestions":
        if any("category_id" in row for row in first_objects(file.content)):
            described: dict[str, object] = {"format": "MSRVTT-QA questions"}
            youtube: dict[str, str] = {}
        else:
            described = {"format": "MSVD-QA questions"}
            mapping = file.beside(_MAPPING)
            if storage.exists(mapping):
                youtube, described[_MAPPING] = _read_mapping(mapping), mapping
            else:
                youtube, described["missing"] = {}, f"{mapping}, without which clips are looked for as vid5"
        return cls(file.source, ClipFolder.of(file.images), file.content, youtube, described)

    def __len__(self) -> int:
        return len(self.questions)

    def where(self, number: int) -> str:
        return f"[{number}]"

    def record(self, number: int, shard: str) -> FileRecord:
        row = as_object(self.questions[number])
        question_id = id_of(row, "id") if "id" in row else number
        names = self._names(row)
        info = {name: value for name, value in row.items() if name not in ("id", "answer")}
        info |= {
            "question": text_of(row, "question"),
            "answers": texts(row.get("answer"), "answer"),
            "question_id": question_id,
            "image_id": names[-1],
        }
        return FileRecord(
            key=safe_name(str(question_id)),
            shard=shard,
            image_path=self.clips.find(*names),
            captions=(),
            image_id=f"{self.source}#{names[-1]}",
            info=info,
        )

    def _names(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """What the clip of a question may be called, last the name that the data set gives it."""
        clip = id_of(row, "video_id")
        if isinstance(clip, str) and not clip.isdecimal():
            return (clip,)
        if "category_id" in row:
            return (f"video{clip}",)
        own = f"vid{clip}"
        return (self.youtube[own], own) if own in self.youtube else (own,)

    def describe(self) -> dict[str, object]:
        return self.described


def _read_mapping(path: str) -> dict[str, str]:
    """Data set's name -> YouTube's; raises `SourceError` that names a broken line."""
    try:
        lines = storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        youtube, _, own = line.strip().rpartition(" ")
        if not youtube or not own.startswith("vid"):
            raise SourceError(f"{path} line {number}: expected a name and vid with a number, not {line:.80}")
        names[own] = youtube.strip()
    return names
