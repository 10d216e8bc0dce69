"""Karpathy's splits of COCO and Flickr30k: dataset_coco.json and dataset_flickr30k.json, with the split after
a `#`: `dataset_coco.json#test`. Training is `train` and `restval` together, as everywhere.
"""

from collections import Counter
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
    text_of,
)
from openblip.data.sources.files import FileRecord, present_folders
from openblip.errors import SourceError

_FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images")


@dataclass(slots=True)
class KarpathySplit:
    """The images of one split, each with all its captions; the key is COCO's id, or the file's own where it
    has none (Flickr30k).
    """

    known_as: ClassVar[str] = "Karpathy's dataset_*.json#SPLIT (images with split and sentences)"
    has_splits: ClassVar[bool] = True

    source: str
    folders: tuple[str, ...]
    images: list[Any] = field(repr=False)
    places: list[int] = field(repr=False)
    splits: Counter[str]

    @classmethod
    def recognises(cls, content: Any) -> bool:
        return isinstance(content, dict) and any(
            "sentences" in image and "split" in image for image in first_objects(content.get("images"))
        )

    @classmethod
    def of(cls, file: AnnotationFile) -> "KarpathySplit":
        images = file.content["images"]
        splits = [_split(image) for image in images]
        sizes = Counter(filter(None, splits))
        if file.split not in sizes:
            listed = ", ".join(f"#{split} ({size} images)" for split, size in sizes.items())
            wanted = "say which split after a #" if file.split is None else f"there is no split {file.split}"
            raise SourceError(f"{file.source}: {wanted}; the file has {listed}")
        places = [place for place, split in enumerate(splits) if split in (file.split, None)]
        folders = present_folders(file.images, *_FLICKR_FOLDERS)
        return cls(file.source, folders, images, places, sizes)

    def __len__(self) -> int:
        return len(self.places)

    def where(self, number: int) -> str:
        return f"images[{self.places[number]}]"

    def record(self, number: int, shard: str) -> FileRecord:
        image = as_object(self.images[self.places[number]])
        name = file_name_of(image, "filename")
        image_id = id_of(image, "cocoid" if "cocoid" in image else "imgid")
        paths = [storage.join(folder, name) for folder in self.folders]
        if image.get("filepath"):
            paths.insert(
                0, storage.join(storage.join(self.folders[-1], file_name_of(image, "filepath")), name)
            )
        sentences = image.get("sentences")
        if not isinstance(sentences, list):
            raise SourceError(f"sentences must be a list, not {sentences!r:.80}")
        return FileRecord(
            key=safe_name(str(image_id)),
            shard=shard,
            image_path=paths[0],
            captions=caption_texts(sentences, "sentences"),
            image_id=f"{self.source}#{image_id}",
            info={"image_id": image_id, "file_name": name, "split": text_of(image, "split")},
            other_paths=tuple(paths[1:]),
        )

    def describe(self) -> dict[str, object]:
        return {"format": "Karpathy split", "splits in the file": dict(self.splits)}


def _split(image: Any) -> str | None:
    """None for a broken row, which becomes a reject of every split."""
    split = image.get("split") if isinstance(image, dict) else None
    if not isinstance(split, str) or not split:
        return None
    return "train" if split == "restval" else split
