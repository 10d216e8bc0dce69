"""Which annotation file a .json is: told by its structure, whatever its name."""

import json
from typing import Any

from openblip.data.sample import Source
from openblip.data.sources import storage
from openblip.data.sources.annotations import (
    AnnotationFile,
    Annotations,
    AnnotationSource,
    first_objects,
    picture_folder,
)
from openblip.data.sources.aokvqa import AokvqaQuestions
from openblip.data.sources.coco import CocoCaptions
from openblip.data.sources.documents import parse_document, read_text
from openblip.data.sources.karpathy import KarpathySplit
from openblip.data.sources.lists import ListedRows
from openblip.data.sources.nlvr import NlvrStatements, numbered_lines
from openblip.data.sources.rows import JsonLines
from openblip.data.sources.tables import IMAGE_COLUMNS, TableSource
from openblip.data.sources.video_lists import ListedClips
from openblip.data.sources.video_msrvtt import MsrvttVideos
from openblip.data.sources.video_questions import VideoQuestions
from openblip.data.sources.visdial import VisDialDialogs
from openblip.data.sources.visual_genome import VisualGenomeQuestions
from openblip.data.sources.vqa import VqaQuestions
from openblip.errors import SourceError

FORMATS: tuple[type[Annotations], ...] = (
    CocoCaptions,
    KarpathySplit,
    VqaQuestions,
    VisualGenomeQuestions,
    AokvqaQuestions,
    VisDialDialogs,
    MsrvttVideos,
    ListedRows,
    VideoQuestions,
    ListedClips,
)
"""Asked in this order: a list of A-OKVQA questions may name its images as any list does, and a list that
names the files of its clips needs no data set's rule for them.
"""


def open_annotations(spec: str, path: str, split: str | None, images: str | None) -> Source:
    """The samples that a .json lists, or those of its lines where each is an object. Raises `SourceError`
    when it is no known annotation file, or a file that belongs to it or the folder of pictures is missing.
    """
    text = read_text(path)
    content, is_whole = parse_document(text, path)
    known: type[Annotations] | None = None
    is_table = not is_whole and isinstance(content, dict) and bool(content.keys() & {*IMAGE_COLUMNS})
    if NlvrStatements.recognises(content):
        known, content = NlvrStatements, numbered_lines(text)
    elif is_whole:
        known = next((known for known in FORMATS if known.recognises(content)), None)
    elif not is_table:
        raise SourceError(f"{path}: broken json: there is more after its end")
    if known is None and not is_table:
        raise SourceError(f"{path}: not an annotation file that can be read{_found(content)}")
    if split is not None and (known is None or not known.has_splits):
        raise SourceError(f"{spec}: this file has no splits to choose from; leave out #{split}")
    if known is None:
        return TableSource.open(spec, [path], images)
    file = AnnotationFile(spec, path, content, picture_folder(path, images), split)
    return AnnotationSource.of(file, known.of(file))


def open_lines(spec: str, paths: list[str], images: str | None) -> Source:
    """Files of json lines: a table, unless it is one file whose first line says that it is something else."""
    if len(paths) == 1:
        try:
            with storage.open_binary(paths[0]) as file:
                first = next((row.data for row in JsonLines().rows(file, 1)), b"")
        except OSError as error:
            raise SourceError(f"{paths[0]}: cannot be read: {error}") from error
        if first.lstrip().startswith(b"[") or _is_statement(first):
            return open_annotations(spec, paths[0], None, images)
    return TableSource.open(spec, paths, images)


def _is_statement(line: bytes) -> bool:
    try:
        return NlvrStatements.recognises(json.loads(line))
    except ValueError:
        return False  # a broken line of a table, which names it


def _found(content: Any) -> str:
    """What a file has in it, what it may be instead, and what can be read."""
    if isinstance(content, dict):
        found = f"an object with {', '.join(content) or 'nothing'}"
    elif rows := first_objects(content):
        found = f"a list of objects with {', '.join(rows[0]) or 'nothing'}"
    else:
        found = f"{content!r:.40}"
    formats: tuple[type[Annotations], ...] = (*FORMATS, NlvrStatements)
    known = "; ".join(known.known_as for known in formats)
    return f": it is {found}{_companion_of(content)}. Known are {known}"


def _companion_of(content: Any) -> str:
    """Whose file it is where it only belongs to another."""
    if isinstance(content, dict) and any(
        "answers" in row for row in first_objects(content.get("annotations"))
    ):
        return ", so the annotations of VQA questions: give the questions file, which finds them"
    if any("round_id" in row for row in first_objects(content)):
        return ", so the dense annotations of VisDial: give the dialogs file, which finds them"
    return ""
