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
    parse_document,
    read_text,
)
from openblip.data.sources.annotations.lists import listed_rows, names_images
from openblip.data.sources.annotations.questions import aokvqa_rows, visual_genome_rows, vqa_rows
from openblip.data.sources.annotations.videos import (
    is_video_table,
    msrvtt_rows,
    names_videos,
    video_list_rows,
    video_question_rows,
)
from openblip.data.sources.rows import IMAGE_COLUMNS
from openblip.data.sources.table import JsonLines, TableSource
from openblip.errors import SourceError


class AnnotationFormat(NamedTuple):
    """A format of annotation files, and how it is told."""

    known_as: str
    """Its name and what tells it, for the list of what can be read."""
    rows: Callable[[AnnotationFile], AnnotationRows]
    """Raises `SourceError` when a file that belongs to it is missing or nothing of it can be read."""
    list_path: tuple[str, ...] = ()
    """The names that lead to its list of objects; none: the file itself is the list."""
    fields: tuple[str, ...] = ()
    """What one of the first objects of the list has."""
    recognises: Callable[[Mapping[str, Any]], bool] = lambda item: True
    """What else must be true of that object."""
    has_splits: bool = False
    """Whether a file holds several splits, of which one is chosen after a `#`."""

    def is_of(self, content: Any) -> bool:
        """Whether a parsed json has this format's structure."""
        for name in self.list_path:
            content = content.get(name) if isinstance(content, dict) else None
        return any(
            all(name in item for name in self.fields) and self.recognises(item) for item in first_objects(content)
        )


ANNOTATION_FORMATS = (
    AnnotationFormat(
        "COCO or NoCaps captions (the lists images and annotations)", coco_rows, ("images",), ("file_name",)
    ),
    AnnotationFormat(
        "Karpathy's dataset_*.json#SPLIT (images with split and sentences)",
        karpathy_rows,
        ("images",),
        ("sentences", "split"),
        has_splits=True,
    ),
    AnnotationFormat(
        "VQA, VQAv2 or OK-VQA questions (the list questions; its annotations are found beside it)",
        vqa_rows,
        ("questions",),
        ("question_id", "question"),
    ),
    AnnotationFormat(
        "Visual Genome question_answers.json (a list of images with qas)", visual_genome_rows, fields=("qas",)
    ),
    AnnotationFormat("A-OKVQA (a list of questions with choices)", aokvqa_rows, fields=("choices", "question")),
    AnnotationFormat("VisDial v1.0 (data with dialogs, questions and answers)", visdial_rows, ("data", "dialogs")),
    AnnotationFormat(
        "MSRVTT captions, file.json#SPLIT (the lists videos and sentences)",
        msrvtt_rows,
        ("videos",),
        ("video_id",),
        has_splits=True,
    ),
    AnnotationFormat(
        "a list of objects with image (or two images) and caption, question, sentence or conversations",
        listed_rows,
        recognises=names_images,
    ),
    AnnotationFormat(
        "MSRVTT-QA or MSVD-QA (a list of objects with question and video_id)",
        video_question_rows,
        fields=("question", "video_id"),
    ),
    AnnotationFormat(
        "a list of videos (clip_name or video_id) with sentence or caption", video_list_rows, recognises=names_videos
    ),
)
"""Asked in this order: a list of A-OKVQA questions may name its images as any list does, and a list that
names the files of its videos needs no data set's rule for them.
"""

_NLVR = AnnotationFormat("NLVR2 (json lines with identifier and sentence)", nlvr_rows)


def open_annotated(spec: str, path: str, images: str | None, split: str | None = None) -> Source:
    """Open a .json, .jsonl, .csv or .tsv: an annotation file where its structure is of one, else a table.

    `images` is the folder of the images, `split` what stood after a `#`. Raises `SourceError` when a .json is
    neither, or a file that belongs to it or the folder of images is missing.
    """
    suffix = path.rsplit(".", 1)[-1].lower()
    if suffix != "json":
        if is_video_table(path):
            return _annotation_source(ANNOTATION_FORMATS[-1], spec, path, "", None, images, None)
        if suffix != "jsonl" or not _is_annotation(path):
            return TableSource.open(spec, [path], images)
    text = read_text(path)
    content, is_whole = parse_document(text, path)
    known: AnnotationFormat | None = None
    is_table = not is_whole and isinstance(content, dict) and bool(content.keys() & {*IMAGE_COLUMNS})
    if is_nlvr(content):
        known = _NLVR
    elif is_whole:
        known = next((known for known in ANNOTATION_FORMATS if known.is_of(content)), None)
    elif not is_table:
        raise SourceError(f"{path}: broken json: there is more after its end")
    if known is None and not is_table:
        raise SourceError(f"{path}: not an annotation file that can be read{_described(content)}")
    if split is not None and (known is None or not known.has_splits):
        raise SourceError(f"{spec}: this file has no splits to choose from; leave out #{split}")
    if known is None:
        return TableSource.open(spec, [path], images)
    return _annotation_source(known, spec, path, text, content, images, split)


def _annotation_source(
    known: AnnotationFormat, spec: str, path: str, text: str, content: Any, images: str | None, split: str | None
) -> AnnotationSource:
    if images is None:
        raise SourceError(f"{path}: give the folder of its images with --images DIR")
    if not storage.is_directory(images):
        raise SourceError(f"{images}: no such folder of images")
    file = AnnotationFile(spec, path, text, content, images, split)
    annotations = known.rows(file)
    chunks = rows.chunk_names(file.stem if split is None else f"{file.stem}-{split}", annotations.num_rows)
    if not chunks:
        raise SourceError(f"{spec}: it lists no samples")
    return AnnotationSource(spec, annotations, chunks, (open_annotated, (spec, path, images, split)))


def _is_annotation(path: str) -> bool:
    """Whether a .jsonl is one list, or its first line says that it is NLVR2's."""
    try:
        with storage.open_binary(path) as file:
            first = next((line.data for line in JsonLines().lines(file, 1)), b"")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error
    try:
        return first.lstrip().startswith(b"[") or is_nlvr(json.loads(first))
    except ValueError:
        return False  # a broken line of a table, which names it


def _described(content: Any) -> str:
    """What a file has in it, what it may be instead, and what can be read."""
    if isinstance(content, dict):
        what = f"an object with {', '.join(content) or 'nothing'}"
    elif objects := first_objects(content):
        what = f"a list of objects with {', '.join(objects[0]) or 'nothing'}"
    else:
        what = f"{content!r:.40}"
    known = "; ".join(known.known_as for known in (*ANNOTATION_FORMATS, _NLVR))
    return f": it is {what}{_companion_of(content)}. Known are {known}"


def _companion_of(content: Any) -> str:
    """Whose file it is where it only belongs to another."""
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if any("answers" in item for item in first_objects(annotations)):
        return ", so the annotations of VQA questions: give the questions file, which finds them"
    if any("round_id" in item for item in first_objects(content)):
        return ", so the dense annotations of VisDial: give the dialogs file, which finds them"
    return ""
