"""VisDial v1.0: one .json with dialogs of ten rounds about a picture, their texts as indices into its lists.

`visdial_1.0_val_dense_annotations.json` beside `visdial_1.0_val.json` says how right each candidate of one
round is. The pictures of the training set are COCO's of 2014; the others are
`VisualDialog_val2018_000000185565.jpg` in a folder named so, or without it.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from openblip.data.sample import Sample, clean_text, safe_name
from openblip.data.sources import storage
from openblip.data.sources.annotations import (
    AnnotationFile,
    as_object,
    id_of,
    number_of,
    text_of,
)
from openblip.data.sources.documents import read_document
from openblip.data.sources.files import FileRecord
from openblip.errors import SourceError

_FOLDERS = {
    "train": {"train2014": "COCO_train2014", "val2014": "COCO_val2014"},
    "val": {"VisualDialog_val2018": "VisualDialog_val2018", "val2014": "COCO_val2014"},
    "test": {"VisualDialog_test2018": "VisualDialog_test2018"},
}
"""Split -> folder -> how its pictures' names begin. The second of validation is version 0.9's."""

_COMPANIONS = ("{}_dense_annotations.json", "{}_dense_sample.json")

Relevance = tuple[int, list[float]]
"""Number of the round from 0, and how right each of its candidates is, 0 to 1."""


@dataclass(frozen=True, slots=True)
class DialogRecord:
    """A dialog as indices into the lists of its file. Pickled, it becomes a record of its own texts, so that
    no worker gets the lists.
    """

    key: str
    shard: str
    image_paths: tuple[str, ...]
    image_id: str
    dialog: Mapping[str, Any]
    questions: Sequence[str] = field(repr=False)
    answers: Sequence[str] = field(repr=False)
    relevance: Relevance | None = None

    def read(self) -> Sample:
        return self.resolved().read()

    @property
    def info(self) -> dict[str, Any]:
        return {
            "caption": text_of(self.dialog, "caption"),
            "dialog": [self._round(number, turn) for number, turn in enumerate(self.dialog["dialog"])],
            "image_id": self.dialog["image_id"],
        }

    def _round(self, number: int, turn: Mapping[str, Any]) -> dict[str, Any]:
        texts: dict[str, Any] = {"question": self.questions[turn["question"]]}
        if turn.get("answer") is not None:
            texts["answer"] = self.answers[turn["answer"]]
        if turn.get("answer_options") is not None:
            texts["options"] = [self.answers[place] for place in turn["answer_options"]]
            if turn.get("gt_index") is not None:
                texts["answer_index"] = turn["gt_index"]
        if self.relevance is not None and self.relevance[0] == number:
            texts["relevance"] = self.relevance[1]
        return texts

    def resolved(self) -> FileRecord:
        info = self.info
        path, *others = self.image_paths
        return FileRecord(
            key=self.key,
            shard=self.shard,
            image_path=path,
            captions=(info["caption"],),
            image_id=self.image_id,
            info=info,
            other_paths=tuple(others),
        )

    def __reduce__(self) -> tuple[Callable[[FileRecord], FileRecord], tuple[FileRecord]]:
        return _unchanged, (self.resolved(),)


def _unchanged(record: FileRecord) -> FileRecord:
    return record


@dataclass(slots=True)
class VisDialDialogs:
    """The dialogs of a split; the key is the image's id."""

    known_as: ClassVar[str] = "VisDial v1.0 (data with dialogs, questions and answers)"
    has_splits: ClassVar[bool] = False

    source: str
    names: tuple[str, ...]
    dialogs: list[Any] = field(repr=False)
    questions: list[str] = field(repr=False)
    answers: list[str] = field(repr=False)
    relevance: dict[Any, Relevance] = field(repr=False)
    described: dict[str, object]

    @classmethod
    def recognises(cls, content: Any) -> bool:
        data = content.get("data") if isinstance(content, dict) else None
        return isinstance(data, dict) and isinstance(data.get("dialogs"), list)

    @classmethod
    def of(cls, file: AnnotationFile) -> "VisDialDialogs":
        data = file.content["data"]
        questions, answers = (_texts(data.get(name), name, file.path) for name in ("questions", "answers"))
        described: dict[str, object] = {"format": "VisDial dialogs"}
        paths = [file.beside(name.format(file.stem)) for name in _COMPANIONS]
        companion = next((path for path in paths if storage.exists(path)), None)
        if companion is None:
            described["missing"] = f"{paths[0]}, without which no candidate has a relevance (NDCG)"
        else:
            described["dense annotations"] = companion
        return cls(
            source=file.source,
            names=_picture_names(file.images, str(file.content.get("split"))),
            dialogs=data["dialogs"],
            questions=questions,
            answers=answers,
            relevance={} if companion is None else _relevance(companion),
            described=described,
        )

    def __len__(self) -> int:
        return len(self.dialogs)

    def where(self, number: int) -> str:
        return f"dialogs[{number}]"

    def record(self, number: int, shard: str) -> DialogRecord:
        dialog = as_object(self.dialogs[number])
        image_id, own_id = number_of(dialog, "image_id"), id_of(dialog, "image_id")
        text_of(dialog, "caption")
        relevance = self.relevance.get(own_id)
        self._check(dialog.get("dialog"), relevance)
        return DialogRecord(
            key=safe_name(str(own_id)),
            shard=shard,
            image_paths=tuple(name.format(image_id) for name in self.names),
            image_id=f"{self.source}#{own_id}",
            dialog=dialog,
            questions=self.questions,
            answers=self.answers,
            relevance=relevance,
        )

    def _check(self, rounds: Any, relevance: Relevance | None) -> None:
        """Raises `SourceError` where an index points at nothing."""
        if not isinstance(rounds, list) or not rounds:
            raise SourceError(f"dialog must be a list of rounds, not {rounds!r:.80}")
        for number, turn in enumerate(rounds):
            where, turn = f"round {number + 1}", as_object(turn)
            _check_index(turn.get("question"), len(self.questions), f"{where}: question")
            options = turn.get("answer_options")
            if turn.get("answer") is not None:
                _check_index(turn["answer"], len(self.answers), f"{where}: answer")
            if options is not None:
                if not isinstance(options, array) or not options:
                    raise SourceError(
                        f"{where}: answer_options must be a list of numbers, not {options!r:.80}"
                    )
                for place in (min(options), max(options)):
                    _check_index(place, len(self.answers), f"{where}: answer_options")
            if turn.get("gt_index") is not None:
                _check_index(turn["gt_index"], len(options or ()), f"{where}: gt_index")
        if relevance is not None:
            number, values = relevance
            _check_index(number, len(rounds), "round_id of the dense annotations, from 0")
            if len(values) != len(rounds[number].get("answer_options") or ()):
                raise SourceError(
                    f"round {number + 1}: {len(values)} values of relevance for other candidates"
                )

    def describe(self) -> dict[str, object]:
        return self.described


def _texts(found: Any, name: str, path: str) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise SourceError(f"{path}: {name} of its data must be a list of texts")
    return [clean_text(text) for text in found]


def _picture_names(images: str, split: str) -> tuple[str, ...]:
    """The paths at which a picture may lie, with a place for its number."""
    kind = next((kind for kind in _FOLDERS if kind in split), None)
    splits = _FOLDERS.values() if kind is None else [_FOLDERS[kind]]
    folders = {folder: beginning for known in splits for folder, beginning in known.items()}
    escaped = images.replace("{", "{{").replace("}", "}}")
    present = [folder for folder in folders if storage.is_directory(storage.join(images, folder))]
    names = (*(f"{folder}/{folders[folder]}" for folder in present), *folders.values())
    return tuple(storage.join(escaped, f"{name}_{{:012d}}.jpg") for name in names)


def _check_index(found: Any, size: int, what: str) -> None:
    if isinstance(found, bool) or not isinstance(found, int):
        raise SourceError(f"{what} must be a number, not {found!r:.80}")
    if not 0 <= found < size:
        raise SourceError(f"{what} is {found}, of {size}")


def _relevance(path: str) -> dict[Any, Relevance]:
    """By image id. The field is `gt_relevance` for validation, `relevance` for the sample of training."""
    rows = read_document(path)
    if not isinstance(rows, list):
        raise SourceError(f"{path}: dense annotations must be a list")
    found: dict[Any, Relevance] = {}
    for number, row in enumerate(rows):
        values = row.get("gt_relevance", row.get("relevance")) if isinstance(row, dict) else None
        if (
            not isinstance(values, list)
            or not all(isinstance(value, (int, float)) for value in values)
            or not isinstance(row.get("round_id"), int)
            or not isinstance(row.get("image_id"), (int, str))
        ):
            raise SourceError(f"{path}: [{number}] lacks image_id, round_id or a list of relevance")
        found[row["image_id"]] = (row["round_id"] - 1, [float(value) for value in values])
    return found
