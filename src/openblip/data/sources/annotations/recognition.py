"""Which annotation file a .json, .jsonl or .csv is: told by its structure, whatever its name."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from openblip.data.sample import Source
from openblip.data.sources import rows, storage
from openblip.data.sources.annotations.captions import coco_rows, karpathy_rows
from openblip.data.sources.annotations.dialogs import is_nlvr, nlvr_rows, visdial_rows
from openblip.data.sources.annotations.file import (
    AnnotationFile,
    AnnotationRows,
    AnnotationSource,
    first_objects,
    read_document,
)
from openblip.data.sources.annotations.lists import listed_rows, names_images
from openblip.data.sources.annotations.questions import aokvqa_rows, visual_genome_rows, vqa_rows
from openblip.data.sources.annotations.videos import msrvtt_rows, names_videos, video_list_rows, video_question_rows
from openblip.data.sources.rows import IMAGE_COLUMNS
from openblip.data.sources.table import Dialect, TableSource
from openblip.errors import SourceError


class AnnotationFormat(NamedTuple):
    """A format of annotation files, and how it is told."""

    known_as: str
    """Its name and what tells it, for the list of what can be read."""
    rows: Callable[[AnnotationFile], AnnotationRows]
    """Raises `SourceError` when a file that belongs to it is missing or nothing of it can be read."""
    recognises: Callable[[Mapping[str, Any]], bool]
    """Whether one of the first objects of a list is of this format."""
    list_path: tuple[str, ...] = ()
    """The names that lead to the list of objects; none: the file itself is the list."""
    has_splits: bool = False
    """Whether a file holds several splits, of which one is chosen after a `#`."""

    def is_of(self, content: Any) -> bool:
        """Whether a parsed json has this format's structure."""
        for name in self.list_path:
            content = content.get(name) if isinstance(content, dict) else None
        return any(map(self.recognises, first_objects(content)))


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda item: item.keys() >= {*names}


ANNOTATION_FORMATS = (
    AnnotationFormat(
        "COCO or NoCaps captions (the lists images and annotations)", coco_rows, _has("file_name"), ("images",)
    ),
    AnnotationFormat(
        "Karpathy's dataset_*.json#SPLIT (images with split and sentences)",
        karpathy_rows, _has("sentences", "split"), ("images",), has_splits=True,
    ),
    AnnotationFormat(
        "VQA, VQAv2 or OK-VQA questions (the list questions; its annotations are found beside it)",
        vqa_rows, _has("question_id", "question"), ("questions",),
    ),
    AnnotationFormat(
        "Visual Genome question_answers.json (a list of images with qas)", visual_genome_rows, _has("qas")
    ),
    AnnotationFormat("A-OKVQA (a list of questions with choices)", aokvqa_rows, _has("choices", "question")),
    AnnotationFormat(
        "VisDial v1.0 (data with dialogs, questions and answers)", visdial_rows, _has(), ("data", "dialogs")
    ),
    AnnotationFormat(
        "MSRVTT captions, file.json#SPLIT (the lists videos and sentences)",
        msrvtt_rows, _has("video_id"), ("videos",), has_splits=True,
    ),
    AnnotationFormat(
        "a list of objects with image (or two images) and caption, question, sentence or conversations",
        listed_rows, names_images,
    ),
    AnnotationFormat(
        "MSRVTT-QA or MSVD-QA (a list of objects with question and video_id)",
        video_question_rows, _has("question", "video_id"),
    ),
    AnnotationFormat(
        "a list of videos (clip_name or video_id) with sentence or caption", video_list_rows, names_videos
    ),
)  # fmt: skip
"""Asked in this order: a list of A-OKVQA questions may name its images as any list does, and a list that names the
files of its videos needs no data set's rule for them.
"""

_NLVR = AnnotationFormat("NLVR2 (json lines with identifier and sentence)", nlvr_rows, is_nlvr)
_VIDEO_LIST = ANNOTATION_FORMATS[-1]
_LONGEST_LINE = 1 << 20  # bytes of a first line; that of no format of rows is longer


def open_annotated(spec: str, path: str, images: str | None, split: str | None = None) -> Source:
    """Open a .json, .jsonl, .csv or .tsv: an annotation file where its structure is of one, else a table.

    `images` is the folder of the images, `split` what stood after a `#`. Raises `SourceError` when a .json is neither,
    or a file that belongs to it or the folder of images is missing.
    """
    known, is_table = _recognise_rows(path)
    content: Any = None
    if known is None and not is_table:
        content = read_document(path)
        known = next((known for known in ANNOTATION_FORMATS if known.is_of(content)), None)
        if known is None:
            raise SourceError(f"{path}: not an annotation file that can be read{_described(content)}")
    if split is not None and (known is None or not known.has_splits):
        raise SourceError(f"{spec}: this file has no splits to choose from; leave out #{split}")
    if known is None:
        return TableSource.open(spec, [path], images)
    if images is None:
        raise SourceError(f"{path}: give the folder of its images with --images DIR")
    if not storage.is_directory(images):
        raise SourceError(f"{images}: no such folder of images")
    file = AnnotationFile(spec, path, content, images, split)
    listed = known.rows(file)
    if not listed.items:
        raise SourceError(f"{spec}: it lists no samples")
    chunks = rows.chunk_names(file.stem if split is None else f"{file.stem}-{split}", rows.cut_rows(len(listed.items)))
    return AnnotationSource(spec, listed, chunks, (open_annotated, (spec, path, images, split)))


def _recognise_rows(path: str) -> tuple[AnnotationFormat | None, bool]:
    """The format of annotation file that the first row tells, if any, and whether the file consists of rows (json
    lines or .csv) and is not one json document.
    """
    with storage.source_errors(path), storage.open_binary(path) as file:
        columns = Dialect.of(file, path)[0].columns
        if columns is not None:
            return (_VIDEO_LIST if names_videos(dict.fromkeys(columns)) else None), True
        head = file.read(_LONGEST_LINE).decode("utf-8-sig", "replace")
    first = next((line for line in head.split("\n") if line.strip()), "")
    try:
        item = json.loads(first)
    except (ValueError, RecursionError):
        item = None  # a part of a document, or a broken line of a table, which names it
    if is_nlvr(item):
        return _NLVR, True
    if path.lower().endswith(".json"):
        has_more = len(head.strip()) > len(first.strip())  # one object alone is a document
        return None, has_more and isinstance(item, dict) and not item.keys().isdisjoint(IMAGE_COLUMNS)
    if isinstance(item, dict) and names_videos(item):
        return _VIDEO_LIST, True
    return None, not first.lstrip().startswith("[")


def _described(content: Any) -> str:
    """What a file has in it, whose companion it may be, and what can be read."""
    objects = first_objects(content)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if isinstance(content, dict):
        what = f"an object with {', '.join(content) or 'nothing'}"
    else:
        what = f"a list of objects with {', '.join(objects[0]) or 'nothing'}" if objects else f"{content!r:.40}"
    if any("answers" in item for item in first_objects(annotations)):
        what += ", so the annotations of VQA questions: give the questions file, which finds them"
    elif any("round_id" in item for item in objects):
        what += ", so the dense annotations of VisDial: give the dialogs file, which finds them"
    return f": it is {what}. Known are {'; '.join(known.known_as for known in (*ANNOTATION_FORMATS, _NLVR))}"
