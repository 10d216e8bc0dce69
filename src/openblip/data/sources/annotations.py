"""The annotation files of public data sets: for each format a function that makes rows of a file's content.

docs/data.md lists the files, and where their images lie. The functions raise `SourceError` when a companion of the file
is missing or nothing of it can be read. A file's structure tells its format: see `ANNOTATION_FORMATS`.
"""

import functools
import itertools
import json
import os
import re
import sys
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from openblip.data.config import SourceOptions
from openblip.data.sample import VIDEO_SUFFIXES, Source, caption_texts, clean_text
from openblip.data.sources import rows, storage
from openblip.data.sources.dialect import Dialect, Fields, is_image_name, open_text
from openblip.data.sources.rows import AnnotationRows, AnnotationSource, ImageRow, id_of, number_of, text_of
from openblip.errors import SourceError

_VISUAL_GENOME_WEIGHT = 0.2  # of a question beside VQAv2's, in the released training code
_AOKVQA_FIELDS = ("rationales", "difficult_direct_answer", "split")
_NLVR_IDENTIFIER = re.compile(r"(?P<pair>(?P<split>train|dev|test\d)-\d+-\d+)-\d+")
_NLVR_FIELDS = ("identifier", "sentence", "label", "directory")
_VISDIAL_FOLDERS = {
    "train": {"train2014": "COCO_train2014", "val2014": "COCO_val2014"},
    "val": {"VisualDialog_val2018": "VisualDialog_val2018", "val2014": "COCO_val2014"},
    "test": {"VisualDialog_test2018": "VisualDialog_test2018"},
}
"""Split -> folder -> how its images' names begin. The second of validation is version 0.9's."""
_VIDEO_NAMES = ("clip_name", "video_id")
_VIDEO_CAPTIONS = ("sentence", "caption", "captions")
_VIDEO_SUFFIXES = ", ".join(sorted(VIDEO_SUFFIXES))
_NameOf = Callable[[Fields], str]
_Find = Callable[[str], Sequence[str]]  # from the name of an image or video to its possible paths
_LONGEST_LINE = 1 << 20  # bytes of a first line; that of no format of rows is longer


def coco_rows(file: AnnotationSource) -> AnnotationRows:
    """COCO captions and NoCaps, and files of images alone, to write predictions for. The key is the image's id."""
    images, annotations = file.content["images"], file.content.get("annotations") or []
    objects = rows.first_objects(annotations)
    if annotations and not any("caption" in annotation for annotation in objects):
        fields = ", ".join(objects[0]) if objects else f"{annotations!r:.80}"
        raise SourceError(f"{file.path}: its annotations are no captions; found: {fields}")
    captions = _captions_by(annotations, "image_id")
    has_domains = any("domain" in image for image in rows.first_objects(images))
    description = {"format": "NoCaps captions" if has_domains else "COCO captions"}
    if not captions:
        description["missing"] = "the list of annotations: no image has a caption"

    def row(image: Fields, number: int) -> ImageRow:
        path, image_id = storage.join(file.images, rows.file_name_of(image, "file_name")), id_of(image, "id")
        info = {**image, "image_id": image_id}
        if isinstance(spelled := image.get("domain"), str):
            domain = spelled.lower().replace("_", "-").split("-")[0].removesuffix("domain").strip()
            info["domain"] = f"{domain}-domain" if domain in ("in", "near", "out") else spelled
        return ImageRow(image_id, (path,), image_id, caption_texts(captions.get(image_id), "annotations"), info)

    return AnnotationRows(images, row, description, "images[{}]".format)


def _captions_by(annotations: Any, name: str) -> Mapping[Any, list[Any]]:
    """The captions of each image or video, by its id, which is in the field `name` of a list of annotations."""
    captions: dict[Any, list[Any]] = defaultdict(list)
    for item_id, annotation in rows.objects_by_id(annotations, name):
        captions[item_id].append(annotation.get("caption"))
    return captions


def karpathy_rows(file: AnnotationSource) -> AnnotationRows:
    """Karpathy's splits of COCO and Flickr30k. The key is COCO's id, or the file's own where it has none."""
    images, place, sizes = file.choose_split("images")
    paths_of = file.image_paths("flickr30k-images", "flickr30k_images")

    def row(image: Fields, number: int) -> ImageRow:
        name, image_id = rows.file_name_of(image, "filename"), id_of(image, "cocoid" if "cocoid" in image else "imgid")
        paths = paths_of(name)
        if image.get("filepath"):
            paths.insert(0, storage.join(storage.join(file.images, rows.file_name_of(image, "filepath")), name))
        sentences = image.get("sentences")
        if not isinstance(sentences, list):
            raise SourceError(f"sentences must be a list, not {sentences!r:.80}")
        info = {"image_id": image_id, "file_name": name, "split": text_of(image, "split")}
        return ImageRow(image_id, paths, image_id, caption_texts(sentences, "sentences"), info)

    return AnnotationRows(images, row, {"format": "Karpathy split", "splits in the file": sizes}, place)


def listed_rows(file: AnnotationSource) -> AnnotationRows:
    """A list of objects, one sample each: how the authors of BLIP distribute annotations, and LLaVA its instructions.

    The key is an id or else the row's number. Rows that state the same image id, or else the same image, share it.
    """
    image_columns = rows.named_columns(file.options.image_column, rows.IMAGE_COLUMNS)
    objects = rows.first_objects(file.content)
    file.check_columns(dict.fromkeys(name for item in objects for name in item), image_columns)

    def row(item: Fields, number: int) -> ImageRow:
        names = rows.row_images(item, rows.find_column(item, image_columns, "image"))
        if _is_pair(objects[0]) and len(names) != 2:
            raise SourceError("it names one image, and the statements of this file are about two")
        ids = (item.get(name) for name in ("question_id", "identifier", "img_id"))
        key = next((value for value in ids if isinstance(value, (int, str)) and value != ""), None)
        key = rows.row_key(item, number) if key is None else key
        image_id = item.get("image_id", item.get("img_id"))
        image_id = " ".join(names) if image_id is None else image_id
        captions, fields = rows.row_captions(item, file.caption_columns), dict(item)
        if _is_pair(item) and "sentence" in item:
            fields["statement"] = fields.pop("sentence")
        fields = rows.task_fields(fields)
        if "question" in fields:
            fields.pop("answer", None)
            fields.setdefault("question_id", number)
            if item.get("dataset") == "vg":
                fields.setdefault("weight", _VISUAL_GENOME_WEIGHT)
        image, *second = (storage.join(file.images, name) for name in names)
        return ImageRow(key, (image,), image_id, captions, fields, *second)

    first = objects[0]
    if _is_pair(first):
        name = "list of statements about two images"
    elif first.keys() & {"conversations", "instruction", "turns"}:
        name = "list of instructions about images"
    else:
        name = "list of questions" if "question" in first else "list of captioned images"
    return AnnotationRows(file.content, row, {"format": name}, may_repeat_keys=True)


def named_rows(file: AnnotationSource) -> AnnotationRows:
    """An object with the captions of each image, or an object about it, under its name."""
    file.content = [
        {"image": name, **(value if isinstance(value, dict) else {"caption": value})}
        for name, value in file.content.items()
    ]
    listed = listed_rows(file)
    return listed._replace(description={"format": "captions by the names of images"})


def _names_images_itself(content: Any) -> bool:
    """Whether a parsed json is an object of captions, or of objects with captions, by the names of image files."""
    return isinstance(content, dict) and bool(content) and all(map(is_image_name, itertools.islice(content, 100)))


def flickr_rows(file: AnnotationSource) -> AnnotationRows:
    """Flickr8k and Flickr30k: a caption in each line; each image is a sample with all of its captions."""

    def name_of(item: Fields) -> str:
        name = rows.file_name_of(item, "image" if "image" in item else "image_name")
        return re.sub(r"#\d+$", "", name)  # the caption's number

    paths_of = file.image_paths("flickr30k-images", "flickr30k_images", "Images", "Flicker8k_Dataset")
    return _rows_by_name(file, name_of, ("caption", "comment"), paths_of)._replace(
        description={"format": "Flickr8k or Flickr30k captions"}
    )


def _rows_by_name(file: AnnotationSource, name_of: _NameOf, columns: Sequence[str], find: _Find) -> AnnotationRows:
    """One sample for each name, which is its key, with the captions of all rows of that name; broken rows come last."""
    captions: dict[str, list[str]] = {}
    broken: dict[str, SourceError] = {}
    for place, item in file.lines():
        try:
            if isinstance(item, SourceError):
                raise item
            name, its_captions = name_of(rows.as_object(item)), rows.row_captions(item, columns)
            captions.setdefault(name, []).extend(its_captions)
        except SourceError as error:
            broken[place] = error

    def row(item: Fields, number: int) -> ImageRow:
        name = item["name"]
        return ImageRow(name, find(name), name, tuple(captions[name]), {"image_id": name})

    items = [*({"name": name} for name in captions), *broken.values()]
    return AnnotationRows(items, row, {}, [*captions, *broken].__getitem__)


def _is_pair(item: Fields) -> bool:
    images = item.get("images")
    return isinstance(images, list) and len(images) == 2


def _names_images(item: Fields) -> bool:
    return _is_pair(item) or not item.keys().isdisjoint(rows.IMAGE_COLUMNS)


def _question_row(
    item: Fields, question_id: Any, image_id: Any, paths: Sequence[str], answers: list[str], **others: Any
) -> ImageRow:
    """A row with the fields that every format of questions has, and others. The key is the question's id."""
    question = text_of(item, "question")
    info = {"question": question, "answers": answers, "question_id": question_id, "image_id": image_id, **others}
    return ImageRow(question_id, paths, image_id, info=info)


def vqa_rows(file: AnnotationSource) -> AnnotationRows:
    """VQA, VQAv2 and OK-VQA: questions, with the answers in an annotations file beside them except for test sets."""
    subtype = file.content.get("data_subtype")
    if not isinstance(subtype, str) or not subtype:
        raise SourceError(f"{file.path}: no data_subtype (train2014, ...), which the images are named after")
    name = _dataset_name(file.content)
    description = {"format": f"{name} questions of a test set, without annotations"}
    annotations: dict[Any, Fields] = {}
    if not subtype.startswith("test"):
        if "questions" not in file.stem:
            raise SourceError(f"{file.path}: its annotations are found by its name, which has to end in questions.json")
        stem = re.sub("OpenEnded_|MultipleChoice_", "", file.stem).replace("questions", "annotations")
        companion = file.beside(f"{stem}.json")
        if not storage.exists(companion):
            raise SourceError(f"{file.path}: the answers to its questions are missing: there is no {companion}")
        content = rows.read_document(companion)
        annotations = _vqa_annotations(content, companion)
        description = {"format": f"{_dataset_name(content, name)} questions with annotations", "annotations": companion}
    subtype = subtype.replace("test-dev", "test")
    paths_of = file.image_paths(subtype)

    def row(question: Fields, number: int) -> ImageRow:
        question_id, image_id = id_of(question, "question_id"), number_of(question, "image_id")
        types = dict(annotations.get(question_id, {}))
        answers = rows.text_list(types.pop("answers", None), "answers")
        paths = paths_of(f"COCO_{subtype}_{image_id:012d}.jpg")
        return _question_row(question, question_id, image_id, paths, answers, **types)

    return AnnotationRows(file.content["questions"], row, description, "questions[{}]".format)


def _vqa_annotations(content: Any, path: str) -> dict[Any, Fields]:
    """Question id -> its answers as the file has them, and the types that the official evaluation reports by."""
    items = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise SourceError(f"{path}: not the annotations of VQA questions, which are in the list annotations")
    annotations: dict[Any, Fields] = {}
    for question_id, item in rows.objects_by_id(items, "question_id"):
        names = ("question_type", "answer_type")
        types = {name: sys.intern(item[name]) for name in names if type(item.get(name)) is str}
        annotations.setdefault(question_id, {"answers": item.get("answers"), **types})
    return annotations


def _dataset_name(content: Any, otherwise: str = "VQA") -> str:
    """`VQAv2`, `OK-VQA` or what else the file's info says that it is."""
    info = content.get("info") if isinstance(content, dict) else None
    description = info.get("description") if isinstance(info, dict) else None
    match = re.search(r"v(\d+)[.\d]* of the ([\w-]*VQA)\b", str(description))
    if match is None:
        return otherwise
    version, name = match.groups()
    return f"{name}v{version}" if name == "VQA" and version != "1" else name


def visual_genome_rows(file: AnnotationSource) -> AnnotationRows:
    """Visual Genome: one answer to each question, weighted as BLIP weights it for VQA. The id is its `qa_id`."""
    questions, places = list[Any](), list[tuple[int, int]]()
    for index, image in enumerate(file.content):
        qas = image.get("qas") if isinstance(image, dict) else None
        # A broken image counts as one broken question, so that it is named.
        items = qas if isinstance(qas, list) else [image]
        questions += items
        places += ((index, number) for number in range(len(items)))
    paths_of = file.image_paths("VG_100K", "VG_100K_2")

    def row(question: Fields, number: int) -> ImageRow:
        question_id, image_id = id_of(question, "qa_id"), number_of(question, "image_id")
        paths, answers = paths_of(f"{image_id}.jpg"), [text_of(question, "answer")]
        return _question_row(question, question_id, image_id, paths, answers, weight=_VISUAL_GENOME_WEIGHT)

    description = {"format": "Visual Genome questions"}
    return AnnotationRows(questions, row, description, lambda n: "[{}].qas[{}]".format(*places[n]))


def aokvqa_rows(file: AnnotationSource) -> AnnotationRows:
    """A-OKVQA: questions with four choices and ten free answers; the test set has neither answers nor right choice."""
    splits = {str(item.get("split")) for item in rows.first_objects(file.content)}
    paths_of = file.image_paths(*(f"{split}2017" for split in sorted(splits)))

    def row(question: Fields, number: int) -> ImageRow:
        # LAVIS adds the path of the image in COCO's release of 2014.
        has_path = "image" in question
        name = rows.file_name_of(question, "image") if has_path else f"{number_of(question, 'image_id'):012d}.jpg"
        question_id, image_id = id_of(question, "question_id"), question.get("image_id", name)
        answers = rows.text_list(question.get("direct_answers"), "direct_answers")
        fields = rows.choice_fields(question.get("choices"), question.get("correct_choice_idx"))
        others = {name: question[name] for name in _AOKVQA_FIELDS if name in question}
        return _question_row(question, question_id, image_id, paths_of(name), answers, **fields, **others)

    return AnnotationRows(file.content, row, {"format": "A-OKVQA questions"})


def nlvr_rows(file: AnnotationSource) -> AnnotationRows:
    """NLVR2: json lines, each a statement about a left and a right photograph. Those of a pair share an image id."""
    places, items = list[str](), list[Any]()
    for place, item in file.lines():
        places.append(place)
        # Of a line four fields are kept: nine tenths are addresses and the writers' validations.
        items.append({n: item[n] for n in _NLVR_FIELDS if n in item} if isinstance(item, dict) else item)
    paths_in = functools.cache(file.image_paths)  # whether folders exist is asked once

    def row(item: Fields, number: int) -> ImageRow:
        identifier = text_of(item, "identifier")
        match = _NLVR_IDENTIFIER.fullmatch(identifier)
        if match is None:
            raise SourceError(f"the identifier must be like dev-850-0-0, not {identifier:.80}")
        split, directory = match["split"], item.get("directory")
        folders = [f"images/{split}", split]
        if directory is not None:
            folders = [f"images/{split}/{directory}", f"{split}/{directory}", str(directory), *folders]
        info: dict[str, Any] = {"statement": text_of(item, "sentence"), "identifier": identifier}
        if (label := rows.statement_label(item.get("label"))) is not None:
            info["label"] = label
        left, right = (paths_in(*folders)(f"{match['pair']}-img{n}.png")[0] for n in (0, 1))
        return ImageRow(identifier, (left,), match["pair"], info=info, second_image=right)

    return AnnotationRows(items, row, {"format": "NLVR2 statements"}, places.__getitem__)


def visdial_rows(file: AnnotationSource) -> AnnotationRows:
    """VisDial v1.0: dialogs of ten rounds about an image, and beside them how right each candidate of a round is."""
    data = file.content["data"]
    texts: dict[str, list[str]] = {}
    for name in ("questions", "answers"):
        listed = data.get(name)
        if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
            raise SourceError(f"{file.path}: {name} of its data must be a list of texts")
        texts[name] = [clean_text(text) for text in listed]
    description: dict[str, object] = {"format": "VisDial dialogs"}
    companions = [file.beside(f"{file.stem}_{name}.json") for name in ("dense_annotations", "dense_sample")]
    companion = next((path for path in companions if storage.exists(path)), None)
    if companion is None:
        description["missing"] = f"{companions[0]}, without which no candidate has a relevance (NDCG)"
    else:
        description["dense annotations"] = companion
    relevances = {} if companion is None else _visdial_relevances(companion)
    split = str(file.content.get("split"))
    kinds = [kind for kind in _VISDIAL_FOLDERS if kind in split][:1] or _VISDIAL_FOLDERS
    folders = {folder: prefix for kind in kinds for folder, prefix in _VISDIAL_FOLDERS[kind].items()}
    present = [folder for folder in folders if storage.is_directory(storage.join(file.images, folder))]
    prefixes = [*(f"{folder}/{folders[folder]}" for folder in present), *folders.values()]

    def row(dialog: Fields, number: int) -> ImageRow:
        image_number, image_id, turns = number_of(dialog, "image_id"), id_of(dialog, "image_id"), dialog.get("dialog")
        if not isinstance(turns, list) or not turns:
            raise SourceError(f"dialog must be a list of rounds, not {turns!r:.80}")
        rounds = [_visdial_round(turn, f"round {n}", **texts) for n, turn in enumerate(turns, 1)]
        if image_id in relevances:
            index, values = relevances[image_id]
            dense = _item_at(index, rounds, "round_id of the dense annotations, from 0")
            if len(values) != len(dense.get("options", ())):
                raise SourceError(f"round {index + 1}: {len(values)} values of relevance for other candidates")
            dense["relevance"] = values
        caption = text_of(dialog, "caption")
        paths = [storage.join(file.images, f"{prefix}_{image_number:012d}.jpg") for prefix in prefixes]
        info = {"caption": caption, "dialog": rounds, "image_id": image_id}
        return ImageRow(image_id, paths, image_id, (caption,), info)

    return AnnotationRows(data["dialogs"], row, description, "dialogs[{}]".format)


def _visdial_round(turn: Any, place: str, questions: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """The texts of a round; raises `SourceError` where an index points at nothing."""
    turn = rows.as_object(turn)
    texts: dict[str, Any] = {"question": _item_at(turn.get("question"), questions, f"{place}: question")}
    if turn.get("answer") is not None:
        texts["answer"] = _item_at(turn["answer"], answers, f"{place}: answer")
    options = turn.get("answer_options")
    if options is not None:
        if not isinstance(options, array) or not options:
            raise SourceError(f"{place}: answer_options must be a list of numbers, not {options!r:.80}")
        for index in (min(options), max(options)):
            _item_at(index, answers, f"{place}: answer_options")
        texts["options"] = [answers[index] for index in options]
    if turn.get("gt_index") is not None:
        _item_at(turn["gt_index"], options or (), f"{place}: gt_index")
        texts["answer_index"] = turn["gt_index"]
    return texts


def _item_at(index: Any, items: Sequence[Any], what: str) -> Any:
    if isinstance(index, bool) or not isinstance(index, int):
        raise SourceError(f"{what} must be a number, not {index!r:.80}")
    if not 0 <= index < len(items):
        raise SourceError(f"{what} is {index}, of {len(items)}")
    return items[index]


def _visdial_relevances(path: str) -> dict[Any, tuple[int, list[float]]]:
    """Image id -> number of a round from 0, and how right each of its candidates is, 0 to 1."""
    items = rows.read_document(path)
    if not isinstance(items, list):
        raise SourceError(f"{path}: dense annotations must be a list")
    relevances: dict[Any, tuple[int, list[float]]] = {}
    for number, item in enumerate(items):
        # `gt_relevance` for validation, `relevance` for the sample of training
        values: Any = item.get("gt_relevance", item.get("relevance")) if isinstance(item, dict) else None
        are_numbers = isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
        is_named = are_numbers and isinstance(item.get("image_id"), (int, str))
        if not is_named or not isinstance(item.get("round_id"), int):
            raise SourceError(f"{path}: [{number}] lacks image_id, round_id or a list of relevance")
        relevances[item["image_id"]] = (item["round_id"] - 1, [float(value) for value in values])
    return relevances


class VideoFolder:
    """The videos in a folder and below, by name without suffix; of several of one name the outermost counts."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.videos: dict[str, str] = {}
        files = storage.list_files(path, recursive=True)
        for file in sorted(files, key=lambda file: (file.count("/"), file)):
            name, _, suffix = os.path.basename(file).rpartition(".")
            if suffix.lower() in VIDEO_SUFFIXES:
                self.videos.setdefault(name, file)
        if not self.videos:
            raise SourceError(f"{path}: no video ({_VIDEO_SUFFIXES}) in this folder or below")

    def find(self, *names: str) -> tuple[str]:
        """The path of the first video that exists; raises `SourceError` that says what was looked for."""
        for name in names:
            if name in self.videos:
                return (self.videos[name],)
        raise SourceError(f"no video {' or '.join(names)} ({_VIDEO_SUFFIXES}) in {self.path} or below")

    def describe_missing(self, names: Iterable[str]) -> dict[str, str]:
        """How many of the videos do not exist, and one of them; empty when all do."""
        wanted = dict.fromkeys(names)
        missing = [name for name in wanted if name not in self.videos]
        return {"missing": f"{len(missing)} of {len(wanted)} videos, as {missing[0]}"} if missing else {}


def msrvtt_rows(file: AnnotationSource) -> AnnotationRows:
    """MSRVTT captions: each video of the split is a sample with all its captions, and its name is the key."""
    videos, place, sizes = file.choose_split("videos", may_omit=True)
    captions = _captions_by(file.content.get("sentences"), "video_id")
    folder = VideoFolder(file.images)

    def row(video: Fields, number: int) -> ImageRow:
        text_of(video, "split")
        name = text_of(video, "video_id")
        its_captions = caption_texts(captions.get(name), f"sentences of {name}")
        return ImageRow(name, folder.find(name), name, its_captions, info={**video, "image_id": name})

    names = (video.get("video_id") for video in videos if isinstance(video, dict))
    missing = folder.describe_missing(name for name in names if isinstance(name, str))
    return AnnotationRows(videos, row, {"format": "MSRVTT captions", "splits in the file": sizes, **missing}, place)


def video_list_rows(file: AnnotationSource) -> AnnotationRows:
    """Lists of videos with captions: each video is a sample with those of all its rows."""

    def name_of(item: Fields) -> str:
        return text_of(item, next((name for name in _VIDEO_NAMES if name in item), _VIDEO_NAMES[0]))

    folder = VideoFolder(file.images)
    listed = _rows_by_name(file, name_of, _VIDEO_CAPTIONS, folder.find)
    missing = folder.describe_missing(item["name"] for item in listed.items if not isinstance(item, SourceError))
    return listed._replace(description={"format": "list of captioned videos", **missing})


def _names_videos(item: Fields) -> bool:
    """Whether a row has captions of a video that it names without a path."""
    names, captions, paths = (item.keys() & {*c} for c in (_VIDEO_NAMES, _VIDEO_CAPTIONS, rows.IMAGE_COLUMNS))
    return bool(names and captions and not paths)


def video_question_rows(file: AnnotationSource) -> AnnotationRows:
    """MSRVTT-QA and MSVD-QA: questions about numbered videos; the category of their videos tells those of MSRVTT.

    Video 7010 of MSRVTT is `video7010.mp4`. Video 5 of MSVD is `vid5.avi`, or what `youtube_mapping.txt` calls it: a
    line `mv89psg6zh4_33_46 vid5` stands for `mv89psg6zh4_33_46.avi`.
    """
    youtube: dict[str, str] = {}
    if any("category_id" in item for item in rows.first_objects(file.content)):
        description = {"format": "MSRVTT-QA questions"}
    else:
        description = {"format": "MSVD-QA questions"}
        mapping = file.beside("youtube_mapping.txt")
        if storage.exists(mapping):
            youtube, description["youtube_mapping.txt"] = _read_youtube_names(mapping), mapping
        else:
            description["missing"] = f"{mapping}, without which videos are looked for as vid5"
    folder = VideoFolder(file.images)

    def names_of(question: Fields) -> list[str]:
        """What the video of a question may be called, last the name that the data set gives it."""
        video = id_of(question, "video_id")
        if isinstance(video, str) and not video.isdecimal():
            return [video]
        if "category_id" in question:
            return [f"video{video}"]
        name = f"vid{video}"
        return [youtube[name], name] if name in youtube else [name]

    def row(question: Fields, number: int) -> ImageRow:
        question_id = id_of(question, "id") if "id" in question else number
        names = names_of(question)
        answers = rows.text_list(question.get("answer"), "answer")
        others = question.keys() - {"id", "answer", "question", "answers", "question_id", "image_id"}
        fields = {name: question[name] for name in question if name in others}
        return _question_row(question, question_id, names[-1], folder.find(*names), answers, **fields)

    return AnnotationRows(file.content, row, description)


def _read_youtube_names(path: str) -> dict[str, str]:
    """The data set's name -> YouTube's; raises `SourceError` that names a broken line."""
    try:
        lines = storage.read_bytes(path, limit=None).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        youtube, _, name = line.strip().rpartition(" ")
        if youtube and name.startswith("vid"):
            names[name] = youtube.strip()
        elif line.strip():
            raise SourceError(f"{path} line {number}: expected a name and vid with a number, not {line:.80}")
    return names


class _Format(NamedTuple):
    """A format of annotation files, and how it is told."""

    rows: Callable[[AnnotationSource], AnnotationRows]
    list_path: tuple[str, ...]  # the names that lead to the list of objects; none: the file itself is the list
    fields: Set[str] | Callable[[Fields], bool]  # what one of the first objects has, or a function that recognises it
    known_as: str  # its name and what tells it, for the list of what can be read
    has_splits: bool = False  # whether a file holds several splits, of which one is chosen after a `#`
    names_paths: bool = False  # whether images are named by their paths, which may be relative to the file

    def recognises(self, item: Any) -> bool:
        """Whether an item of the list is of this format."""
        return isinstance(item, dict) and (self.fields(item) if callable(self.fields) else item.keys() >= self.fields)

    def is_of(self, content: Any) -> bool:
        """Whether a parsed json has this format's structure."""
        for name in self.list_path:
            content = content.get(name) if isinstance(content, dict) else None
        return any(map(self.recognises, rows.first_objects(content)))


# Asked in this order: a list of A-OKVQA questions may name its images as any list does, and a list that names the files
# of its videos needs no data set's rule for them.
ANNOTATION_FORMATS = (
    _Format(coco_rows, ("images",), {"file_name"}, "COCO or NoCaps captions (the lists images and annotations)",
            names_paths=True),
    _Format(karpathy_rows, ("images",), {"sentences", "split"},
            "Karpathy's dataset_*.json#SPLIT (images with split and sentences)", has_splits=True, names_paths=True),
    _Format(vqa_rows, ("questions",), {"question_id", "question"},
            "VQA, VQAv2 or OK-VQA questions (the list questions; its annotations are found beside it)"),
    _Format(visual_genome_rows, (), {"qas"}, "Visual Genome question_answers.json (a list of images with qas)"),
    _Format(aokvqa_rows, (), {"choices", "question"}, "A-OKVQA (a list of questions with choices)"),
    _Format(visdial_rows, ("data", "dialogs"), set(), "VisDial v1.0 (data with dialogs, questions and answers)"),
    _Format(msrvtt_rows, ("videos",), {"video_id"},
            "MSRVTT captions, file.json#SPLIT (the lists videos and sentences)", has_splits=True),
    _Format(listed_rows, (), _names_images,
            "a list of objects with image (or two images) and caption, question, sentence or conversations",
            names_paths=True),
    _Format(video_question_rows, (), {"question", "video_id"},
            "MSRVTT-QA or MSVD-QA (a list of objects with question and video_id)"),
    _Format(video_list_rows, (), _names_videos, "a list of videos (clip_name or video_id) with sentence or caption"),
)  # fmt: skip
_VIDEO_LIST = ANNOTATION_FORMATS[-1]
_LISTED = next(known for known in ANNOTATION_FORMATS if known.rows is listed_rows)
_NAMED = _Format(named_rows, (), set(), "an object with the captions of each image under its name", names_paths=True)
_FLICKR = _Format(flickr_rows, (), set(), "Flickr30k's results.csv, Flickr8k's captions.txt and token.txt",
                  names_paths=True)  # fmt: skip
_NLVR = _Format(nlvr_rows, (), {"identifier", "sentence"}, "NLVR2 (json lines with identifier and sentence)")


def open_annotated(spec: str, path: str, options: SourceOptions, split: str | None = None) -> Source:
    """Open a .json, .jsonl, .csv, .tsv or .txt: an annotation file where its structure is of one, else a table.

    Where a file names images by their paths, these are beside it unless the options name a folder.
    """
    known, is_table = _recognise_rows(path, options)
    content: Any = None
    if known is None and not is_table:
        try:
            content = rows.read_document(path)
        except SourceError:
            if not (path.lower().endswith(".jsonl") and rows.has_object_rows(path)):
                raise
            return rows.TableSource.open(spec, [path], options)  # of whose rows the first one is broken
        known = next((known for known in ANNOTATION_FORMATS if known.is_of(content)), None)
        if known is None and _names_images_itself(content):
            known = _NAMED
        if known is None and options.image_column is not None and rows.first_objects(content):
            known = _LISTED
        if known is None:
            raise SourceError(f"{path}: not an annotation file that can be read{_described(content)}")
    if split is not None and (known is None or not known.has_splits):
        raise SourceError(f"{spec}: this file has no splits to choose from; leave out #{split}")
    if known is None:
        return rows.TableSource.open(spec, [path], options)
    images = options.images
    if images is None and not known.names_paths:
        raise SourceError(f"{path}: give the folder of its images with --images DIR")
    if images is not None and not storage.is_directory(images):
        raise SourceError(f"{images}: no such folder of images")
    images = storage.parent(path) if images is None else images
    source = AnnotationSource(spec, path, content, images, split, options, known.rows, open_annotated)
    if options.images is None and not source.has_images():
        raise SourceError(f"{path}: its images are not beside it; give their folder with --images DIR")
    return source


def _recognise_rows(path: str, options: SourceOptions) -> tuple[_Format | None, bool]:
    """The format that the first row tells, if any, and whether the file has rows and is not one json document."""
    with storage.source_errors(path), open_text(path) as file:
        columns = Dialect.of(file, path)[0].columns
        if columns is not None:
            fields = dict.fromkeys(columns)
            if options.image_column is None and options.caption_column is None:
                is_text = path.lower().endswith((".txt", ".token"))
                if fields.keys() >= {"image_name", "comment"} or (is_text and fields.keys() == {"image", "caption"}):
                    return _FLICKR, True
            return (_VIDEO_LIST if _VIDEO_LIST.recognises(fields) else None), True
        head = file.read(_LONGEST_LINE).decode("utf-8-sig", "replace")
    first = next((line for line in head.split("\n") if line.strip()), "")
    try:
        item = json.loads(first)
    except (ValueError, RecursionError):
        item = None  # a part of a document, or a broken line of a table, which names it
    if _NLVR.recognises(item):
        return _NLVR, True
    if path.lower().endswith(".json"):
        has_more = len(head.strip()) > len(first.strip())  # one object alone is a document
        return None, has_more and isinstance(item, dict) and not item.keys().isdisjoint(rows.IMAGE_COLUMNS)
    if _VIDEO_LIST.recognises(item):
        return _VIDEO_LIST, True
    return None, not first.lstrip().startswith("[")


def _described(content: Any) -> str:
    """What a file has in it, whose companion it may be, and what can be read."""
    objects = rows.first_objects(content)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if isinstance(content, dict):
        what = f"an object with {', '.join(content) or 'nothing'}"
    else:
        what = f"a list of objects with {', '.join(objects[0]) or 'nothing'}" if objects else f"{content!r:.40}"
    if any("answers" in item for item in rows.first_objects(annotations)):
        what += ", so the annotations of VQA questions: give the questions file, which finds them"
    elif any("round_id" in item for item in objects):
        what += ", so the dense annotations of VisDial: give the dialogs file, which finds them"
    known_as = "; ".join(known.known_as for known in (*ANNOTATION_FORMATS, _NAMED, _NLVR, _FLICKR))
    return f": it is {what}. Known are {known_as}"
