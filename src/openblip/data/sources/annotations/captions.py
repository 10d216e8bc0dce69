"""COCO's, NoCaps' and Karpathy's files of captions. All captions of an image are one sample."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from openblip.data.sample import caption_texts
from openblip.data.sources import storage
from openblip.data.sources.annotations.file import AnnotationFile, AnnotationRows, first_objects
from openblip.data.sources.fields import file_name_of, id_of, text_of
from openblip.data.sources.rows import ImageRow
from openblip.errors import SourceError


def coco_rows(file: AnnotationFile) -> AnnotationRows:
    """COCO captions and NoCaps: the lists `images` and `annotations`; the key is the image's id.

    Files of images alone (image_info_test2014.json, nocaps_test_image_info.json) give samples without captions, to
    write predictions for. Raises `SourceError` for annotations that are no captions.
    """
    images, annotations = file.content["images"], file.content.get("annotations") or []
    objects = first_objects(annotations)
    if annotations and not any("caption" in annotation for annotation in objects):
        fields = ", ".join(objects[0]) if objects else f"{annotations!r:.80}"
        raise SourceError(f"{file.path}: its annotations are no captions; found: {fields}")
    captions = captions_by(annotations, "image_id")
    has_domains = any("domain" in image for image in first_objects(images))
    description = {"format": "NoCaps captions" if has_domains else "COCO captions"}
    if not captions:
        description["missing"] = "the list of annotations: no image has a caption"

    def row(image: Mapping[str, Any], number: int) -> ImageRow:
        path, image_id = storage.join(file.images, file_name_of(image, "file_name")), id_of(image, "id")
        info = {**image, "image_id": image_id}
        if isinstance(image.get("domain"), str):
            info["domain"] = _domain(image["domain"])
        return ImageRow(image_id, (path,), image_id, caption_texts(captions.get(image_id), "annotations"), info)

    return AnnotationRows(images, row, "images[{}]".format, description)


def captions_by(annotations: Any, name: str) -> Mapping[Any, list[Any]]:
    """The captions of each image or video, by its id, which is in the field `name` of a list of annotations."""
    captions: dict[Any, list[Any]] = defaultdict(list)
    for annotation in annotations if isinstance(annotations, list) else ():
        if isinstance(annotation, dict) and isinstance(annotation.get(name), (int, str)):
            captions[annotation[name]].append(annotation.get("caption"))
    return captions


def _domain(spelled: str) -> str:
    """`in-domain`, `near-domain` or `out-domain`, however the file spells it."""
    first = spelled.lower().replace("_", "-").split("-")[0].removesuffix("domain").strip()
    return f"{first}-domain" if first in ("in", "near", "out") else spelled


def karpathy_rows(file: AnnotationFile) -> AnnotationRows:
    """Karpathy's splits of COCO and Flickr30k: dataset_coco.json and dataset_flickr30k.json.

    The split stands after a `#`: `dataset_coco.json#test`. Training is `train` and `restval` together, as everywhere.
    The key is COCO's id, or the file's own where it has none (Flickr30k).
    """
    images = file.content["images"]
    numbers, sizes = file.choose_split(images, "images")
    paths_of = file.image_paths("flickr30k-images", "flickr30k_images")

    def row(image: Mapping[str, Any], number: int) -> ImageRow:
        name, image_id = file_name_of(image, "filename"), id_of(image, "cocoid" if "cocoid" in image else "imgid")
        paths = paths_of(name)
        if image.get("filepath"):
            paths.insert(0, storage.join(storage.join(file.images, file_name_of(image, "filepath")), name))
        sentences = image.get("sentences")
        if not isinstance(sentences, list):
            raise SourceError(f"sentences must be a list, not {sentences!r:.80}")
        info = {"image_id": image_id, "file_name": name, "split": text_of(image, "split")}
        return ImageRow(image_id, paths, image_id, caption_texts(sentences, "sentences"), info)

    description = {"format": "Karpathy split", "splits in the file": sizes}
    return AnnotationRows([images[n] for n in numbers], row, lambda n: f"images[{numbers[n]}]", description)
