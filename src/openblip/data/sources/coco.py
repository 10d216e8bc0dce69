"""COCO captions: one .json with `images` and `annotations`, the pictures in a folder. All captions of an
image are one sample.
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openblip.data.sample import Record, Reject, ShardIndex, caption_texts, safe_name
from openblip.data.sources import storage
from openblip.data.sources.files import FileRecord, chunk_names
from openblip.errors import SourceError


@dataclass(slots=True)
class CocoSource:
    """The images of a COCO captions file, in its order; the key is the image's id."""

    name: str
    folder: str
    images: list[Any] = field(repr=False)
    captions: dict[Any, list[Any]] = field(repr=False)
    chunks: dict[str, range] = field(repr=False)

    @classmethod
    def open(cls, spec: str, path: str, images: str | None) -> "CocoSource":
        try:
            content = json.loads(storage.read_bytes(path))
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error}") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path}: broken json: {error}") from error
        if not isinstance(content, dict) or not all(
            isinstance(content.get(k), list) for k in ("images", "annotations")
        ):
            raise SourceError(
                f"{path}: not a COCO captions file, which has the lists images and annotations; "
                "rows of images and captions belong into a .jsonl, one object per line"
            )
        if images is None:
            raise SourceError(f"{path}: give the folder of its images with --images DIR")
        if not storage.is_directory(images):
            raise SourceError(f"{images}: no such folder of images")
        captions: dict[Any, list[Any]] = defaultdict(list)
        for annotation in content["annotations"]:
            if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), (int, str)):
                captions[annotation["image_id"]].append(annotation.get("caption"))
        stem = os.path.basename(path).rpartition(".")[0]
        chunks = dict(chunk_names(stem, len(content["images"])))
        if not chunks:
            raise SourceError(f"{path}: its list of images is empty")
        return cls(spec, images, content["images"], dict(captions), chunks)

    def shards(self) -> Sequence[str]:
        return list(self.chunks)

    def index(self, shard: str) -> ShardIndex:
        records: dict[str, Record] = {}
        rejects: list[Reject] = []
        for number in self.chunks[shard]:
            try:
                record = self._record(shard, number)
            except SourceError as error:
                rejects.append(Reject(shard, f"images[{number}]", str(error)))
                continue
            if records.setdefault(record.key, record) is not record:
                rejects.append(Reject(shard, record.key, "duplicate image id: the first one stays"))
        return ShardIndex(list(records.values()), rejects)

    def _record(self, shard: str, number: int) -> FileRecord:
        image, where = self.images[number], f"images[{number}]"
        if (
            not isinstance(image, dict)
            or not isinstance(image.get("file_name"), str)
            or "\0" in image["file_name"]
        ):
            raise SourceError(f"{where}: no file_name")
        if not isinstance(image.get("id"), (int, str)):
            raise SourceError(f"{where}: no id")
        return FileRecord(
            key=safe_name(str(image["id"])),
            shard=shard,
            image_path=storage.join(self.folder, image["file_name"]),
            captions=caption_texts(self.captions.get(image["id"]), where),
            image_id=f"{self.name}#{image['id']}",
            info={**image, "image_id": image["id"]},
        )
