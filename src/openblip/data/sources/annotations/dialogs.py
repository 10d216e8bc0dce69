"""NLVR2's statements about two images, and VisDial's dialogs about one."""

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openblip.data.sample import clean_text
from openblip.data.sources import storage
from openblip.data.sources.annotations.file import AnnotationFile, AnnotationRows, as_object, read_document
from openblip.data.sources.fields import id_of, number_of, statement_label, text_of
from openblip.data.sources.rows import ImageRow
from openblip.errors import SourceError

_NLVR_IDENTIFIER = re.compile(r"(?P<pair>(?P<split>train|dev|test\d)-\d+-\d+)-\d+")
_NLVR_FIELDS = ("identifier", "sentence", "label", "directory")

_VISDIAL_FOLDERS = {
    "train": {"train2014": "COCO_train2014", "val2014": "COCO_val2014"},
    "val": {"VisualDialog_val2018": "VisualDialog_val2018", "val2014": "COCO_val2014"},
    "test": {"VisualDialog_test2018": "VisualDialog_test2018"},
}
"""Split -> folder -> how its images' names begin. The second of validation is version 0.9's."""

Relevance = tuple[int, list[float]]
"""Number of the round from 0, and how right each of its candidates is, 0 to 1."""


def is_nlvr(item: Any) -> bool:
    """Whether the first object of a file of lines is a statement of NLVR2."""
    return isinstance(item, dict) and "identifier" in item and "sentence" in item


def nlvr_rows(file: AnnotationFile) -> AnnotationRows:
    """NLVR2: a file of json lines per split, each a statement about a left and a right photograph.

    The images of `train-10171-0-0` in directory 53 are `images/train/53/train-10171-0-img0.png` (left) and `-img1.png`;
    the left one of `dev-850-0-0` is `dev/dev-850-0-img0.png`. The folder `images` may be left out, and so may all of
    them. The key is the identifier; statements about one pair share an image id.
    """
    places, items = list[str](), list[Any]()
    for place, item in file.lines():
        places.append(place)
        # Of a line four fields are kept: nine tenths are addresses and the writers' validations.
        items.append({n: item[n] for n in _NLVR_FIELDS if n in item} if isinstance(item, dict) else item)
    layouts: dict[str, Callable[[str], list[str]]] = {}  # folder of a pair, relative -> where its images may lie

    def row(item: Mapping[str, Any], number: int) -> ImageRow:
        identifier = text_of(item, "identifier")
        match = _NLVR_IDENTIFIER.fullmatch(identifier)
        if match is None:
            raise SourceError(f"the identifier must be like dev-850-0-0, not {identifier:.80}")
        split, directory = match["split"], item.get("directory")
        inner = split if directory is None else f"{split}/{directory}"
        if inner not in layouts:
            others = [] if directory is None else [str(directory), f"images/{split}", split]
            layouts[inner] = file.image_paths(f"images/{inner}", inner, *others)
        info: dict[str, Any] = {"statement": text_of(item, "sentence"), "identifier": identifier}
        if (label := statement_label(item.get("label"))) is not None:
            info["label"] = label
        left, right = (layouts[inner](f"{match['pair']}-img{n}.png")[0] for n in (0, 1))
        return ImageRow(identifier, (left,), match["pair"], info=info, second_image=right)

    return AnnotationRows(items, row, places.__getitem__, {"format": "NLVR2 statements"})


def visdial_rows(file: AnnotationFile) -> AnnotationRows:
    """VisDial v1.0: dialogs of ten rounds about an image, their texts as indices into lists of the file.

    `visdial_1.0_val_dense_annotations.json` beside `visdial_1.0_val.json` says how right each candidate of one round
    is. The images of the training set are COCO's of 2014; the others are `VisualDialog_val2018_000000185565.jpg` in a
    folder named so, or without it. The key is the image's id.
    """
    data = file.content["data"]
    dialogs = data["dialogs"]
    questions, answers = (_visdial_texts(data.get(name), name, file.path) for name in ("questions", "answers"))
    description: dict[str, object] = {"format": "VisDial dialogs"}
    companions = [file.beside(f"{file.stem}_{name}.json") for name in ("dense_annotations", "dense_sample")]
    companion = next((path for path in companions if storage.exists(path)), None)
    relevances: dict[Any, Relevance] = {}
    if companion is None:
        description["missing"] = f"{companions[0]}, without which no candidate has a relevance (NDCG)"
    else:
        description["dense annotations"] = companion
        relevances = _visdial_relevances(companion)
    prefixes = _visdial_prefixes(file.images, str(file.content.get("split")))

    def row(dialog: Mapping[str, Any], number: int) -> ImageRow:
        image_number, image_id, rounds = number_of(dialog, "image_id"), id_of(dialog, "image_id"), dialog.get("dialog")
        if not isinstance(rounds, list) or not rounds:
            raise SourceError(f"dialog must be a list of rounds, not {rounds!r:.80}")
        rounds = [_visdial_round(turn, f"round {n}", questions, answers) for n, turn in enumerate(rounds, 1)]
        if image_id in relevances:
            index, values = relevances[image_id]
            _check_index(index, rounds, "round_id of the dense annotations, from 0")
            if len(values) != len(rounds[index].get("options", ())):
                raise SourceError(f"round {index + 1}: {len(values)} values of relevance for other candidates")
            rounds[index]["relevance"] = values
        caption = text_of(dialog, "caption")
        paths = [f"{prefix}_{image_number:012d}.jpg" for prefix in prefixes]
        info = {"caption": caption, "dialog": rounds, "image_id": image_id}
        return ImageRow(image_id, paths, image_id, (caption,), info)

    return AnnotationRows(dialogs, row, "dialogs[{}]".format, description)


def _visdial_round(turn: Any, place: str, questions: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """The texts of a round; raises `SourceError` where an index points at nothing."""
    turn = as_object(turn)
    _check_index(turn.get("question"), questions, f"{place}: question")
    texts: dict[str, Any] = {"question": questions[turn["question"]]}
    if turn.get("answer") is not None:
        _check_index(turn["answer"], answers, f"{place}: answer")
        texts["answer"] = answers[turn["answer"]]
    options = turn.get("answer_options")
    if options is not None:
        if not isinstance(options, array) or not options:
            raise SourceError(f"{place}: answer_options must be a list of numbers, not {options!r:.80}")
        for index in (min(options), max(options)):
            _check_index(index, answers, f"{place}: answer_options")
        texts["options"] = [answers[index] for index in options]
    if turn.get("gt_index") is not None:
        _check_index(turn["gt_index"], options or (), f"{place}: gt_index")
        texts["answer_index"] = turn["gt_index"]
    return texts


def _check_index(index: Any, items: Sequence[Any], what: str) -> None:
    if isinstance(index, bool) or not isinstance(index, int):
        raise SourceError(f"{what} must be a number, not {index!r:.80}")
    if not 0 <= index < len(items):
        raise SourceError(f"{what} is {index}, of {len(items)}")


def _visdial_texts(texts: Any, name: str, path: str) -> list[str]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SourceError(f"{path}: {name} of its data must be a list of texts")
    return [clean_text(text) for text in texts]


def _visdial_prefixes(images: str, split: str) -> list[str]:
    """How the paths may begin at which an image may lie, up to its number."""
    kind = next((kind for kind in _VISDIAL_FOLDERS if kind in split), None)
    splits = _VISDIAL_FOLDERS.values() if kind is None else [_VISDIAL_FOLDERS[kind]]
    folders = {folder: prefix for names in splits for folder, prefix in names.items()}
    present = [folder for folder in folders if storage.is_directory(storage.join(images, folder))]
    names = [*(f"{folder}/{folders[folder]}" for folder in present), *folders.values()]
    return [storage.join(images, name) for name in names]


def _visdial_relevances(path: str) -> dict[Any, Relevance]:
    """By image id. The field is `gt_relevance` for validation, `relevance` for the sample of training."""
    items = read_document(path)
    if not isinstance(items, list):
        raise SourceError(f"{path}: dense annotations must be a list")
    relevances: dict[Any, Relevance] = {}
    for number, item in enumerate(items):
        values = item.get("gt_relevance", item.get("relevance")) if isinstance(item, dict) else None
        if (
            not isinstance(values, list)
            or not all(isinstance(value, (int, float)) for value in values)
            or not isinstance(item.get("round_id"), int)
            or not isinstance(item.get("image_id"), (int, str))
        ):
            raise SourceError(f"{path}: [{number}] lacks image_id, round_id or a list of relevance")
        relevances[item["image_id"]] = (item["round_id"] - 1, [float(value) for value in values])
    return relevances
