"""VQA's, OK-VQA's, Visual Genome's and A-OKVQA's files of questions. Each question is a sample; its id is the key."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from openblip.data.sources import storage
from openblip.data.sources.annotations.file import AnnotationFile, AnnotationRows, first_objects, read_document
from openblip.data.sources.fields import choice_fields, file_name_of, id_of, number_of, text_list, text_of
from openblip.data.sources.rows import ImageRow
from openblip.errors import SourceError

VISUAL_GENOME_WEIGHT = 0.2
"""The weight of a Visual Genome question beside VQAv2's, in the released training code."""


def question_row(
    item: Mapping[str, Any], question_id: Any, image_id: Any, paths: Sequence[str], answers: list[str], **others: Any
) -> ImageRow:
    """A row with the fields that every format of questions has, and others."""
    question = text_of(item, "question")
    info = {"question": question, "answers": answers, "question_id": question_id, "image_id": image_id, **others}
    return ImageRow(question_id, paths, image_id, info=info)


def vqa_rows(file: AnnotationFile) -> AnnotationRows:
    """VQA, VQAv2 and OK-VQA: a questions file, with the annotators' answers in an annotations file beside it.

    `v2_OpenEnded_mscoco_train2014_questions.json` goes with `v2_mscoco_train2014_annotations.json`. The images are
    COCO's of 2014 and 2015, `train2014/COCO_train2014_000000000009.jpg` or without the folder. Test sets have no
    annotations, so no answers. Raises `SourceError` when the annotations are missing.
    """
    subtype = file.content.get("data_subtype")
    if not isinstance(subtype, str) or not subtype:
        raise SourceError(f"{file.path}: no data_subtype (train2014, ...), which the images are named after")
    name = _dataset_name(file.content)
    description = {"format": f"{name} questions of a test set, without annotations"}
    answers: dict[Any, tuple[Any, dict[str, str]]] = {}
    if not subtype.startswith("test"):
        companion = _vqa_annotations(file)
        annotations = read_document(companion)
        answers = _vqa_answers(annotations, companion)
        name = _dataset_name(annotations, name)
        description = {"format": f"{name} questions with annotations", "annotations": companion}
    subtype = subtype.replace("test-dev", "test")
    paths_of = file.image_paths(subtype)

    def row(question: Mapping[str, Any], number: int) -> ImageRow:
        question_id, image_id = id_of(question, "question_id"), number_of(question, "image_id")
        its_answers, types = answers.get(question_id, (None, {}))
        paths = paths_of(f"COCO_{subtype}_{image_id:012d}.jpg")
        return question_row(question, question_id, image_id, paths, text_list(its_answers, "answers"), **types)

    return AnnotationRows(file.content["questions"], row, "questions[{}]".format, description)


def _vqa_annotations(file: AnnotationFile) -> str:
    """The annotations beside a questions file, by the names under which both are distributed."""
    if "questions" not in file.stem:
        raise SourceError(f"{file.path}: its annotations are found by its name, which has to end in questions.json")
    companion = re.sub("OpenEnded_|MultipleChoice_", "", file.stem).replace("questions", "annotations")
    path = file.beside(f"{companion}.json")
    if not storage.exists(path):
        raise SourceError(f"{file.path}: the answers to its questions are missing: there is no {path}")
    return path


def _vqa_answers(content: Any, path: str) -> dict[Any, tuple[Any, dict[str, str]]]:
    """Question id -> its answers as the file has them, and the types that the official evaluation reports by."""
    items = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise SourceError(f"{path}: not the annotations of VQA questions, which are in the list annotations")
    answers: dict[Any, tuple[Any, dict[str, str]]] = {}
    for item in items:
        if isinstance(item, dict) and isinstance(item.get("question_id"), (int, str)):
            names = ("question_type", "answer_type")
            types = {name: sys.intern(item[name]) for name in names if type(item.get(name)) is str}
            answers.setdefault(item["question_id"], (item.get("answers"), types))
    return answers


def _dataset_name(content: Any, otherwise: str = "VQA") -> str:
    """`VQAv2`, `OK-VQA` or what else the file's info says that it is."""
    info = content.get("info") if isinstance(content, dict) else None
    description = info.get("description") if isinstance(info, dict) else None
    match = re.search(r"v(\d+)[.\d]* of the ([\w-]*VQA)\b", str(description))
    if match is None:
        return otherwise
    version, name = match.groups()
    return f"{name}v{version}" if name == "VQA" and version != "1" else name


def visual_genome_rows(file: AnnotationFile) -> AnnotationRows:
    """Visual Genome's question_answers.json: one answer to each question, weighted as BLIP weights it for VQA.

    The images are `VG_100K/1.jpg` or `VG_100K_2/1.jpg`, or without the folder. The question's id is its `qa_id`.
    """
    questions: list[Any] = []
    places: list[tuple[int, int]] = []
    for index, image in enumerate(file.content):
        qas = image.get("qas") if isinstance(image, dict) else None
        # A broken image counts as one broken question, so that it is named.
        items = qas if isinstance(qas, list) else [image]
        questions += items
        places += ((index, number) for number in range(len(items)))
    paths_of = file.image_paths("VG_100K", "VG_100K_2")

    def row(question: Mapping[str, Any], number: int) -> ImageRow:
        question_id, image_id = id_of(question, "qa_id"), number_of(question, "image_id")
        paths, answers = paths_of(f"{image_id}.jpg"), [text_of(question, "answer")]
        return question_row(question, question_id, image_id, paths, answers, weight=VISUAL_GENOME_WEIGHT)

    description = {"format": "Visual Genome questions"}
    return AnnotationRows(questions, row, lambda n: "[{}].qas[{}]".format(*places[n]), description)


def aokvqa_rows(file: AnnotationFile) -> AnnotationRows:
    """A-OKVQA: questions with four choices and ten free answers; the test set has neither the right choice nor the
    answers.

    The images are COCO's of 2017, `train2017/000000000009.jpg` or without the folder.
    """
    splits = {str(item.get("split")) for item in first_objects(file.content)}
    paths_of = file.image_paths(*(f"{split}2017" for split in sorted(splits)))

    def row(question: Mapping[str, Any], number: int) -> ImageRow:
        # LAVIS adds the path of the image in COCO's release of 2014.
        has_path = "image" in question
        name = file_name_of(question, "image") if has_path else f"{number_of(question, 'image_id'):012d}.jpg"
        others = ("rationales", "difficult_direct_answer", "split")
        return question_row(
            question,
            id_of(question, "question_id"),
            question.get("image_id", name),
            paths_of(name),
            text_list(question.get("direct_answers"), "direct_answers"),
            **choice_fields(question.get("choices"), question.get("correct_choice_idx")),
            **{name: question[name] for name in others if name in question},
        )

    return AnnotationRows(file.content, row, "[{}]".format, {"format": "A-OKVQA questions"})
