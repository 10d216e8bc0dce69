"""A .json that is a list of objects, one sample each: how the authors of BLIP distribute annotations."""

from collections.abc import Mapping
from typing import Any

from openblip.data.sources import storage
from openblip.data.sources.annotations.file import AnnotationFile, AnnotationRows, first_objects
from openblip.data.sources.annotations.questions import VISUAL_GENOME_WEIGHT
from openblip.data.sources.fields import file_name_of, task_fields
from openblip.data.sources.rows import IMAGE_COLUMNS, ImageRow, row_captions, row_key
from openblip.errors import SourceError


def names_images(item: Mapping[str, Any]) -> bool:
    """Whether a row has an image or a pair of them."""
    return _is_pair(item) or not item.keys().isdisjoint(IMAGE_COLUMNS)


def listed_rows(file: AnnotationFile) -> AnnotationRows:
    """Captions (`coco_karpathy_train.json`, `flickr30k_test.json`, `nocaps_val.json`): `image` with `caption`, one or a
    list. Questions (`vqa_train.json`, `vg_qa.json`): `image`, `question` and `answer`, one or a list. Pairs
    (`nlvr_train.json`): two `images`, `sentence` and `label`. Instructions of LLaVA (`llava_instruct_150k.json`):
    `image` and `conversations`.

    Paths are relative to the folder of images. The key is a question's id, an identifier or else the row's number. Rows
    that state the same image id, or else the same image, share it.
    """

    def row(item: Mapping[str, Any], number: int) -> ImageRow:
        if _is_pair(item):
            names = [file_name_of({"images": name}, "images") for name in item["images"]]
        elif (column := next((name for name in IMAGE_COLUMNS if name in item), None)) is not None:
            names = [file_name_of(item, column)]
        else:
            raise SourceError(f"no image; found: {', '.join(item) or 'nothing'}")
        ids = (item.get(name) for name in ("question_id", "identifier", "img_id"))
        key = next((value for value in ids if isinstance(value, (int, str)) and value != ""), None)
        stated = item.get("image_id", item.get("img_id"))
        image, *second = (storage.join(file.images, name) for name in names)
        return ImageRow(
            key=row_key(item, number) if key is None else key,
            image=(image,),
            image_id=" ".join(names) if stated is None else stated,
            captions=row_captions(item),
            info=_info(item, number),
            second_image=second[0] if second else None,
        )

    format_name = _format_name(first_objects(file.content)[0])
    return AnnotationRows(file.content, row, "[{}]".format, {"format": format_name})


def _is_pair(item: Mapping[str, Any]) -> bool:
    images = item.get("images")
    return isinstance(images, list) and len(images) == 2


def _info(item: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The row under the names of docs/data.md."""
    fields = dict(item)
    if _is_pair(item) and "sentence" in item:
        fields["statement"] = fields.pop("sentence")
    fields = task_fields(fields)
    if "question" in fields:
        fields.pop("answer", None)
        fields.setdefault("question_id", number)
        if item.get("dataset") == "vg":
            fields.setdefault("weight", VISUAL_GENOME_WEIGHT)
    return fields


def _format_name(item: Mapping[str, Any]) -> str:
    if _is_pair(item):
        return "list of statements about two images"
    if item.keys() & {"conversations", "instruction", "turns"}:
        return "list of instructions about images"
    return "list of questions" if "question" in item else "list of captioned images"
