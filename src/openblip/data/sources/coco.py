"""COCO captions and NoCaps: one .json with `images` and `annotations`. All captions of an image are one
sample.

The pictures are `file_name` in the folder of pictures. Files of images alone (image_info_test2014.json,
nocaps_test_image_info.json) give samples without captions, to write predictions for.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar

from openblip.data.sample import caption_texts, safe_name
from openblip.data.sources import storage
from openblip.data.sources.annotations import (
    AnnotationFile,
    as_object,
    file_name_of,
    first_objects,
    id_of,
)
from openblip.data.sources.files import FileRecord
from openblip.errors import SourceError

_DOMAINS = ("in", "near", "out")


@dataclass(slots=True)
class CocoCaptions:
    """The images of a COCO captions file; the key is the image's id."""

    known_as: ClassVar[str] = "COCO or NoCaps captions (the lists images and annotations)"
    has_splits: ClassVar[bool] = False

    source: str
    folder: str
    images: list[Any] = field(repr=False)
    captions: dict[Any, list[Any]] = field(repr=False)

    @classmethod
    def recognises(cls, content: Any) -> bool:
        return isinstance(content, dict) and any(
            "file_name" in image for image in first_objects(content.get("images"))
        )

    @classmethod
    def of(cls, file: AnnotationFile) -> "CocoCaptions":
        annotations = file.content.get("annotations") or []
        rows = first_objects(annotations)
        if annotations and not any("caption" in row for row in rows):
            found = ", ".join(rows[0]) if rows else f"{annotations!r:.80}"
            raise SourceError(f"{file.path}: its annotations are no captions; found: {found}")
        captions: dict[Any, list[Any]] = defaultdict(list)
        for annotation in annotations:
            if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), (int, str)):
                captions[annotation["image_id"]].append(annotation.get("caption"))
        return cls(file.source, file.images, file.content["images"], dict(captions))

    def __len__(self) -> int:
        return len(self.images)

    def where(self, number: int) -> str:
        return f"images[{number}]"

    def record(self, number: int, shard: str) -> FileRecord:
        image = as_object(self.images[number])
        name, image_id = file_name_of(image, "file_name"), id_of(image, "id")
        info = {**image, "image_id": image_id}
        if isinstance(image.get("domain"), str):
            info["domain"] = _domain(image["domain"])
        return FileRecord(
            key=safe_name(str(image_id)),
            shard=shard,
            image_path=storage.join(self.folder, name),
            captions=caption_texts(self.captions.get(image_id), "annotations"),
            image_id=f"{self.source}#{image_id}",
            info=info,
        )

    def describe(self) -> dict[str, object]:
        has_domains = any("domain" in image for image in first_objects(self.images))
        name = "NoCaps captions" if has_domains else "COCO captions"
        if not self.captions:
            return {"format": name, "missing": "the list of annotations: no image has a caption"}
        return {"format": name}


def _domain(spelled: str) -> str:
    """`in-domain`, `near-domain` or `out-domain`, however the file spells it."""
    first = spelled.lower().replace("_", "-").split("-")[0].removesuffix("domain").strip()
    return f"{first}-domain" if first in _DOMAINS else spelled
