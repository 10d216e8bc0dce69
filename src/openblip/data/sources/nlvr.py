"""NLVR2 as distributed: a file of json lines per split, each a statement about a left and a right photograph.

The pictures of `train-10171-0-0` in directory 53 are `images/train/53/train-10171-0-img0.png` (left) and
`-img1.png`; the left one of `dev-850-0-0` is `dev/dev-850-0-img0.png`. The folder `images` may be left out,
and so may all of them.
"""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from openblip.data.sample import parse_json_object, safe_name
from openblip.data.sources import storage
from openblip.data.sources.annotations import AnnotationFile, text_of
from openblip.data.sources.files import FileRecord, present_folders
from openblip.data.sources.task_fields import truth
from openblip.errors import SourceError

_IDENTIFIER = re.compile(r"(?P<pair>(?P<split>train|dev|test\d)-\d+-\d+)-\d+")

_FIELDS = ("identifier", "sentence", "label", "directory")

Line = tuple[int, dict[str, Any] | SourceError]
"""A line's number from 1, and what is read of it: nine tenths are addresses and the writers' validations."""


def numbered_lines(text: str) -> list[Line]:
    """The lines that are not blank; a broken one as its error."""
    lines: list[Line] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json_object(line, "the statement")
        except SourceError as error:
            lines.append((number, error))
        else:
            lines.append((number, {name: row[name] for name in _FIELDS if name in row}))
    return lines


@dataclass(slots=True)
class NlvrStatements:
    """The statements of a split; the key is the identifier, and statements about one pair share an image id.

    `content` of its file is what `numbered_lines` gives.
    """

    known_as: ClassVar[str] = "NLVR2 (json lines with identifier and sentence)"
    has_splits: ClassVar[bool] = False

    source: str
    images: str
    lines: list[Line] = field(repr=False)
    folders: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def recognises(cls, content: Any) -> bool:
        """Whether a file's first object is such a line."""
        return isinstance(content, dict) and "identifier" in content and "sentence" in content

    @classmethod
    def of(cls, file: AnnotationFile) -> "NlvrStatements":
        return cls(file.source, file.images, file.content)

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, number: int) -> str:
        return f"line {self.lines[number][0]}"

    def record(self, number: int, shard: str) -> FileRecord:
        row = self.lines[number][1]
        if isinstance(row, SourceError):
            raise row
        identifier = text_of(row, "identifier")
        found = _IDENTIFIER.fullmatch(identifier)
        if found is None:
            raise SourceError(f"the identifier must be like dev-850-0-0, not {identifier:.80}")
        folder = self._folder(found["split"], row.get("directory"))
        info: dict[str, Any] = {"statement": text_of(row, "sentence"), "identifier": identifier}
        if (label := truth(row.get("label"))) is not None:
            info["label"] = label
        return FileRecord(
            key=safe_name(identifier),
            shard=shard,
            image_path=storage.join(folder, f"{found['pair']}-img0.png"),
            captions=(),
            image_id=f"{self.source}#{found['pair']}",
            info=info,
            second_image_path=storage.join(folder, f"{found['pair']}-img1.png"),
        )

    def _folder(self, split: str, directory: Any) -> str:
        """Where a pair lies: the first of the layouts that is there, looked up once."""
        inner = split if directory is None else f"{split}/{directory}"
        if inner not in self.folders:
            names = [f"images/{inner}", inner]
            if directory is not None:
                names += [str(directory), f"images/{split}", split]
            self.folders[inner] = present_folders(self.images, *names)[0]
        return self.folders[inner]

    def describe(self) -> dict[str, object]:
        return {"format": "NLVR2 statements"}
