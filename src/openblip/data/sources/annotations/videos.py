"""Captions of and questions about the videos of MSRVTT and MSVD, which their files name without a path."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from openblip.data.sample import VIDEO_SUFFIXES, caption_texts
from openblip.data.sources import storage
from openblip.data.sources.annotations.captions import captions_by
from openblip.data.sources.annotations.file import AnnotationFile, AnnotationRows, as_object, first_objects
from openblip.data.sources.annotations.questions import question_row
from openblip.data.sources.fields import id_of, text_list, text_of
from openblip.data.sources.rows import IMAGE_COLUMNS, ImageRow
from openblip.errors import SourceError

_SUFFIXES = ", ".join(sorted(VIDEO_SUFFIXES))
_NAME_COLUMNS = ("clip_name", "video_id")
_CAPTION_COLUMNS = ("sentence", "caption", "captions")
_MAPPING = "youtube_mapping.txt"


class VideoFolder:
    """The videos in a folder and its sub-folders, by name without suffix.

    Of videos of one name the one in the fewest sub-folders counts.
    """

    def __init__(self, path: str) -> None:
        """List the folder, once; raises `SourceError` when it holds no video."""
        self.path = path
        self.videos: dict[str, str] = {}
        files = storage.list_files(path, recursive=True)
        for file in sorted(files, key=lambda file: (file.count("/"), file)):
            name, _, suffix = os.path.basename(file).rpartition(".")
            if suffix.lower() in VIDEO_SUFFIXES:
                self.videos.setdefault(name, file)
        if not self.videos:
            raise SourceError(f"{path}: no video ({_SUFFIXES}) in this folder or below")

    def find(self, *names: str) -> tuple[str]:
        """The path of the first video that exists; raises `SourceError` that says what was looked for."""
        for name in names:
            if name in self.videos:
                return (self.videos[name],)
        raise SourceError(f"no video {' or '.join(names)} ({_SUFFIXES}) in {self.path} or below")

    def describe_missing(self, names: Iterable[str]) -> dict[str, str]:
        """How many of the videos do not exist, and one of them; empty when all do."""
        wanted = dict.fromkeys(names)
        missing = [name for name in wanted if name not in self.videos]
        return {"missing": f"{len(missing)} of {len(wanted)} videos, as {missing[0]}"} if missing else {}


def msrvtt_rows(file: AnnotationFile) -> AnnotationRows:
    """MSRVTT captions: `MSRVTT_data.json`, or `train_val_videodatainfo.json` and `test_videodatainfo.json`.

    A file with several splits takes the one after a `#`: `MSRVTT_data.json#test`. The videos are `video7010.mp4`; each
    is a sample with all its captions, and its name is the key.
    """
    numbers, sizes = file.choose_split(file.content["videos"], "videos", may_omit=True)
    videos = [file.content["videos"][n] for n in numbers]
    captions = captions_by(file.content.get("sentences"), "video_id")
    folder = VideoFolder(file.images)

    def row(video: Mapping[str, Any], number: int) -> ImageRow:
        text_of(video, "split")
        name = text_of(video, "video_id")
        its_captions = caption_texts(captions.get(name), f"sentences of {name}")
        return ImageRow(name, folder.find(name), name, its_captions, info={**video, "image_id": name})

    names = (video.get("video_id") for video in videos if isinstance(video, dict))
    missing = folder.describe_missing(name for name in names if isinstance(name, str))
    description = {"format": "MSRVTT captions", "splits in the file": sizes, **missing}
    return AnnotationRows(videos, row, lambda n: f"videos[{numbers[n]}]", description)


def video_list_rows(file: AnnotationFile) -> AnnotationRows:
    """Lists of videos with captions: the test list of MSRVTT that retrieval is reported on, `MSRVTT_JSFUSION_test.csv`
    (`video_id`, `sentence`), and the same as the authors of BLIP distribute it, `msrvtt_test.jsonl` (`clip_name`,
    `caption`).

    Each video is a sample with the captions of all its rows, and its name is the key. The broken rows come after all
    videos.
    """
    captions: dict[str, tuple[str, ...]] = {}
    broken: dict[str, SourceError] = {}
    listed = file.lines() if file.content is None else ((f"[{n}]", item) for n, item in enumerate(file.content))
    for place, item in listed:
        try:
            if isinstance(item, SourceError):
                raise item
            name = text_of(as_object(item), next((name for name in _NAME_COLUMNS if name in item), _NAME_COLUMNS[0]))
            stated = (caption_texts(item.get(column), column) for column in _CAPTION_COLUMNS)
            captions[name] = captions.get(name, ()) + next(filter(None, stated), ())
        except SourceError as error:
            broken[place] = error
    folder = VideoFolder(file.images)

    def row(item: Mapping[str, Any], number: int) -> ImageRow:
        name = item["name"]
        return ImageRow(name, folder.find(name), name, captions[name], {"image_id": name})

    items = [*({"name": name} for name in captions), *broken.values()]
    places = [*captions, *broken]
    description = {"format": "list of captioned videos", **folder.describe_missing(captions)}
    return AnnotationRows(items, row, places.__getitem__, description)


def names_videos(item: Mapping[str, Any]) -> bool:
    """Whether a row has captions of a video that it names without a path."""
    return (
        any(name in item for name in _NAME_COLUMNS)
        and any(name in item for name in _CAPTION_COLUMNS)
        and not any(name in item for name in IMAGE_COLUMNS)
    )


def video_question_rows(file: AnnotationFile) -> AnnotationRows:
    """MSRVTT-QA and MSVD-QA: `train_qa.json`, `val_qa.json`, `test_qa.json`, questions about numbered videos.

    Video 7010 of MSRVTT is `video7010.mp4`. Video 5 of MSVD is `vid5.avi`, or what `youtube_mapping.txt` beside the
    questions calls it: a line `mv89psg6zh4_33_46 vid5` stands for `mv89psg6zh4_33_46.avi`. The questions of MSRVTT are
    told by the category of their videos. The key is a question's id; questions about one video share its image id.
    """
    youtube: dict[str, str] = {}
    if any("category_id" in item for item in first_objects(file.content)):
        description = {"format": "MSRVTT-QA questions"}
    else:
        description = {"format": "MSVD-QA questions"}
        mapping = file.beside(_MAPPING)
        if storage.exists(mapping):
            youtube, description[_MAPPING] = _read_mapping(mapping), mapping
        else:
            description["missing"] = f"{mapping}, without which videos are looked for as vid5"
    folder = VideoFolder(file.images)

    def row(question: Mapping[str, Any], number: int) -> ImageRow:
        question_id = id_of(question, "id") if "id" in question else number
        names = _video_names(question, youtube)
        answers = text_list(question.get("answer"), "answer")
        others = question.keys() - {"id", "answer", "question", "answers", "question_id", "image_id"}
        fields = {name: question[name] for name in question if name in others}
        return question_row(question, question_id, names[-1], folder.find(*names), answers, **fields)

    return AnnotationRows(file.content, row, "[{}]".format, description)


def _video_names(question: Mapping[str, Any], youtube: Mapping[str, str]) -> tuple[str, ...]:
    """What the video of a question may be called, last the name that the data set gives it."""
    video = id_of(question, "video_id")
    if isinstance(video, str) and not video.isdecimal():
        return (video,)
    if "category_id" in question:
        return (f"video{video}",)
    name = f"vid{video}"
    return (youtube[name], name) if name in youtube else (name,)


def _read_mapping(path: str) -> dict[str, str]:
    """The data set's name -> YouTube's; raises `SourceError` that names a broken line."""
    try:
        lines = storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        youtube, _, name = line.strip().rpartition(" ")
        if youtube and name.startswith("vid"):
            names[name] = youtube.strip()
        elif line.strip():
            raise SourceError(f"{path} line {number}: expected a name and vid with a number, not {line:.80}")
    return names
