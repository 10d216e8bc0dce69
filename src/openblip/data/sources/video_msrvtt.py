"""MSRVTT captions as distributed: `MSRVTT_data.json`, or `train_val_videodatainfo.json` and
`test_videodatainfo.json`.

A file with several splits takes the one after a `#`: `MSRVTT_data.json#test`. The clips are `video7010.mp4`.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar

from openblip.data.sample import caption_texts, safe_name
from openblip.data.sources.annotations import AnnotationFile, as_object, first_objects, text_of
from openblip.data.sources.files import FileRecord
from openblip.data.sources.video_clips import ClipFolder
from openblip.errors import SourceError


@dataclass(slots=True)
class MsrvttVideos:
    """The clips of one split, each with all its captions; the key is the clip's name."""

    known_as: ClassVar[str] = "MSRVTT captions, file.json#SPLIT (the lists videos and sentences)"
    has_splits: ClassVar[bool] = True

    source: str
    clips: ClipFolder
    videos: list[Any] = field(repr=False)
    places: list[int] = field(repr=False)
    captions: dict[str, list[Any]] = field(repr=False)
    splits: Counter[str]

    @classmethod
    def recognises(cls, content: Any) -> bool:
        return isinstance(content, dict) and any(
            "video_id" in video for video in first_objects(content.get("videos"))
        )

    @classmethod
    def of(cls, file: AnnotationFile) -> "MsrvttVideos":
        videos = file.content["videos"]
        splits = [_split(video) for video in videos]
        sizes = Counter(split for split in splits if split is not None)
        chosen = next(iter(sizes)) if file.split is None and len(sizes) == 1 else file.split
        if chosen not in sizes:
            listed = ", ".join(f"#{split} ({size} clips)" for split, size in sizes.items())
            wanted = "say which split after a #" if file.split is None else f"there is no split {file.split}"
            raise SourceError(f"{file.source}: {wanted}; the file has {listed or 'none'}")
        captions: dict[str, list[Any]] = defaultdict(list)
        sentences = file.content.get("sentences")
        for sentence in sentences if isinstance(sentences, list) else []:
            if isinstance(sentence, dict) and isinstance(sentence.get("video_id"), str):
                captions[sentence["video_id"]].append(sentence.get("caption"))
        places = [place for place, split in enumerate(splits) if split in (chosen, None)]
        return cls(file.source, ClipFolder.of(file.images), videos, places, dict(captions), sizes)

    def __len__(self) -> int:
        return len(self.places)

    def where(self, number: int) -> str:
        return f"videos[{self.places[number]}]"

    def record(self, number: int, shard: str) -> FileRecord:
        video = as_object(self.videos[self.places[number]])
        text_of(video, "split")
        name = text_of(video, "video_id")
        return FileRecord(
            key=safe_name(name),
            shard=shard,
            image_path=self.clips.find(name),
            captions=caption_texts(self.captions.get(name), f"sentences of {name}"),
            image_id=f"{self.source}#{name}",
            info={**video, "image_id": name},
        )

    def describe(self) -> dict[str, object]:
        rows = (self.videos[place] for place in self.places)
        names = [
            row["video_id"] for row in rows if isinstance(row, dict) and isinstance(row.get("video_id"), str)
        ]
        missing = self.clips.lacking(names)
        found: dict[str, object] = {"format": "MSRVTT captions", "splits in the file": dict(self.splits)}
        return {**found, "missing": missing} if missing else found


def _split(video: Any) -> str | None:
    """None for a broken row, which becomes a reject of every split."""
    split = video.get("split") if isinstance(video, dict) else None
    return split if isinstance(split, str) and split else None
